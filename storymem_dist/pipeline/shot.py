"""One shot of a story with a memory value: rendered, remembered, and continued where it was interrupted."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from storymem_dist.diffusion.conditioning import cover_crop
from storymem_dist.diffusion.denoise import DenoiseState, DenoiseStopped, PromptEmbeds
from storymem_dist.diffusion.seeds import shot_seed
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.errors import ConfigError, ShotError, require_whole
from storymem_dist.files import canonical_json
from storymem_dist.memory.bank import MemoryBank
from storymem_dist.parallel.clip_memory import check_clip_memory
from storymem_dist.pipeline.clips import Loras
from storymem_dist.pipeline.images import FramesLike, frames_to_images, to_frames
from storymem_dist.pipeline.memory import StoryMemory, images_of
from storymem_dist.pipeline.models import StoryModels
from storymem_dist.pipeline.stopping import StopAsker
from storymem_dist.render.build import LoadProgress
from storymem_dist.render.clip import ClipRequest, to_uint8
from storymem_dist.story.modes import KIND_OF_MODE, M2V, MI2V, MM2V, NUM_GIVEN_FRAMES, T2V
from storymem_dist.story.problems import bad_character
from storymem_dist.story.schema import Shot, Story
from storymem_dist.weights.lora import lora_inputs, lora_key, shot_loras

MODES = (T2V, M2V, MI2V, MM2V)
MAX_SEED = 2**64 - 1

_SETTING = re.compile(r"\bsampler\.(\w+)")
_ARGUMENTS = {
    "num_inference_steps": "steps",
    "guidance_scale_low": "cfg_scale",
    "guidance_scale_high": "cfg_scale",
}
"""What arguments of a shot are called as settings."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShotOutput:
    """A rendered shot.

    ``frames`` are uint8 ``[F, H, W, 3]`` on the CPU, without the given frames that repeat the shot before.
    ``last_frame`` is uint8 ``[1, H, W, 3]``. ``memory`` is the memory with this shot's ``keyframes`` (uint8
    ``[N, H, W, 3]``), and ``decisions`` say why these. ``warnings`` are sentences about what was not used.
    """

    frames: Tensor
    memory: StoryMemory
    keyframes: Tensor
    decisions: tuple[dict[str, Any], ...]
    mode: str
    seed: int
    fps: int
    warnings: tuple[str, ...] = ()

    @property
    def last_frame(self) -> Tensor:
        """The last frame, uint8 ``[1, H, W, 3]``: the ``first_frame`` of a shot that continues this one."""
        return self.frames[-1:]

    def images(self) -> Tensor:
        """The frames as ComfyUI's IMAGE: float32 in [0, 1], four times as large. A new tensor at each call."""
        return frames_to_images(self.frames)


def story_seed(seed: int, index: int, index_in_scene: int | None = None, rule: str = "index_in_scene") -> int:
    """The seed that ``storymem-render`` gives the shot at position ``index`` (from 0) of a story with this ``seed``.

    ``index_in_scene``: its position in its scene, None where the story has one scene. ``rule``: ``sampler.seed_rule``.
    """
    in_scene = index if index_in_scene is None else index_in_scene
    shot = Shot(index=index, index_in_scene=in_scene, scene_num=1, prompt="", cut=True)
    return shot_seed(seed, shot, Story(story_id="", name="", overview="", scenes=()), rule)


def check_shot(
    *,
    mode: str,
    continuation: str | None = None,
    num_frames: int | None = None,
    width: int | None = None,
    height: int | None = None,
    steps: int | None = None,
    cfg_scale: float | tuple[float, float] | None = None,
    seed: int | None = None,
    num_motion_frames: int | None = None,
) -> None:
    """Raise ``ConfigError`` for what ``render_shot`` would refuse; loads nothing. None: not known yet.

    ``continuation`` is that of the models: a shot that continues another needs its LoRA.
    """
    mode = _mode(mode)
    repeats = mode if mode in (MI2V, MM2V) else continuation or MI2V
    _shot_sampler(SamplerSettings(continuation=repeats), num_frames, width, height, steps, cfg_scale, None)
    if seed is not None:
        require_whole("seed", seed, 0, MAX_SEED)
    if continuation is not None and mode in (MI2V, MM2V) and mode != continuation:
        raise ConfigError(
            f"mode {mode.upper()} needs the LoRA {mode.upper()}, and the models have {continuation.upper()}; load them "
            f"with {mode.upper()}, or use M2V or {continuation.upper()}"
        )
    needed = NUM_GIVEN_FRAMES[MM2V]
    if mode == MM2V and num_motion_frames is not None and num_motion_frames < needed:
        raise ConfigError(f"motion_frames has {num_motion_frames} frames; MM2V takes the last {needed} of a clip")


def render_shot(
    models: StoryModels,
    prompt: str,
    *,
    memory: StoryMemory | None = None,
    mode: str = T2V,
    num_frames: int | None = None,
    width: int | None = None,
    height: int | None = None,
    steps: int | None = None,
    cfg_scale: float | tuple[float, float] | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    first_frame: FramesLike | None = None,
    motion_frames: FramesLike | None = None,
    is_cut: bool = False,
    is_continuation: bool = True,
    extract_count: int | None = None,
    similarity_threshold: float | None = None,
    loras: Loras = (),
    on_step: Callable[[int, int], None] = lambda step, num_steps: None,
    should_stop: Callable[[], object] = lambda: False,
    on_load: LoadProgress | None = None,
) -> ShotOutput:
    """Render one shot and remember it; the pixels are those of ``storymem-render`` with the same inputs.

    Args:
        models: of ``open_models``; loaded now if they are not.
        prompt: what is seen.
        memory: what the shot is shown, and what its keyframes are added to; None: an empty one of the models' limits.
        mode: ``t2v`` (text alone), ``m2v`` (text and memory: a cut; with references also the first shot), ``mi2v``
            (continues from ``first_frame``; with an empty memory image-to-video) or ``mm2v`` (from ``motion_frames``).
        num_frames: 4n+1. ``width`` and ``height`` are multiples of 16; ``cfg_scale`` is one guidance scale, or a pair:
            for the low-noise and the high-noise expert. None: those of the models' settings, and so for the next ones.
        seed: of the noise; ``story_seed`` says which one a story's shot has.
        first_frame: the last one of these frames; scaled and cut to the clip.
        motion_frames: the last five of these frames.
        is_cut: True renders ``mi2v`` and ``mm2v`` as ``m2v``: the memory is used, the given frames are not.
        is_continuation: the given frames repeat the shot before and are not part of the result. False keeps them.
        extract_count: most keyframes of this shot. ``similarity_threshold``: see ``StoryMemory.remember``.
        loras: for this shot alone: paths, or mappings with the keys of ``LoraSettings``.
        on_step: called after every step with its number, from 1, and the number of steps.
        should_stop: called before every step; a true value, or an exception, stops the shot.
        on_load: called while weights load: what, bytes done, bytes in total.

    Raises:
        Interrupted: ``should_stop`` returned a true value; its own exception comes instead of this. Nothing is lost
            in either case: the same call continues at that step.
        ConfigError: a value is not allowed. WeightsNotFound, CheckpointError: the models cannot be loaded.
        ShotError: the shot cannot be rendered.
    """
    mode, limits = _mode(mode), models.memory_settings
    memory = StoryMemory(limits.max_keyframes, limits.num_fixed) if memory is None else memory
    _check_prompt(prompt)
    if is_cut and mode in (MI2V, MM2V):
        mode = M2V
    check_shot(mode=mode, continuation=models.continuation, seed=seed)
    sampler = _shot_sampler(models.sampler, num_frames, width, height, steps, cfg_scale, negative_prompt)
    if KIND_OF_MODE[mode] not in models.weights.checkpoints:
        raise ConfigError(f"mode {mode.upper()} needs the {KIND_OF_MODE[mode].upper()} model, which was not opened")
    frames = _given_frames(mode, first_frame, motion_frames)
    rules = memory.rules(memory.selection or models.memory_settings, extract_count, similarity_threshold)
    check_clip_fits(models, sampler)
    asker = StopAsker(should_stop)
    asker.check("stopped before the first step")
    with models.rendering():
        given = None if frames is None else torch.stack([_fitted(frame, sampler) for frame in frames])
        request = ClipRequest(
            mode=mode,
            prompt=PromptEmbeds(prompt_LE=torch.empty(0), negative_LE=None),
            seed=seed,
            sampler=sampler,
            memory_images=[] if mode == T2V else _shown(memory, sampler),
            first_frame=given[0] if given is not None and mode == MI2V else None,
            motion_frames=given if mode == MM2V else None,
            loras=[asdict(one) for one in shot_loras(loras)],
            lora_key=lora_key(lora_inputs(loras)),
        )
        request = replace(request, fingerprint=_fingerprint(request, models, prompt))
        models.scorers(rules)  # what is missing is said before the work
        try:
            pixels = _sample(models, request, prompt, asker, on_step, on_load)
        except DenoiseStopped as stopped:
            models.stopped = _on_host(stopped.state)
        else:
            models.stopped = None
            repeated = NUM_GIVEN_FRAMES[mode] if is_continuation else 0
            clip = to_uint8(pixels).permute(1, 0, 2, 3)[repeated:].cpu()
            del pixels
            remembered = memory.remember_clip(clip, rules, models.scorers)
    if (state := models.stopped) is not None:
        asker.check(f"stopped after {state.step} of {state.num_steps} steps; the same shot continues there")
    new = remembered.memory
    return ShotOutput(
        frames=clip.permute(0, 2, 3, 1).contiguous(),
        memory=replace(new, selection=new.selection or models.memory_settings),
        keyframes=remembered.keyframes,
        decisions=remembered.decisions,
        mode=mode,
        seed=seed,
        fps=sampler.fps,
        warnings=tuple(models.warnings_of(prompt)),
    )


def _sample(
    models: StoryModels,
    request: ClipRequest,
    prompt: str,
    asker: StopAsker,
    on_step: Callable[[int, int], None],
    on_load: LoadProgress | None,
) -> Tensor:
    """The clip, float32 ``[3, F, H, W]``. A shot that runs out of memory is repeated once with less."""
    loras, kind = models.opened_loras(), KIND_OF_MODE[request.mode]
    if request.loras:
        loras.open(kind, request.loras, request.lora_key)
    engine = models.engine_for(request.sampler, loras, on_load)
    sampler = request.sampler
    embeds = PromptEmbeds(
        prompt_LE=models.embeds(engine, prompt),
        negative_LE=models.embeds(engine, sampler.negative_prompt) if sampler.needs_negative_prompt else None,
    )
    resume = models.stopped if _is_of(models.stopped, request) else None
    for low_memory in (False, True):
        try:
            return engine.clips.sample(
                replace(request, prompt=embeds),
                resume=resume,
                on_step=lambda info: on_step(info.step, info.num_steps),
                should_stop=asker.should_stop,
                low_memory=low_memory,
            )
        except torch.OutOfMemoryError as error:
            if low_memory:
                reason = str(error).splitlines()[0]
                raise ShotError(f"{reason}; use fewer frames, a smaller picture, or a smaller memory") from None
    raise AssertionError("the second attempt returns or raises")


def _is_of(stopped: DenoiseState | None, request: ClipRequest) -> bool:
    return stopped is not None and stopped.fingerprint == request.fingerprint


def _on_host(state: DenoiseState) -> DenoiseState:
    """The same state, which takes no memory of the device while it waits."""
    kept = {name: value.cpu() for name, value in state.solver_state.items()}
    return replace(state, latents=state.latents.cpu(), solver_state=kept)


def _check_prompt(prompt: object) -> None:
    if not isinstance(prompt, str):
        raise ConfigError(f"prompt is a {type(prompt).__name__}; allowed: text")
    if (character := bad_character(prompt)) is not None:
        raise ConfigError(f"the prompt holds the control character U+{ord(character):04X}; allowed: printable text")


def _mode(mode: str) -> str:
    if not isinstance(mode, str) or mode.lower() not in MODES:
        raise ConfigError(f"mode={mode!r} is not allowed; use {', '.join(MODES[:-1])} or {MODES[-1]}")
    return mode.lower()


def _shot_sampler(
    settings: SamplerSettings,
    num_frames: int | None,
    width: int | None,
    height: int | None,
    steps: int | None,
    cfg_scale: float | tuple[float, float] | None,
    negative_prompt: str | None,
) -> SamplerSettings:
    low, high = cfg_scale if isinstance(cfg_scale, tuple | list) and len(cfg_scale) == 2 else (cfg_scale, cfg_scale)
    given: dict[str, Any] = {
        "num_frames": num_frames,
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "guidance_scale_low": low,
        "guidance_scale_high": high,
        "negative_prompt": negative_prompt,
    }
    try:
        return replace(settings, **{key: value for key, value in given.items() if value is not None})
    except ConfigError as error:
        raise ConfigError(_SETTING.sub(lambda found: _ARGUMENTS.get(found[1], found[1]), str(error))) from None


def _given_frames(mode: str, first_frame: FramesLike | None, motion_frames: FramesLike | None) -> Tensor | None:
    """The frames with which the clip begins, uint8 ``[n, H, W, 3]``; None where there are none."""
    needed = NUM_GIVEN_FRAMES[mode]
    name, given = ("first_frame", first_frame) if mode == MI2V else ("motion_frames", motion_frames)
    if not needed:
        return None
    if given is None:
        raise ConfigError(f"mode {mode.upper()} needs {name}; give it, or set is_cut for a shot that continues none")
    frames = to_frames(given)
    check_shot(mode=mode, num_motion_frames=len(frames))
    return frames[-needed:]


def _fitted(image_HWC: Tensor, sampler: SamplerSettings) -> Tensor:
    """A picture as uint8 ``[3, H, W]``, scaled to cover the clip and cut to it if it has another size."""
    image_CHW = image_HWC.permute(2, 0, 1)
    if image_CHW.shape[1:] == (sampler.height, sampler.width):
        return image_CHW.contiguous()
    return cover_crop(image_CHW, sampler.height, sampler.width)


def _shown(memory: StoryMemory, sampler: SamplerSettings) -> list[Tensor]:
    bank = MemoryBank(memory.at_size(sampler.height, sampler.width))
    return images_of(bank.recall(memory.rules()).keyframes)


def check_clip_fits(models: StoryModels, sampler: SamplerSettings) -> None:
    """Raise ``ConfigError`` if a clip of this size cannot fit the device of ``models``."""
    check_clip_memory(
        sampler,
        models.settings.parallel,
        models.weights.any_checkpoint.dit_config,
        getattr(torch, models.settings.model.dtype),
        device=models.device,
        ranks_per_node=1,
    )


def _fingerprint(request: ClipRequest, models: StoryModels, prompt: str) -> str:
    """A digest of all that decides the pixels: an interrupted shot continues only as itself."""
    digest = hashlib.sha256()
    images = [*request.memory_images, request.first_frame, request.motion_frames]
    plain = {
        "mode": request.mode,
        "prompt": prompt,
        "seed": request.seed,
        "sampler": asdict(request.sampler),
        "loras": request.lora_key,
        "weights": models.weights.identity(KIND_OF_MODE[request.mode]),
        "images": [None if image is None else list(image.shape) for image in images],
    }
    digest.update(canonical_json(plain))
    for image in images:
        if image is not None:
            digest.update(image.contiguous().numpy().data)
    return digest.hexdigest()
