"""The contents of a report, read from a run's event files and records alone.

Works on a run that is still going and on a broken one: records take precedence, events add the rest. Every value has
its type here, whatever the files hold. Knows nothing of HTML.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import storymem_dist.events as ev
from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.artifacts.scores import RunScores, read_scores
from storymem_dist.observe.journal import JournalTail, read_journal
from storymem_dist.observe.run.files import RunFiles, StoryFiles
from storymem_dist.observe.run.state import RunState
from storymem_dist.observe.run.values import ShotState

ALIVE_SECONDS = 120.0
"""A replica that sent an event within this time counts as running."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyframeView:
    """A keyframe of the memory bank. ``image`` is a path relative to the run folder, None when it cannot be found.

    ``shot_index`` is -1 for reference images. The scores are those with which it was kept.
    """

    shot_index: int
    slot: int
    frame_index: int
    image: str | None
    similarity: float | None
    bank_similarity: float | None
    against: str | None
    quality: float | None
    why: str

    @property
    def key(self) -> tuple[int, int]:
        """What identifies it in its story."""
        return (self.shot_index, self.slot)

    @property
    def name(self) -> str:
        """Its name for people."""
        if self.shot_index < 0:
            return f"reference image {self.slot + 1}"
        if self.slot < 0:
            return f"reference image of shot_{self.shot_index + 1:02d}"
        return f"shot_{self.shot_index + 1:02d} keyframe {self.slot}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotView:
    """One shot. ``status``: ``finished``, ``running``, ``failed``, ``blocked`` or ``waiting``.

    ``decisions`` are those of the current record, or of the newest attempt where there is no record. ``own``: what the
    storyboard sets for this shot alone. ``scores``: what it was scored, by measure.
    """

    shot_id: str
    shot_index: int
    scene_num: int
    prompt: str
    cut: bool
    status: str
    reason: str
    mode: str
    seed: int | None
    clip: str | None
    fps: float
    num_frames: int
    height: int
    width: int
    seconds: float | None
    stage_seconds: dict[str, float]
    seconds_per_step: float | None
    num_reused_steps: int
    step: int
    num_steps: int
    num_attempts: int
    why: str
    decisions: tuple[ev.MemoryDecided, ...]
    own: dict[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def recalled(self) -> tuple[ev.MemoryDecided, ...]:
        """Keyframes that the shot was shown, in their order."""
        return tuple(decision for decision in self.decisions if decision.verdict == "recalled")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoryView:
    """One story: its shots in order and the keyframes of its memory bank, oldest first.

    ``waits_for``: for each shot the positions of those that it waits for; empty where it is not known.
    """

    story_id: str
    name: str
    overview: str
    video: str | None
    message: str
    shots: tuple[ShotView, ...]
    keyframes: tuple[KeyframeView, ...]
    waits_for: tuple[tuple[int, ...], ...] = ()

    @property
    def num_finished(self) -> int:
        """Shots that are committed."""
        return sum(shot.status == "finished" for shot in self.shots)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunView:
    """Everything a report shows. ``status``: ``finished``, ``running``, ``stopped``, ``incomplete`` or ``empty``.

    ``left_out`` names files that could not be used, and why. ``scores`` are those of the clips as they are; None where
    the run is not scored.
    """

    root: Path
    name: str
    run_id: str
    created: str
    status: str
    written_at: float
    stories: tuple[StoryView, ...]
    state: RunState
    config_hash: str
    config: str
    left_out: tuple[str, ...]
    scores: RunScores | None = None

    @property
    def shots(self) -> tuple[ShotView, ...]:
        """All shots of all stories."""
        return tuple(shot for story in self.stories for shot in story.shots)


def read_run(root: Path, *, now: float | None = None) -> RunView:
    """Read the run folder at ``root``; ``now`` (seconds since the epoch) decides what still runs.

    Raises:
        RunFolderError: ``root`` is not a run folder.
    """
    files = RunFiles(root)
    state = RunState()
    tail = JournalTail(files.events_folder)
    events = read_journal(tail)
    for stamped in events:
        state.apply(stamped)
    folders = {story.story_id: story for story in files.stories()}
    nothing = {name: StoryFiles(story_id=name, storyboard={}, records={}, video=None) for name in state.stories}
    stories = tuple(_story(files, folder, state) for _, folder in sorted({**nothing, **folders}.items()))
    moment = time.time() if now is None else now
    config_hash, config = files.newest_config()
    unreadable = [f"events: {tail.num_unreadable} lines are no events"] if tail.num_unreadable else []
    try:
        scores = _current(read_scores(root), folders)
    except (OSError, ValueError) as error:
        scores = None
        unreadable.append(f"scores.json: {str(error)[:300]}")
    stories = tuple(_with_scores(story, scores) for story in stories)
    return RunView(
        root=root,
        name=root.resolve().name,
        run_id=files.run_id,
        created=files.created,
        status=_status(state, stories, moment),
        written_at=moment,
        stories=stories,
        state=state,
        config_hash=config_hash,
        config=config,
        left_out=(*files.left_out, *unreadable),
        scores=scores,
    )


def _current(scores: RunScores | None, folders: dict[str, StoryFiles]) -> RunScores | None:
    """Scores without those of shots that were rendered again, which are named in the notes."""
    if scores is None:
        return None
    stories, stale = {}, []
    for story_id, story in scores.stories.items():
        records = folders[story_id].records if story_id in folders else {}
        clips = {shot_id: record.files[record.clip].sha256 for shot_id, record in records.items()}
        stale += [f"{story_id}/{key}" for key, shot in story.shots.items() if clips.get(key) != shot.clip]
        shots = {key: shot for key, shot in story.shots.items() if clips.get(key) == shot.clip}
        stories[story_id] = replace(story, shots=shots)
    note = f"older than the clips of {', '.join(stale[:5])}{', ...' * (len(stale) > 5)}: score the run again"
    return replace(scores, stories=stories, notes=[*([note] if stale else []), *scores.notes])


def _with_scores(story: StoryView, scores: RunScores | None) -> StoryView:
    found = scores.stories[story.story_id].shots if scores is not None and story.story_id in scores.stories else {}
    shots = (replace(s, scores=found[s.shot_id].values) if s.shot_id in found else s for s in story.shots)
    return replace(story, shots=tuple(shots))


def _status(state: RunState, stories: tuple[StoryView, ...], now: float) -> str:
    shots = [shot for story in stories for shot in story.shots]
    if any(not row.is_over and now - row.last_seen < ALIVE_SECONDS for row in state.rows.values()):
        return "running"
    if not shots:
        return "empty"
    if all(shot.status == "finished" for shot in shots):
        return "finished"
    outcomes = [row.starts[-1].outcome for row in state.rows.values() if row.starts]
    return "stopped" if outcomes and all(outcome == "stopped" for outcome in outcomes) else "incomplete"


def _story(files: RunFiles, folder: StoryFiles, state: RunState) -> StoryView:
    folded = state.stories.get(folder.story_id)
    planned = _planned_shots(folder.storyboard)
    folded_shots = folded.shots if folded is not None else {}
    known = {**dict.fromkeys(planned), **dict.fromkeys(folder.records), **dict.fromkeys(folded_shots)}
    shots = [
        _shot(files, name, planned.get(name, {}), folder.records.get(name), folded_shots.get(name)) for name in known
    ]
    shots.sort(key=lambda shot: (shot.shot_index, shot.shot_id))
    board = folder.storyboard
    return StoryView(
        story_id=folder.story_id,
        name=_typed(board.get("name"), str, "") or (folded.name if folded else "") or folder.story_id,
        overview=_typed(board.get("overview"), str, ""),
        video=folder.video,
        message=folded.message if folded else "",
        shots=tuple(shots),
        keyframes=_keyframes(files, folder, shots),
        waits_for=_checked_waits(folded.waits_for if folded else ()),
    )


_Value = TypeVar("_Value")


def _typed(value: Any, kind: type[_Value], default: _Value) -> _Value:
    """``value`` if it is of type ``kind`` (and a number of at most 15 digits, if it is one), else ``default``."""
    fits = isinstance(value, kind) and isinstance(value, bool) == (kind is bool)
    return value if fits and (not isinstance(value, int | float) or abs(value) < 10**15) else default


def _checked_waits(waits_for: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """What each shot waits for, without what no render writes: only shots before it."""
    return tuple(tuple(one for one in waits if 0 <= one < index) for index, waits in enumerate(waits_for))


def _planned_shots(storyboard: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The shots by id of a storyboard that ``RunFolder.write_storyboard`` wrote."""
    planned = {}
    for scene in _typed(storyboard.get("scenes"), list, []):
        for shot in _typed(_typed(scene, dict, {}).get("shots"), list, []):
            index = _typed(_typed(shot, dict, {}).get("index"), int, -1)
            if index >= 0:
                planned[f"shot_{index + 1:02d}"] = shot
    return planned


def _decisions(record: ShotRecord) -> tuple[ev.MemoryDecided, ...]:
    """The memory's decisions in a record; none where they are not what a render writes."""
    try:
        found = ev.memory_events(record.story_id, record.shot_id, record.shot_index, record.memory)
        checked = [ev.event_from_dict(ev.event_to_dict(event)) for event in found]
    except (ValueError, KeyError, TypeError, AttributeError):
        return ()
    return tuple(event for event in checked if isinstance(event, ev.MemoryDecided))


def _shot(
    files: RunFiles, shot_id: str, planned: dict[str, Any], record: ShotRecord | None, folded: ShotState | None
) -> ShotView:
    attempt = folded.last if folded is not None else None
    started = attempt.started if attempt is not None else None
    status = folded.status if folded is not None else "waiting"
    # The record decides, unless a newer attempt without a record is running or has failed.
    if record is not None and status == "waiting":
        status = "finished"
    if record is None and status == "finished":
        status = "waiting"
    number = shot_id.removeprefix("shot_")
    shot_index = int(number) - 1 if number.isdecimal() and len(number) < 10 else 0
    decisions: tuple[ev.MemoryDecided, ...] = tuple(attempt.decisions) if attempt is not None else ()
    stage_seconds = dict(attempt.stage_seconds) if attempt is not None else {}
    if record is not None:
        shot_index = record.shot_index
        decisions = _decisions(record)
        recorded = _typed(record.timing.get("stage_seconds"), dict, {})
        stage_seconds = {name: _typed(seconds, float, 0.0) for name, seconds in recorded.items()} or stage_seconds
    duration = attempt.end - attempt.start if attempt is not None and attempt.end is not None else None
    return ShotView(
        shot_id=shot_id,
        shot_index=shot_index,
        scene_num=record.scene_num if record else _typed(planned.get("scene_num"), int, 0),
        prompt=record.prompt if record else _typed(planned.get("prompt"), str, started.prompt if started else ""),
        cut=record.cut if record else _typed(planned.get("cut"), bool, True),
        status=status,
        reason=folded.reason if folded is not None else "",
        mode=record.mode if record else (started.mode if started else ""),
        seed=record.seed if record else (started.seed if started else None),
        clip=files.clip_path(record) if record else None,
        fps=float(record.fps) if record and record.fps > 0 else 16.0,
        num_frames=record.num_frames if record else 0,
        height=record.height if record else (started.height if started else 0),
        width=record.width if record else (started.width if started else 0),
        seconds=sum(stage_seconds.values()) if record and stage_seconds else duration,
        stage_seconds=stage_seconds,
        seconds_per_step=attempt.seconds_per_step if attempt is not None else None,
        num_reused_steps=attempt.num_reused_steps if attempt is not None else 0,
        step=attempt.step if attempt is not None else 0,
        num_steps=attempt.num_steps if attempt is not None else 0,
        num_attempts=len(folded.attempts) if folded is not None else 0,
        why=started.why if started is not None else "",
        decisions=decisions,
        own=dict(record.own) if record else {},
    )


def _given_images(files: RunFiles, folder: StoryFiles) -> dict[tuple[int, int], str]:
    """The copies of pictures that the storyboard gives, by the shot index and slot that keyframes of them have."""
    board = folder.storyboard
    entities = [_typed(entity, dict, {}) for entity in _typed(board.get("entities"), list, [])]
    of_story = [*_typed(board.get("reference_images"), list, [])]
    of_story += [image for entity in entities for image in _typed(entity.get("references"), list, [])]
    places = [(-1, position) for position in range(len(of_story))]
    for shot in _planned_shots(board).values():
        count = len(_typed(shot.get("references"), list, []))
        places += [(_typed(shot.get("index"), int, 0), position - count) for position in range(count)]
    return {(index, slot): files.reference_path(folder.story_id, index, slot) for index, slot in places}


def _keyframes(files: RunFiles, folder: StoryFiles, shots: list[ShotView]) -> tuple[KeyframeView, ...]:
    """Every keyframe that a shot kept or was shown."""
    images: dict[tuple[int, int], str] = {}
    for record in folder.records.values():
        for slot, path in files.keyframe_paths(record).items():
            images[(record.shot_index, slot)] = path
    images |= _given_images(files, folder)
    views: dict[tuple[int, int], KeyframeView] = {}
    for shot in shots:
        for decision in shot.decisions:
            if decision.slot is None or decision.verdict in ("duplicate", "low_quality"):
                continue
            key = (decision.source_shot_index, decision.slot)
            view = KeyframeView(
                shot_index=key[0],
                slot=key[1],
                frame_index=decision.source_frame_index,
                image=images.get(key),
                similarity=decision.similarity,
                bank_similarity=decision.bank_similarity,
                against=decision.against,
                quality=decision.quality,
                why=decision.why,
            )
            if key not in views:
                views[key] = view if decision.verdict.startswith("kept") else replace(view, why="")
    return tuple(views[key] for key in sorted(views))
