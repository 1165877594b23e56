"""One shot of a story on one replica: recall, condition, denoise, decode, choose keyframes.

Every rank of the replica runs this in lock step; what only the leader computes (keyframe scores) comes through
``leader_decides``. Knows modes, memory and events; nothing of run folders, queues or how weights are read.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from storymem_dist.diffusion.conditioning import cover_crop
from storymem_dist.diffusion.denoise import DenoiseState, PromptEmbeds, StepInfo
from storymem_dist.diffusion.settings import NUM_GIVEN_FRAMES, SamplerSettings
from storymem_dist.dispatch.jobs import LeaderDecides, RenderedShot, ShotHistory, ShotJob
from storymem_dist.errors import ShotFailed
from storymem_dist.memory.bank import Keyframe, MemoryBank, Recall, reference_keyframes
from storymem_dist.memory.keyframes import Chosen, choose_keyframes
from storymem_dist.memory.scorers import Quality, Similarity
from storymem_dist.memory.settings import MemorySettings
from storymem_dist.observe.events import Observer, StageFinished, StageStarted, memory_events
from storymem_dist.render_clip import ClipRequest, ClipSampler, to_uint8
from storymem_dist.story.images import open_reference_image
from storymem_dist.story.schema import Story

NUM_TAIL_FRAMES = max(NUM_GIVEN_FRAMES.values())
"""Last frames of a clip that are kept for whatever continuation may follow."""


class PromptSource(Protocol):
    """Text embeddings by prompt."""

    def encode(self, prompts: Sequence[str]) -> None:
        """Make the embeddings of ``prompts`` available. Collective over all started ranks."""
        ...

    def embeds(self, prompt: str) -> Tensor:
        """The embedding ``[L <= 512, text_dim]`` of an encoded prompt, on the CPU."""
        ...


class StoryShotRenderer:
    """The ``ShotRenderer`` of a replica (see ``dispatch.jobs``).

    ``make_scorers`` builds similarity and quality; it is called once, on the leader, before the first selection.
    """

    def __init__(
        self,
        *,
        clips: ClipSampler,
        prompts: PromptSource,
        make_scorers: Callable[[], tuple[Similarity, Quality]],
        sampler: SamplerSettings,
        memory: MemorySettings,
        leader_decides: LeaderDecides,
        observer: Observer,
        retries_in_place: bool,
    ) -> None:
        self.retries_in_place = retries_in_place
        self._clips = clips
        self._prompts = prompts
        self._make_scorers = make_scorers
        self._scorers: tuple[Similarity, Quality] | None = None
        self._sampler = sampler
        self._memory = memory
        self._leader_decides = leader_decides
        self._observer = observer

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        """See ``ShotRenderer.encode_prompts``; the negative prompt is added where guidance needs it."""
        negative = [self._sampler.negative_prompt] if self._sampler.needs_negative_prompt else []
        with self._stage("text"):
            self._prompts.encode([*prompts, *negative])

    def prepare(self, kind: str) -> None:
        """See ``ShotRenderer.prepare``."""
        if kind != self._clips.kind:
            with self._stage("load"):
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
        seconds: dict[str, float] = {}

        def stage(name: str):  # type: ignore[no-untyped-def]
            return self._stage(name, job, seconds)

        with stage("recall"):
            bank, recall = self._recall(job, history)
            request = self._request(job, history, recall)
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
        with stage("keyframes"):
            clip = to_uint8(pixels).permute(1, 0, 2, 3)[NUM_GIVEN_FRAMES[job.mode] :].cpu()
            chosen = self._leader_decides(lambda: self._choose(clip, bank, job.shot.index))
            memory = {
                "recalled": [asdict(decision) for decision in recall.decisions],
                "decisions": [asdict(decision) for decision in chosen.decisions],
                "threshold": chosen.threshold,
            }
            self._report(job, {"decisions": memory["decisions"]})
        return RenderedShot(
            clip=clip,
            keyframes=chosen.kept,
            tail=clip[-NUM_TAIL_FRAMES:].clone(),
            memory=memory,
            stage_seconds=seconds,
        )

    def _recall(self, job: ShotJob, history: ShotHistory) -> tuple[MemoryBank, Recall]:
        """The whole bank, and what the shot is shown of it. A T2V shot is shown nothing."""
        bank = MemoryBank((*self._references(job.story), *history.keyframes))
        recall = bank.recall(self._memory) if job.kind == "m2v" else Recall(keyframes=(), decisions=())
        self._report(job, {"recalled": [asdict(decision) for decision in recall.decisions]})
        return bank, recall

    def _references(self, story: Story) -> tuple[Keyframe, ...]:
        """The story's reference images at the clip's size. Raises ``StoryboardError`` when one cannot be read."""
        images = []
        for path in story.reference_images:
            pixels = np.array(open_reference_image(path))
            image_CHW = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
            images.append(cover_crop(image_CHW, self._sampler.height, self._sampler.width))
        return reference_keyframes(images)

    def _request(self, job: ShotJob, history: ShotHistory, recall: Recall) -> ClipRequest:
        needs_negative = self._sampler.needs_negative_prompt
        num_given = NUM_GIVEN_FRAMES[job.mode]
        given = None
        if num_given:
            if history.tail is None or len(history.tail) < num_given:
                found = 0 if history.tail is None else len(history.tail)
                raise ShotFailed(
                    f"{job.mode} continues the shot before it from its last {num_given} frames, but that clip left "
                    f"{found}; use more frames (sampler.num_frames) or sampler.continuation=none"
                )
            given = history.tail[-num_given:]
        return ClipRequest(
            mode=job.mode,
            prompt=PromptEmbeds(
                prompt_LE=self._prompts.embeds(job.shot.prompt),
                negative_LE=self._prompts.embeds(self._sampler.negative_prompt) if needs_negative else None,
            ),
            seed=job.seed,
            sampler=self._sampler,
            memory_images=[keyframe.image for keyframe in recall.keyframes],
            first_frame=given[0] if given is not None and job.mode == "mi2v" else None,
            motion_frames=given if job.mode == "mm2v" else None,
            fingerprint=job.fingerprint,
        )

    def _choose(self, clip_FCHW: Tensor, bank: MemoryBank, shot_index: int) -> Chosen:
        if self._scorers is None:
            self._scorers = self._make_scorers()
        similarity, quality = self._scorers
        return choose_keyframes(clip_FCHW, bank, similarity, quality, self._memory, shot_index=shot_index)

    def _report(self, job: ShotJob, memory: Mapping[str, Any]) -> None:
        for event in memory_events(job.story.story_id, job.shot.shot_id, job.shot.index, memory):
            self._observer.notify(event)

    @contextmanager
    def _stage(self, name: str, job: ShotJob | None = None, seconds: dict[str, float] | None = None) -> Iterator[None]:
        """Report a stage and note its length; a stage that fails is not reported as finished."""
        story_id, shot_id = (job.story.story_id, job.shot.shot_id) if job is not None else (None, None)
        self._observer.notify(StageStarted(stage=name, story_id=story_id, shot_id=shot_id))
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        if seconds is not None:
            seconds[name] = seconds.get(name, 0.0) + elapsed
        self._observer.notify(StageFinished(stage=name, elapsed_seconds=elapsed, story_id=story_id, shot_id=shot_id))
