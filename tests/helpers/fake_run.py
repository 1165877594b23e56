"""A run folder as a render leaves it, in a second and without models: real events, records, clips and keyframes.

``FakeRun`` plays the part of a job's replicas one shot at a time, with made-up pixels and times but through the same
writers as a render. Times are wall times of the past, so that reports of it always look the same.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import storymem_dist.events as ev
from storymem_dist.artifacts.fingerprint import fingerprint
from storymem_dist.artifacts.records import ShotRecord, StoredKeyframe
from storymem_dist.artifacts.run_folder import RunFolder
from storymem_dist.artifacts.shot_folder import ClipFiles, keyframe_name, new_attempt_id, tail_name
from storymem_dist.artifacts.video import VideoSettings, concat_clips
from storymem_dist.files import quick_digest
from storymem_dist.memory.bank import Keyframe, MemoryBank
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.observe.journal import JournalWriter
from storymem_dist.observe.observers import BackEnd, Observers
from storymem_dist.story.schema import Shot, Story
from tests.helpers.fake_story import FPS, HEIGHT, NUM_FRAMES, WIDTH, choose, draw_clip, make_story

START_TIME = 1_760_000_000.0
NUM_STEPS = 4


@dataclass
class Clock:
    """The wall time that events are stamped with."""

    now: float = START_TIME

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class FakeReplica:
    """One start of one replica: its observers and its own clock."""

    number: int
    observers: Observers
    clock: Clock
    writer: str
    rendered: int = 0
    failed: int = 0


@dataclass
class FakeRun:
    """A run folder with ``num_stories`` stories of ``num_shots`` shots each."""

    root: Path
    num_stories: int = 3
    num_shots: int = 4
    job: str = "local"
    max_keyframes: int = 4
    reused_steps: tuple[int, ...] = ()
    folder: RunFolder = field(init=False)
    stories: list[Story] = field(init=False)
    banks: dict[str, MemoryBank] = field(default_factory=dict)
    predecessors: dict[str, str | None] = field(default_factory=dict)
    _starts: int = 0

    def __post_init__(self) -> None:
        self.folder = RunFolder(self.root)
        self.run_id = self.folder.open()
        config = {"model": {"dtype": "float32"}, "sampler": {"num_inference_steps": 4}}
        self.folder.write_config("c0ffee", json.dumps(config, indent=2))
        self.stories = [make_story(number, self.num_shots) for number in range(self.num_stories)]
        for story in self.stories:
            self.folder.write_storyboard(story)
            self.banks[story.story_id] = MemoryBank()
            self.predecessors[story.story_id] = None

    @contextlib.contextmanager
    def replica(
        self, number: int = 0, *, num_replicas: int = 1, back_ends: Sequence[BackEnd] = (), at: float = START_TIME
    ) -> Iterator[FakeReplica]:
        """Start a replica; leaving the block without ``finish`` is what a killed process looks like."""
        self._starts += 1
        clock = Clock(at)
        writer = f"start{self._starts:02d}-r{number}"
        journal = JournalWriter(self.folder.events_folder, writer)
        observers = Observers(back_ends, journal=journal, writer=writer, replica=number, clock=lambda: clock.now)
        observers.notify(
            ev.JobStarted(
                run_id=self.run_id,
                job=self.job,
                config_hash="c0ffee",
                num_stories=self.num_stories,
                num_shots=self.num_stories * self.num_shots,
                num_replicas=num_replicas,
                num_devices=1,
                device="cpu",
                layout="1x1x1",
                host="node1",
                peak_tflops=1.0,
                versions={"torch": "2.13.0", "storymem_dist": "0.1.0"},
            )
        )
        for story in self.stories:
            observers.notify(ev.StoryStarted(story_id=story.story_id, name=story.name, num_shots=len(story.shots)))
        yield FakeReplica(number=number, observers=observers, clock=clock, writer=writer)
        observers.close()

    def load_weights(self, replica: FakeReplica, what: str = "t2v high_noise") -> None:
        """A few progress events of 28.6 GB at 1.9 GB/s."""
        total = 28_600_000_000
        replica.observers.notify(ev.StageStarted(stage="load"))
        for part in range(1, 5):
            replica.clock.pass_(total / 4 / 1.9e9)
            replica.observers.notify(
                ev.WeightsProgress(
                    what=what, bytes_done=total * part // 4, bytes_total=total, elapsed_seconds=total * part / 4 / 1.9e9
                )
            )
        replica.observers.notify(ev.StageFinished(stage="load", elapsed_seconds=total / 1.9e9))

    def wait(self, replica: FakeReplica, seconds: float) -> None:
        replica.clock.pass_(seconds)
        replica.observers.notify(ev.ReplicaWaited(elapsed_seconds=seconds))

    def skip(self, replica: FakeReplica, story_number: int, shot_number: int) -> None:
        story = self.stories[story_number]
        replica.observers.notify(ev.ShotSkipped(story_id=story.story_id, shot_id=story.shots[shot_number].shot_id))

    def shot(
        self,
        replica: FakeReplica,
        story_number: int,
        shot_number: int,
        *,
        fail: str = "",
        stop_after_step: int | None = None,
        resume_at: int = 0,
    ) -> None:
        """Render one shot; or let it fail while denoising, or break off after a step without another word."""
        story = self.stories[story_number]
        shot, notify = story.shots[shot_number], replica.observers.notify
        names: dict[str, Any] = {"story_id": story.story_id, "shot_id": shot.shot_id}
        bank = self.banks[story.story_id]
        recall = bank.recall(MemorySettings(max_keyframes=self.max_keyframes, num_fixed=1, similarity="hsv"))
        mode = "t2v" if shot_number == 0 else ("m2v" if shot.cut else "mi2v")
        shot_fingerprint = fingerprint({"prompt": shot.prompt, "mode": mode}, self.predecessors[story.story_id])
        attempt_id = new_attempt_id(shot_fingerprint, f"r{replica.number}")
        notify(
            ev.ShotStarted(
                **names,
                shot_index=shot.index,
                mode=mode,
                seed=shot.index_in_scene,
                attempt_id=attempt_id,
                prompt=shot.prompt,
                num_memory=len(recall.keyframes),
                num_steps=NUM_STEPS,
                num_frames=NUM_FRAMES,
                height=HEIGHT,
                width=WIDTH,
                num_tokens=1560,
                tflop_per_step=0.4,
            )
        )
        if resume_at:
            notify(ev.ShotResumed(**names, step=resume_at, num_steps=NUM_STEPS))
        seconds: dict[str, float] = {}
        self._stage(replica, "condition", 0.4, seconds, **names)
        notify(ev.StageStarted(stage="denoise", **names))
        for step in range(resume_at + 1, NUM_STEPS + 1):
            took = 1.5 + 0.2 * len(recall.keyframes)
            replica.clock.pass_(took)
            notify(
                ev.StepFinished(
                    **names,
                    step=step,
                    num_steps=NUM_STEPS,
                    expert="high_noise" if step <= 2 else "low_noise",
                    elapsed_seconds=took,
                    timestep=1000 - 200 * step,
                    gpu_memory_gib=28.1,
                    reused=step in self.reused_steps,
                )
            )
            if step == stop_after_step:
                return
            if fail:
                replica.failed += 1
                notify(ev.ShotFailed(**names, reason=fail, error_type="ShotFailed", stage="denoise"))
                return
        seconds["denoise"] = (NUM_STEPS - resume_at) * took
        notify(ev.StageFinished(stage="denoise", elapsed_seconds=seconds["denoise"], **names))
        self._stage(replica, "decode", 1.1, seconds, **names)
        keyframes, decisions = choose(shot.index, len(bank), story_number)
        self._stage(replica, "keyframes", 0.3, seconds, **names)
        memory: dict[str, object] = {
            "recalled": [asdict(d) for d in recall.decisions],
            "decisions": [asdict(d) for d in decisions],
        }
        for event in ev.memory_events(story.story_id, shot.shot_id, shot.index, memory):
            notify(event)
        record = self._commit(story, shot, shot_fingerprint, attempt_id, mode, keyframes, memory, seconds, replica)
        self._stage(replica, "save", 0.2, seconds, **names)
        folder = f"stories/{story.story_id}/{shot.shot_id}/attempts/{attempt_id}"
        replica.rendered += 1
        notify(
            ev.ShotFinished(
                **names,
                attempt_id=attempt_id,
                fingerprint=shot_fingerprint,
                clip=f"{folder}/clip.mp4",
                keyframes=tuple(f"{folder}/{keyframe.file}" for keyframe in record.keyframes),
                num_frames=NUM_FRAMES,
                fps=FPS,
                elapsed_seconds=sum(seconds.values()),
                stage_seconds=seconds,
            )
        )
        self.banks[story.story_id] = bank.add(keyframes)
        self.predecessors[story.story_id] = shot_fingerprint

    def finish_story(self, replica: FakeReplica, story_number: int) -> None:
        """Join the clips of a story."""
        story = self.stories[story_number]
        folder = self.folder.story_folder(story.story_id)
        concat_clips([folder / f"{shot.shot_id}.mp4" for shot in story.shots], self.folder.story_video(story.story_id))
        replica.observers.notify(
            ev.StoryFinished(
                story_id=story.story_id, video=f"stories/{story.story_id}/story.mp4", num_shots=len(story.shots)
            )
        )

    def finish(self, replica: FakeReplica, outcome: str = "finished") -> None:
        replica.observers.notify(
            ev.JobFinished(outcome=outcome, num_rendered=replica.rendered, num_failed=replica.failed)
        )

    def _stage(
        self, replica: FakeReplica, stage: str, took: float, seconds: dict[str, float], *, story_id: str, shot_id: str
    ) -> None:
        replica.observers.notify(ev.StageStarted(stage=stage, story_id=story_id, shot_id=shot_id))
        replica.clock.pass_(took)
        seconds[stage] = took
        replica.observers.notify(
            ev.StageFinished(stage=stage, elapsed_seconds=took, story_id=story_id, shot_id=shot_id)
        )

    def _commit(
        self,
        story: Story,
        shot: Shot,
        shot_fingerprint: str,
        attempt_id: str,
        mode: str,
        keyframes: Sequence[Keyframe],
        memory: dict[str, object],
        seconds: dict[str, float],
        replica: FakeReplica,
    ) -> ShotRecord:
        place = self.folder.shot(story.story_id, shot.shot_id)
        clip = draw_clip(self.stories.index(story), shot.index)
        files = place.save_attempt(
            attempt_id,
            ClipFiles(
                clip=clip, keyframes=[(k.slot, k.frame_index, k.image) for k in keyframes], tail=clip[-2:], fps=FPS
            ),
            VideoSettings(preset="ultrafast"),
        )
        record = ShotRecord(
            story_id=story.story_id,
            shot_id=shot.shot_id,
            shot_index=shot.index,
            scene_num=shot.scene_num,
            index_in_scene=shot.index_in_scene,
            prompt=shot.prompt,
            cut=shot.cut,
            kind="t2v" if mode == "t2v" else "m2v",
            mode=mode,
            seed=shot.index_in_scene,
            num_frames=NUM_FRAMES,
            height=HEIGHT,
            width=WIDTH,
            fps=FPS,
            clip="clip.mp4",
            clip_sample=quick_digest(place.attempt_folder(attempt_id) / "clip.mp4"),
            keyframes=tuple(
                StoredKeyframe(slot=k.slot, frame_index=k.frame_index, file=keyframe_name(k.slot)) for k in keyframes
            ),
            tail=(tail_name(0), tail_name(1)),
            memory=memory,
            inputs={"prompt": shot.prompt, "mode": mode},
            fingerprint=shot_fingerprint,
            predecessor=self.predecessors[story.story_id],
            config_hash="c0ffee",
            files=files,
            timing={"stage_seconds": seconds, "committed_at": replica.clock.now},
            host={"attempt_id": attempt_id, "hostname": "node1", "versions": {"torch": "2.13.0"}},
        )
        assert place.publish(record, may_publish=lambda: True)
        place.repair_views(record)
        return record


def restarted_run(root: Path) -> tuple[FakeRun, FakeReplica]:
    """Two shots by a replica that was killed inside the second one, and what took its place 500 s later."""
    run = FakeRun(root, num_stories=1, num_shots=2)
    with run.replica(0) as first:
        run.shot(first, 0, 0)
        run.shot(first, 0, 1, stop_after_step=2)
    with run.replica(0, at=START_TIME + 500) as second:
        run.skip(second, 0, 0)
        run.shot(second, 0, 1, resume_at=2)
        run.finish(second)
    return run, second


def whole_run(
    root: Path,
    *,
    num_stories: int = 3,
    num_shots: int = 4,
    num_replicas: int = 2,
    max_keyframes: int = 4,
    reused_steps: tuple[int, ...] = (),
) -> FakeRun:
    """A batch that is complete: stories handed to replicas in turn, one wait, weights loaded by each."""
    run = FakeRun(
        root,
        num_stories=num_stories,
        num_shots=num_shots,
        max_keyframes=max_keyframes,
        reused_steps=reused_steps,
    )
    for number in range(num_replicas):
        with run.replica(number, num_replicas=num_replicas) as replica:
            run.load_weights(replica)
            for story_number in range(number, num_stories, num_replicas):
                for shot_number in range(num_shots):
                    run.shot(replica, story_number, shot_number)
                run.finish_story(replica, story_number)
            run.wait(replica, 3.0)
            run.finish(replica)
    return run
