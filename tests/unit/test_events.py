import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import storymem_dist.events as ev
from storymem_dist.memory.bank import RecallDecision
from storymem_dist.memory.keyframes import FrameDecision


def example(cls: type[ev.Event]) -> ev.Event:
    """An event of a class with a value other than the default in every field."""
    values: dict[str, object] = {"float": 1.5, "int": 7, "str": "“ünï”\n", "bool": True}
    filled = {}
    for field in dataclasses.fields(cls):
        kind = str(field.type).removesuffix(" | None") if isinstance(field.type, str) else None
        name = kind or getattr(field.type, "__name__", str(field.type))
        hint = str(field.type)
        if "Mapping[str, str]" in hint:
            filled[field.name] = {"torch": "2.13.0"}
        elif "Mapping[str, float]" in hint:
            filled[field.name] = {"denoise": 2.5}
        elif "tuple[tuple[int" in hint:
            filled[field.name] = ((), (0,), (0, 1))
        elif "tuple[int" in hint:
            filled[field.name] = (0, 1)
        elif "tuple" in hint:
            filled[field.name] = ("a.png", "b.png")
        else:
            key = next(key for key in values if key in (name, hint.removesuffix(" | None")))
            filled[field.name] = values[key]
    return cls(**filled)


@pytest.mark.parametrize("cls", ev.EVENT_TYPES.values(), ids=ev.EVENT_TYPES)
def test_every_event_comes_back_from_its_json_line(cls: type[ev.Event]) -> None:
    stamped = ev.StampedEvent(event=example(cls), wall_time=1764000000.25, writer="w", replica=3, sequence=9)
    line = ev.stamped_to_json(stamped)
    assert "\n" not in line
    assert ev.stamped_from_json(line) == stamped


@pytest.mark.parametrize("cls", ev.EVENT_TYPES.values(), ids=ev.EVENT_TYPES)
def test_an_event_field_never_hides_a_part_of_the_stamp(cls: type[ev.Event]) -> None:
    names = {field.name for field in dataclasses.fields(cls)}
    assert not names & {"schema", "event", "wall_time", "writer", "replica", "sequence"}


@given(st.floats(), st.text())
def test_any_number_and_text_make_valid_json(seconds: float, text: str) -> None:
    event = ev.StepFinished(story_id=text, shot_id="s", step=1, num_steps=2, expert="e", elapsed_seconds=seconds)
    stamped = ev.StampedEvent(event=event, wall_time=0.0, writer="w", replica=0, sequence=0)
    line = ev.stamped_to_json(stamped)
    read = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert read["elapsed_seconds"] == (seconds if math.isfinite(seconds) else None)
    back = ev.stamped_from_json(line).event
    assert isinstance(back, ev.StepFinished) and back.story_id == text
    assert back.elapsed_seconds == seconds or math.isnan(back.elapsed_seconds)


def test_fields_of_a_newer_version_are_ignored() -> None:
    values = {**ev.event_to_dict(ev.StopRequested(reason="SIGTERM")), "colour": "red"}
    assert ev.event_from_dict(values) == ev.StopRequested(reason="SIGTERM")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"schema":1,"event":"StopRequ', "Expecting|Unterminated"),
        ("[1, 2]", "must be an object"),
        ('{"schema":2,"event":"StopRequested"}', "schema=2 is not known"),
        ('{"schema":1,"event":"Nonsense","wall_time":0,"writer":"w","replica":0,"sequence":0}', "'Nonsense' is not an"),
        ('{"schema":1,"event":"StopRequested","wall_time":0,"writer":"w","replica":0,"sequence":0}', "incomplete"),
        ('{"schema":1,"event":"StopRequested","reason":5}', "StopRequested.reason=5 has the wrong type"),
        ('{"schema":1,"event":"StopRequested","reason":"x"}', "stamp of an event is incomplete"),
    ],
)
def test_what_is_no_event_is_refused_with_a_reason(line: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ev.stamped_from_json(line)


def test_a_boolean_is_no_number_and_a_whole_number_is_a_float() -> None:
    values = {"event": "ReplicaWaited", "elapsed_seconds": 3}
    assert ev.event_from_dict(values) == ev.ReplicaWaited(elapsed_seconds=3.0)
    with pytest.raises(ValueError, match="wrong type"):
        ev.event_from_dict({"event": "ReplicaWaited", "elapsed_seconds": True})


def test_memory_events_say_what_the_memory_decided_with_scores_and_sources() -> None:
    recalled = [
        RecallDecision(
            keyframe="shot_01 keyframe 0", shot_index=0, slot=0, frame_index=4, verdict="sink", position=0, why="first"
        ),
        RecallDecision(
            keyframe="shot_02 keyframe 1",
            shot_index=1,
            slot=1,
            frame_index=8,
            verdict="evicted",
            position=None,
            why="w",
        ),
    ]
    chosen = [
        FrameDecision(
            frame_index=2,
            slot=0,
            verdict="duplicate",
            similarity=None,
            bank_similarity=0.95,
            against="shot_01 keyframe 0",
            quality=3.5,
            why="too similar",
        )
    ]
    memory = {
        "recalled": [dataclasses.asdict(d) for d in recalled],
        "decisions": [dataclasses.asdict(d) for d in chosen],
    }
    shown, gone, duplicate = ev.memory_events("ocean", "shot_03", 2, memory)
    assert (shown.verdict, shown.source_shot_index, shown.slot, shown.source_frame_index) == ("recalled", 0, 0, 4)
    assert (gone.verdict, gone.position, gone.why) == ("evicted", None, "w")
    assert (duplicate.source_shot_index, duplicate.source_frame_index) == (2, 2)
    assert (duplicate.bank_similarity, duplicate.against, duplicate.quality) == (0.95, "shot_01 keyframe 0", 3.5)
    assert {event.verdict for event in (shown, gone, duplicate)} <= set(ev.MEMORY_VERDICTS)


class Received:
    def __init__(self) -> None:
        self.events: list[ev.Event] = []

    def notify(self, event: ev.Event) -> None:
        self.events.append(event)


def test_a_timed_stage_reports_its_seconds_twice_and_nothing_when_it_raises() -> None:
    received, totals = Received(), {"decode": 1.0}
    with ev.timed_stage(received, "decode", story_id="a", shot_id="b", totals=totals):
        pass
    started, finished = received.events
    assert started == ev.StageStarted(stage="decode", story_id="a", shot_id="b")
    assert isinstance(finished, ev.StageFinished)
    assert totals["decode"] == pytest.approx(1.0 + finished.elapsed_seconds)
    with pytest.raises(RuntimeError), ev.timed_stage(received, "decode"):
        raise RuntimeError
    assert isinstance(received.events[-1], ev.StageStarted)


def test_json_ready_turns_everything_into_json_types() -> None:
    value = {1: (float("nan"), 2.5, None, True), "path": Path("a/b"), "nested": {"t": [float("inf")]}}
    assert ev.json_ready(value) == {"1": [None, 2.5, None, True], "path": "a/b", "nested": {"t": [None]}}
