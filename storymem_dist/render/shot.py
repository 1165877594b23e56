"""One shot of a story on one replica: recall, condition, denoise, decode, choose keyframes.

A clip that the storyboard gives is read instead of rendered. Every rank of the replica runs this in lock step; what
only the leader computes (keyframe scores) comes through ``leader_decides``. Knows modes, memory and events; nothing of
run folders, queues or how weights are read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from storymem_dist.diffusion.denoise import DenoiseState, PromptEmbeds, StepInfo
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.dispatch.protocol import LeaderDecides, RenderedShot, ShotHistory, ShotJob, ShotStopped
from storymem_dist.errors import ShotError
from storymem_dist.events import (
    NullObserver,
    Observer,
    ThroughputSampled,
    WarningIssued,
    memory_events,
    timed_stage,
)
from storymem_dist.memory.bank import MemoryBank, Recall
from storymem_dist.memory.keyframes import Chosen, choose_keyframes
from storymem_dist.memory.scorers import Quality, Similarity
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.render.clip import ClipRequest, ClipSampler, Stage, no_stage, to_uint8
from storymem_dist.render.given import ClipReader, given_image
from storymem_dist.render.recall import memory_bank, recall
from storymem_dist.story.modes import GIVEN, MI2V, MM2V, NUM_GIVEN_FRAMES
from storymem_dist.story.videos import video_facts

NUM_TAIL_FRAMES = max(NUM_GIVEN_FRAMES.values())
"""Last frames of a clip that are kept: the most that any continuation needs."""


Scorers = Callable[[MemorySettings], tuple[Similarity, Quality]]
"""Returns similarity and quality for memory settings."""


class PromptSource(Protocol):
    """Text embeddings by prompt."""

    def embeds(self, prompt: str, stage: Stage = no_stage) -> Tensor:
        """Return the embedding ``[L <= 512, text_dim]`` of a prompt, on the CPU. Collective over the replica.

        ``stage("text")`` is open while prompts are encoded; nothing is marked where none has to be.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ShotRules:
    """The settings of one part of a batch, and the observer of its events. A shot has its own ``ShotJob.sampler``."""

    sampler: SamplerSettings
    memory: MemorySettings
    observer: Observer = field(default_factory=NullObserver)


class StoryShotRenderer:
    """The ``ShotRenderer`` of a replica (see ``dispatch.protocol``).

    ``rules`` has an entry for every part of the batch. ``scorers`` returns similarity and quality for memory settings;
    only the leader calls it. ``measure`` returns what this process has measured since the last call.
    """

    def __init__(
        self,
        *,
        clips: ClipSampler,
        prompts: PromptSource,
        scorers: Scorers,
        rules: Sequence[ShotRules],
        leader_decides: LeaderDecides,
        measure: Callable[[], ThroughputSampled],
        retries_in_place: bool,
    ) -> None:
        self.retries_in_place = retries_in_place
        self._clips = clips
        self._prompts = prompts
        self._scorers = scorers
        self._rules = rules
        self._leader_decides = leader_decides
        self._measure = measure

    def prepare(self, kind: str) -> None:
        """See ``ShotRenderer.prepare``."""
        self._clips.prepare(kind)

    def render(
        self,
        job: ShotJob,
        history: ShotHistory,
        *,
        resume: DenoiseState | None,
        on_step: Callable[[StepInfo], None],
        should_stop: Callable[[], bool],
        on_checkpoint: Callable[[DenoiseState], None],
        checkpoint_every_steps: int,
        low_memory: bool,
    ) -> RenderedShot:
        """See ``ShotRenderer.render``."""
        rules, seconds = self._rules[job.part], dict[str, float]()
        stage = partial(timed_stage, rules.observer, story_id=job.story_id, shot_id=job.shot_id, totals=seconds)
        if job.kind == GIVEN:
            return self._read_given(job, history, stage, seconds, should_stop)
        prompt = self._embeds(job, stage)
        with stage("recall"):
            bank = memory_bank(job, history)
            shown = recall(bank, job, rules.memory)
            recalled = {"recalled": [asdict(decision) for decision in shown.decisions]}
            _report(rules.observer, job, recalled)
            request = self._request(job, history, shown, prompt)
        try:
            pixels = self._clips.sample(
                request,
                stage=stage,
                resume=resume,
                on_step=on_step,
                should_stop=should_stop,
                checkpoint_every_steps=checkpoint_every_steps,
                on_checkpoint=on_checkpoint,
                low_memory=low_memory,
            )
        finally:
            rules.observer.notify(self._measure())
        loras: dict[str, Any] = {}
        if request.loras:
            used = self._clips.loras_used(job.story_id, job.shot_id, len(request.loras), seconds["loras"])
            rules.observer.notify(used)
            loras = {key: value for key, value in asdict(used).items() if key not in ("story_id", "shot_id")}
        with stage("keyframes"):
            repeated = 0 if job.shot.start_image is not None else NUM_GIVEN_FRAMES[job.mode]
            clip = to_uint8(pixels).permute(1, 0, 2, 3)[repeated:].cpu()
            chosen = self._leader_decides(lambda: self._choose(clip, bank, job))
        return replace(_finished(clip, chosen, recalled, job, rules.observer, seconds), loras=loras)

    def _read_given(
        self,
        job: ShotJob,
        history: ShotHistory,
        stage: Stage,
        seconds: Mapping[str, float],
        should_stop: Callable[[], bool],
    ) -> RenderedShot:
        """Read the clip that the storyboard gives. Only the leader, which saves it, has its frames."""
        path, observer = job.shot.video, self._rules[job.part].observer
        assert path is not None, "a given shot has a clip"
        reader = ClipReader(path, job.sampler)
        with stage("decode"):
            while not self._leader_decides(reader.read_part):
                if should_stop():
                    raise ShotStopped
        with stage("keyframes"):
            clip, bank = reader.clip, memory_bank(job, history)
            chosen = self._leader_decides(lambda: self._choose(clip, bank, job))
        facts = video_facts(path)
        for what in reader.notes:
            if what not in facts.notes:  # those were said when the storyboard was read
                message = f"{job.story_id}, {job.shot_id}: the clip {path}: {what}"
                observer.notify(WarningIssued(message=message, source="storyboard"))
        finished = _finished(clip, chosen, {"recalled": []}, job, observer, seconds)
        return replace(finished, given=asdict(facts) | {"notes": list(dict.fromkeys([*facts.notes, *reader.notes]))})

    def _embeds(self, job: ShotJob, stage: Stage) -> PromptEmbeds:
        sampler = job.sampler
        return PromptEmbeds(
            prompt_LE=self._prompts.embeds(job.shot.prompt, stage),
            negative_LE=self._prompts.embeds(sampler.negative_prompt, stage) if sampler.needs_negative_prompt else None,
        )

    def _request(self, job: ShotJob, history: ShotHistory, recall: Recall, prompt: PromptEmbeds) -> ClipRequest:
        num_given = NUM_GIVEN_FRAMES[job.mode]
        given = None
        if job.shot.start_image is not None:
            given = given_image(job.shot.start_image, job.sampler)[None]
        elif num_given:
            if history.tail is None or len(history.tail) < num_given:
                found = 0 if history.tail is None else len(history.tail)
                raise ShotError(
                    f"{job.mode} continues the shot before it from its last {num_given} frames, but that clip has only "
                    f"{found}; use more frames (sampler.num_frames) or sampler.continuation=none"
                )
            given = history.tail[-num_given:]
        return ClipRequest(
            mode=job.mode,
            prompt=prompt,
            seed=job.seed,
            sampler=job.sampler,
            memory_images=[keyframe.image for keyframe in recall.keyframes],
            first_frame=given[0] if given is not None and job.mode == MI2V else None,
            motion_frames=given if job.mode == MM2V else None,
            fingerprint=job.fingerprint,
            loras=job.shot.options.loras or (),
            lora_key=job.lora_key,
        )

    def _choose(self, clip_FCHW: Tensor, bank: MemoryBank, job: ShotJob) -> Chosen:
        memory = self._rules[job.part].memory
        if not job.shot.remember:
            return Chosen(kept=(), decisions=(), threshold=memory.similarity_threshold)
        similarity, quality = self._scorers(memory)
        return choose_keyframes(
            clip_FCHW, bank, similarity, quality, memory, shot_index=job.index, keeps_first=job.needs.keeps_first
        )


def _finished(
    clip_FCHW: Tensor,
    chosen: Chosen,
    recalled: Mapping[str, Any],
    job: ShotJob,
    observer: Observer,
    seconds: Mapping[str, float],
) -> RenderedShot:
    decisions = {"decisions": [asdict(decision) for decision in chosen.decisions]}
    _report(observer, job, decisions)
    memory = {**recalled, **decisions, "threshold": chosen.threshold}
    if not job.shot.remember:
        memory["remember"] = False
    return RenderedShot(
        clip=clip_FCHW,
        keyframes=chosen.kept,
        tail=clip_FCHW[-NUM_TAIL_FRAMES:].clone(),
        memory=memory,
        stage_seconds=seconds,
    )


def negative_prompts(rules: Sequence[ShotRules]) -> list[str]:
    """Return the negative prompts that guidance needs, each once."""
    return list(dict.fromkeys(one.sampler.negative_prompt for one in rules if one.sampler.needs_negative_prompt))


def _report(observer: Observer, job: ShotJob, memory: Mapping[str, Any]) -> None:
    for event in memory_events(job.story_id, job.shot_id, job.index, memory):
        observer.notify(event)
