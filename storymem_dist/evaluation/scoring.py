"""Scores a run folder: what is open is computed, by this process or by several ranks, and the metrics follow from it.

Averages: a clip's aesthetic score is the mean over its frames; the measures of shots are averaged over all shots of the
run, as VBench averages over clips; those of stories over its stories. Knows the order of the work; the formulas are in
``metrics`` and ``measures``.
"""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from storymem_dist.artifacts.scores import MEASURES, RunScores, ShotScores, StoryScores, write_scores
from storymem_dist.errors import RunFolderError
from storymem_dist.evaluation import metrics
from storymem_dist.evaluation.cache import CACHE_FOLDER, FeatureCache, joint
from storymem_dist.evaluation.clips import ShotClip, StoryClips, find_clips
from storymem_dist.evaluation.measures import ClipDescription, agreement, seam
from storymem_dist.evaluation.models import AESTHETIC, VICLIP, Models
from storymem_dist.evaluation.tasks import (
    TEXT,
    Progress,
    Task,
    compute,
    description,
    keyframes_key,
    model_key,
    open_tasks,
    story_feature,
    text_features,
)
from storymem_dist.observe.run.files import RunFiles
from storymem_dist.observe.run.format import count


class Workers(Protocol):
    """Several processes that compute tasks."""

    def __call__(self, root: Path, tasks: Sequence[Task], progress: Progress) -> None:
        """Compute what they can of ``tasks``. What they leave is computed by the caller."""
        ...


def score_run(
    root: Path, models: Models, *, workers: Workers | None = None, progress: Progress = lambda done, total: None
) -> RunScores:
    """Score the run folder at ``root``, write ``scores.json`` into it and return the scores.

    Raises ``RunFolderError`` where ``root`` is no run folder, holds no finished shot or cannot be written.
    """
    files = RunFiles(root)
    stories, notes = find_clips(files)
    if not any(story.shots for story in stories):
        raise RunFolderError(f"{root}: there is no finished shot to score" + "".join(f"; {note}" for note in notes[:3]))
    cache = FeatureCache(root / CACHE_FOLDER)
    try:
        notes += _compute(root, stories, models, cache, workers, progress)
        for story in stories:
            if VICLIP in models.identities and story.is_whole and story.overview:
                story_feature(story, models, cache)
        texts = [text for story in stories for text in (*(shot.record.prompt for shot in story.shots), story.overview)]
        features = text_features([text for text in texts if text], models, cache)
        scores = _scores(files.run_id, stories, models, cache, features, notes)
        write_scores(root, scores)
    except OSError as error:
        raise RunFolderError(f"{root}: the scores cannot be written: {error}") from error
    return scores


def _compute(
    root: Path,
    stories: Sequence[StoryClips],
    models: Models,
    cache: FeatureCache,
    workers: Workers | None,
    progress: Progress,
) -> list[str]:
    """Fill the cache; return a sentence for each file that could not be read. Raises ``OSError``."""
    tasks = open_tasks(stories, models, cache)
    if workers is not None and len(tasks) > 1:
        workers(root, tasks, progress)
        tasks = open_tasks(stories, models, cache)
    problems = []
    for number, task in enumerate(tasks):
        progress(number, len(tasks))
        problems.append(compute(task, root, models, cache))
    if tasks:
        progress(len(tasks), len(tasks))
    return [problem for problem in problems if problem is not None]


def _scores(
    run_id: str,
    stories: Sequence[StoryClips],
    models: Models,
    cache: FeatureCache,
    texts: dict[str, Tensor],
    notes: Sequence[str],
) -> RunScores:
    scored = {story.story_id: _story_scores(story, models, cache, texts) for story in stories}
    values: dict[str, float | None] = {}
    for measure in MEASURES:
        per_shot = [shot.values.get(measure.key) for story in scored.values() for shot in story.shots.values()]
        per_story = [story.values.get(measure.key) for story in scored.values()]
        values[measure.key] = metrics.mean(per_shot if measure.of_shots else per_story)
    return RunScores(
        run_id=run_id,
        written=time.time(),
        values=_known(values),
        stories=scored,
        models=dict(models.identities),
        notes=[*models.missing.values(), *notes],
    )


def _story_scores(story: StoryClips, models: Models, cache: FeatureCache, texts: dict[str, Tensor]) -> StoryScores:
    notes: list[str] = []
    if not story.is_whole:
        notes.append(f"{len(story.shots)} of {count(story.num_shots, 'shot')} scored; the story is not whole")
    described = {shot.name: description(cache, shot.sha256) for shot in story.shots}
    shots, previous, earlier = {}, None, list[Tensor]()
    for shot in story.shots:
        now = described[shot.name]
        if now is None:
            previous = None
            continue
        values: dict[str, float | None] = {
            "sharpness": now.sharpness.mean().item(),
            "flicker": metrics.finite(now.flicker),
            "seam": seam(before, now) if (before := _continued(shot, previous, described)) is not None else None,
            "keyframe_agreement": agreement(now.colours, torch.cat(earlier)) if earlier else None,
        }
        values |= _judged(shot, models, cache, texts)
        shots[shot.record.shot_id] = ShotScores(clip=shot.sha256, values=_known(values))
        previous = shot
        kept = cache.get(keyframes_key([image.sha256 for image in shot.keyframes])) if shot.keyframes else None
        earlier += [kept["colours"]] if kept is not None else []
    of_story: dict[str, float | None] = {
        measure.key: metrics.mean([shot.values.get(measure.key) for shot in shots.values()])
        for measure in MEASURES
        if measure.of_shots
    }
    of_story |= _of_viclip(story, models, cache, texts, notes)
    return StoryScores(values=_known(of_story), shots=shots, notes=notes)


def _continued(
    shot: ShotClip, previous: ShotClip | None, described: Mapping[str, ClipDescription | None]
) -> ClipDescription | None:
    """The description of the clip that ``shot`` continues, if it does and the clip is there."""
    if shot.record.cut or previous is None or previous.record.shot_index != shot.record.shot_index - 1:
        return None
    return described[previous.name]


def _judged(shot: ShotClip, models: Models, cache: FeatureCache, texts: dict[str, Tensor]) -> dict[str, float | None]:
    aesthetic, clip = (_value(cache, name, shot.sha256, models) for name in (AESTHETIC, VICLIP))
    text = texts.get(shot.record.prompt)
    return {
        "aesthetic_quality": metrics.finite(aesthetic.double().mean()) if aesthetic is not None else None,
        "prompt_following_single": metrics.cosine(clip, text) if clip is not None and text is not None else None,
    }


def _value(cache: FeatureCache, name: str, sha256: str, models: Models) -> Tensor | None:
    identity = models.identities.get(name)
    found = cache.get(model_key(name, sha256, identity)) if identity is not None else None
    return found["value"] if found is not None else None


def _of_viclip(
    story: StoryClips, models: Models, cache: FeatureCache, texts: dict[str, Tensor], notes: list[str]
) -> dict[str, float | None]:
    """The metrics of a whole story; adds to ``notes`` why one is not defined."""
    if not texts:
        return {}
    pairs = [
        (clip, texts[shot.record.prompt])
        for shot in story.shots
        if (clip := _value(cache, VICLIP, shot.sha256, models)) is not None and shot.record.prompt in texts
    ]
    empty = torch.empty(0, 1)
    found = metrics.consistency(*(torch.stack(side) for side in zip(*pairs, strict=True)) if pairs else (empty, empty))
    if not found.num_pairs:
        notes.append("cross-shot consistency is not defined: it needs two shots")
    elif found.num_pairs < metrics.MOST_RELEVANT:
        notes.append(f"{count(found.num_pairs, 'pair')} of shots: top 10 uses all of them")
    whole = None
    if not story.overview:
        notes.append("global prompt following is not defined: the storyboard has no overview")
    elif story.is_whole:
        feature = story_feature(story, models, cache)
        whole = metrics.cosine(feature, texts[story.overview]) if feature is not None else None
        if feature is None:
            notes.append("global prompt following is left out: not every clip could be read")
    cut = sum(_is_cut(text, models, cache) for text in {shot.record.prompt for shot in story.shots} | {story.overview})
    if cut:
        notes.append(f"{count(cut, 'text')} longer than ViCLIP reads: it sees the beginning alone")
    return {
        "prompt_following_global": whole,
        "consistency_overall": found.overall,
        "consistency_top10": found.top,
    }


def _is_cut(text: str, models: Models, cache: FeatureCache) -> bool:
    found = cache.get(model_key(TEXT, joint([text]), models.identities[VICLIP]))
    return found is not None and bool(found.get("is_cut", False))


def _known(values: dict[str, float | None]) -> dict[str, float]:
    """Without what is not known, and without what damaged weights compute."""
    return {key: value for key, value in values.items() if value is not None and math.isfinite(value)}
