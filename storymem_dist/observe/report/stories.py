"""A story as a report shows it, made from its storyboard, its records and its folded events.

Records take precedence, events add the rest. Whatever the files hold, every value gets the type that ``views`` says.
"""

from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import storymem_dist.events as ev
from storymem_dist.artifacts.records import ShotRecord
from storymem_dist.observe.report.views import KeyframeView, ShotView, StoryView
from storymem_dist.observe.run.files import RunFiles, StoryFiles
from storymem_dist.observe.run.state import RunState
from storymem_dist.observe.run.values import ShotState


def story_view(files: RunFiles, folder: StoryFiles, state: RunState) -> StoryView:
    """Return the story whose files are ``folder``, without its scores and its place in the queue."""
    folded = state.stories.get(folder.story_id)
    planned = _planned_shots(folder.storyboard)
    folded_shots = folded.shots if folded is not None else {}
    known = {**dict.fromkeys(planned), **dict.fromkeys(folder.records), **dict.fromkeys(folded_shots)}
    again = _asked_again(state, folder.story_id)
    shots = []
    for name in known:
        record, asked_at = folder.records.get(name), again.get(name, again.get("", 0.0))
        is_old = record is not None and _typed(record.timing.get("committed_at"), float, 0.0) < asked_at
        shots.append(_shot(files, name, planned.get(name, {}), record, folded_shots.get(name), is_old=is_old))
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


def _asked_again(state: RunState, story_id: str) -> dict[str, float]:
    """When replicas were last asked to render shots again, by shot id; under "" for all shots."""
    again: dict[str, float] = {}
    for applied in state.requests.values():
        request = applied.request
        if request.action == "rerender" and request.story_id == story_id:
            for shot_id in request.shots or ("",):
                again[shot_id] = max(again.get(shot_id, 0.0), request.asked_at)
    return again


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
    files: RunFiles,
    shot_id: str,
    planned: dict[str, Any],
    record: ShotRecord | None,
    folded: ShotState | None,
    *,
    is_old: bool,
) -> ShotView:
    """``is_old``: somebody asked after the record to render the shot again."""
    attempt = folded.last if folded is not None else None
    started = attempt.started if attempt is not None else None
    status = folded.status if folded is not None else "waiting"
    # The record decides, unless a newer attempt without a record is running or has failed.
    if record is not None and status == "waiting" and not is_old:
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
    find = partial(files.reference_path, folder.story_id, is_sharded=files.is_sharded)
    return {(index, slot): find(index, slot) for index, slot in places}


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
