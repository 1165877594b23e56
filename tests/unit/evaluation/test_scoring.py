"""A run folder is scored once: second calls compute nothing, and what cannot be scored is named while the rest is."""

import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from storymem_dist.artifacts.scores import RunScores, read_scores
from storymem_dist.artifacts.video import read_clip
from storymem_dist.errors import RunFolderError
from storymem_dist.evaluation import tasks
from storymem_dist.evaluation.cache import CACHE_FOLDER, FeatureCache
from storymem_dist.evaluation.clips import find_clips
from storymem_dist.evaluation.frames import middle_frames
from storymem_dist.evaluation.models import Models
from storymem_dist.evaluation.ranks import RankProcesses
from storymem_dist.evaluation.scoring import score_run
from storymem_dist.evaluation.settings import EvaluationSettings
from storymem_dist.observe.run.files import RunFiles
from tests.helpers.fake_run import FakeRun
from tests.helpers.score_weights import write_aesthetic, write_clip_l, write_viclip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSettings:
    root = tmp_path_factory.mktemp("weights")
    return EvaluationSettings(
        viclip=str(write_viclip(root / "viclip")),
        clip_l=str(write_clip_l(root / "clip_l")),
        aesthetic=str(write_aesthetic(root / "aesthetic")),
        device="cpu",
    )


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two whole stories of four shots, and one of which only the first shot is finished."""
    run = FakeRun(tmp_path_factory.mktemp("run") / "first", num_stories=3)
    with run.replica() as replica:
        for story, shot in [*itertools.product(range(2), range(4)), (2, 0)]:
            run.shot(replica, story, shot)
        run.finish(replica)
    return run.root


@pytest.fixture(scope="module")
def whole(rendered: Path, weights: EvaluationSettings) -> RunScores:
    return score_run(rendered, Models(weights, CPU))


@pytest.fixture
def copy(rendered: Path, whole: RunScores, tmp_path: Path) -> Path:
    """A copy of the scored run; its records and clips keep their names."""
    return shutil.copytree(rendered, tmp_path / "copy", symlinks=True)


NO_WEIGHTS = EvaluationSettings(viclip="none/a", clip_l="none/b", aesthetic="none/c", device="cpu")


def test_every_measure_is_there(whole: RunScores, rendered: Path) -> None:
    story = whole.stories["story_0"]
    of_shots = {"aesthetic_quality", "prompt_following_single", "sharpness", "flicker"}
    assert set(story.shots["shot_01"].values) == of_shots
    assert set(story.shots["shot_02"].values) == of_shots | {"seam", "keyframe_agreement"}
    assert set(story.shots["shot_03"].values) == of_shots | {"keyframe_agreement"}, "it does not continue a shot"
    of_stories = {"prompt_following_global", "consistency_overall", "consistency_top10"}
    assert set(story.values) == set(whole.values) == of_shots | of_stories | {"seam", "keyframe_agreement"}
    assert story.notes[0] == "6 pairs of shots: top 10 uses all of them"
    stored = read_scores(rendered)
    assert stored == whole and stored is not None and set(stored.models) == {"viclip", "aesthetic"}


def test_means_are_of_shots_and_of_stories(whole: RunScores) -> None:
    shots = [shot.values["sharpness"] for story in whole.stories.values() for shot in story.shots.values()]
    assert len(shots) == 9 and whole.values["sharpness"] == pytest.approx(sum(shots) / 9)
    consistency = [whole.stories[f"story_{number}"].values["consistency_overall"] for number in range(2)]
    assert whole.values["consistency_overall"] == pytest.approx(sum(consistency) / 2)


def test_a_story_of_one_shot_has_no_consistency_and_an_unfinished_one_no_global_score(whole: RunScores) -> None:
    story = whole.stories["story_2"]
    assert not {"consistency_overall", "prompt_following_global"} & set(story.values)
    assert "1 of 4 shots scored; the story is not whole" in story.notes
    assert "cross-shot consistency is not defined: it needs two shots" in story.notes


def test_the_whole_story_is_seen_in_the_middle_frames_of_all_its_clips_joined(
    whole: RunScores, rendered: Path, weights: EvaluationSettings
) -> None:
    frames = read_clip_of_story(rendered)
    models = Models(weights, CPU)
    assert models.load("viclip")
    feature = models.clip_feature(frames[middle_frames(len(frames))])
    similarity = float(feature.double() @ models.text_features(["A short film."])[0].double())
    assert whole.stories["story_0"].values["prompt_following_global"] == pytest.approx(similarity, abs=1e-6)


def read_clip_of_story(root: Path) -> torch.Tensor:
    return torch.cat([read_clip(root / f"stories/story_0/shot_{number:02d}.mp4") for number in range(1, 5)])


def test_a_second_call_computes_nothing(whole: RunScores, rendered: Path, weights: EvaluationSettings) -> None:
    models = Models(weights, CPU)
    with patch.object(tasks, "read_clip") as reads, patch.object(tasks, "read_png") as images:
        again = score_run(rendered, models)
    assert (reads.call_count, images.call_count, models.num_loaded) == (0, 0, 0)
    assert replace(again, written=0) == replace(whole, written=0)


def test_only_a_changed_clip_is_computed_again(copy: Path, weights: EvaluationSettings) -> None:
    path = next((copy / CACHE_FOLDER).glob("description-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    models = Models(weights, CPU)
    with patch.object(tasks, "read_clip", wraps=tasks.read_clip) as reads:
        score_run(copy, models)
    assert (reads.call_count, models.num_loaded) == (1, 0)


def test_without_weights_the_others_are_measured_and_each_model_is_named_once(copy: Path) -> None:
    shutil.rmtree(copy / CACHE_FOLDER)
    scores = score_run(copy, Models(NO_WEIGHTS, CPU))
    assert set(scores.values) == {"sharpness", "flicker", "seam", "keyframe_agreement"}
    assert len(scores.notes) == 2 and all("storymem-weights download" in note for note in scores.notes)
    assert not any("consistency" in note for story in scores.stories.values() for note in story.notes)


def test_clips_that_cannot_be_used_are_named_and_the_others_are_scored(copy: Path) -> None:
    shots = {name: next((copy / f"stories/story_0/{name}/attempts").iterdir()) for name in ("shot_02", "shot_03")}
    (shots["shot_02"] / "clip.mp4").unlink()
    (shots["shot_03"] / "clip.mp4").write_bytes(b"changed")
    (copy / "stories/story_1/shot_01.json").unlink()
    (copy / "stories/story_1/shot_01.json").write_text("{}")
    scores = score_run(copy, Models(NO_WEIGHTS, CPU))
    said = "\n".join(scores.notes)
    assert "shot_02" in said and "is not scored: it is missing" in said
    assert "its contents have changed since it was rendered" in said and "stories/story_1/shot_01.json" in said
    assert set(scores.stories["story_0"].shots) == {"shot_01", "shot_04"}
    assert "seam" not in scores.stories["story_0"].shots["shot_04"].values, "the clip before it is missing"


def test_stories_that_share_clips_have_each_its_own_global_score(copy: Path, weights: EvaluationSettings) -> None:
    (copy / CACHE_FOLDER).rename(copy / "before")
    (first, second, _), _ = find_clips(RunFiles(copy))
    twin = replace(first, story_id="twin", shots=[*first.shots[:-1], second.shots[-1]])
    models, cache = Models(replace(weights, clip_l="none"), CPU), FeatureCache(copy / CACHE_FOLDER)
    for task in tasks.open_tasks([first, twin], models, cache):
        assert tasks.compute(task, copy, models, cache) is None
    features = [tasks.story_feature(story, models, cache) for story in (first, twin)]
    assert features[0] is not None and features[1] is not None and not features[0].equal(features[1])


@pytest.mark.parametrize("fault", ["link out", "pipe", "another picture", "missing"])
def test_keyframes_that_are_not_those_of_the_record_are_named(copy: Path, fault: str) -> None:
    for path in (copy / CACHE_FOLDER).glob("keyframes-*"):
        path.unlink()
    (story, *_), _ = find_clips(RunFiles(copy))
    image = copy / story.shots[0].keyframes[0].path
    image.unlink()
    if fault == "link out":
        image.symlink_to(__file__)
    elif fault == "pipe":
        os.mkfifo(image)
    elif fault == "another picture":
        shutil.copy(copy / story.shots[1].keyframes[0].path, image)
    scores = score_run(copy, Models(NO_WEIGHTS, CPU))
    (note,) = [one for one in scores.notes if one.startswith("the keyframes of ")]
    assert "story_0/shot_01 are not used" in note
    assert "keyframe_agreement" not in scores.stories["story_0"].shots["shot_02"].values
    assert "keyframe_agreement" in scores.stories["story_1"].shots["shot_02"].values


def test_a_folder_that_is_no_run_or_has_no_shot_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a run folder"):
        score_run(tmp_path, Models(NO_WEIGHTS, CPU))
    run = FakeRun(tmp_path / "new", num_stories=1)
    with pytest.raises(RunFolderError, match="there is no finished shot to score"):
        score_run(run.root, Models(NO_WEIGHTS, CPU))


def test_two_ranks_leave_the_same_scores(
    copy: Path, whole: RunScores, weights: EvaluationSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the aesthetic model, whose library takes seconds to import."""
    shutil.rmtree(copy / CACHE_FOLDER)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = replace(weights, clip_l="none")
    seen: list[tuple[int, int]] = []
    with patch.object(tasks, "read_clip") as reads:
        scores = score_run(
            copy,
            Models(settings, CPU),
            workers=RankProcesses(settings, num_ranks=2),
            progress=lambda done, total: seen.append((done, total)),
        )
    assert reads.call_count == 0, "the ranks have read all clips"
    assert seen and seen[-1][1] == 9
    assert scores.values == {key: value for key, value in whole.values.items() if key != "aesthetic_quality"}
