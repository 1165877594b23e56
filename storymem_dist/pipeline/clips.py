"""Single clips from pictures that the caller keeps, with the components of the batch renderer.

``StoryMemPipeline`` renders one clip per call and keeps the experts it loaded last. Videos are float32
``[B, C, F, H, W]`` in [-1, 1] with B = 1.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from storymem_dist.diffusion.denoise import PromptEmbeds
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.settings import SamplerSettings
from storymem_dist.errors import ConfigError
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.pipeline.images import ImageLike, to_image_tensor
from storymem_dist.render.attention import decide_attention
from storymem_dist.render.build import Engine
from storymem_dist.render.clip import ClipRequest
from storymem_dist.story.modes import KIND_OF_MODE, M2V, MI2V, MM2V, NUM_GIVEN_FRAMES, T2V
from storymem_dist.weights.bundle import open_weights, packed_model
from storymem_dist.weights.checkpoints import IN_DIMS, require_folder
from storymem_dist.weights.lora import lora_inputs, lora_key, shot_loras
from storymem_dist.weights.lora.storymem import find_storymem_folder
from storymem_dist.weights.prompt_lengths import CutText, cut_text_of
from storymem_dist.weights.settings import ModelSettings

Loras = Sequence[str | Mapping[str, Any]]
"""LoRAs of one clip."""

MAX_RECALLED = 10  # StoryMem is trained with at most ten memory keyframes


class StoryMemPipeline:
    """Renders clips from text, memory keyframes and given frames.

    Args:
        t2v_checkpoint_dir: folder of Wan2.2-T2V-A14B, native or -Diffusers layout. None: ``generate_t2v`` is not used.
        i2v_checkpoint_dir: folder of Wan2.2-I2V-A14B. None: only ``generate_t2v`` is used.
        m2v_lora_path: folder of the StoryMem LoRAs; needed by all but ``generate_t2v``.
        device: "auto" (a GPU if there is one), "cuda" or "cpu".
        enable_offload: keep experts in host memory if the device has no room for both, and drop the text encoder
            after use.
        t5_cpu: run the text encoder on the CPU.
        use_fsdp: shard the experts over the ranks that torchrun or ``accelerate launch`` started; every rank calls the
            same methods and gets the same result.
        dtype: "bfloat16" or "float32": number format of matrix products and attention.
        linears: "exact", or "float8", "float8_fast" or "int8" for faster, smaller and lossy layers inside the
            transformer blocks.

    A folder that is not there raises ``WeightsNotFound`` at once, naming the download and its command. Nothing is read
    before the first ``generate_*`` call. These calls raise ``ConfigError`` for bad arguments, and ``WeightsNotFound``
    or ``CheckpointError`` for what is missing or wrong in the folders.
    """

    def __init__(
        self,
        t2v_checkpoint_dir: str | None,
        i2v_checkpoint_dir: str | None,
        m2v_lora_path: str | None = None,
        device: str = "auto",
        enable_offload: bool = True,
        t5_cpu: bool = False,
        use_fsdp: bool = False,
        dtype: str = "bfloat16",
        linears: str = "exact",
    ) -> None:
        self._model = ModelSettings(
            t2v_checkpoint=t2v_checkpoint_dir,
            i2v_checkpoint=i2v_checkpoint_dir,
            storymem_lora=m2v_lora_path,
            experts="auto" if enable_offload else "resident",
            text_encoder_device="cpu" if t5_cpu else "auto",
            dtype=dtype,
            linears=linears,
            text_encoder_dtype=dtype,
        )
        for base in IN_DIMS:
            if path := getattr(self._model, f"{base}_checkpoint"):
                require_folder(path, base)
        if m2v_lora_path:
            find_storymem_folder(m2v_lora_path)
        self._parallel = ParallelSettings(device=device, weights="fsdp" if use_fsdp else "replicated")
        self._keep_text_encoder = not enable_offload
        self._engine: Engine | None = None
        self._cut_text: CutText = lambda text: None
        self._engine_key: tuple[str, str] | None = None
        self._embeds: dict[str, Tensor] = {}

    @classmethod
    def from_packed(cls, name: str = "nano", dtype: str = "float32", **options: Any) -> "StoryMemPipeline":
        """A pipeline with a small model from one file: the one that comes with the package, or the file ``name``.

        ``options`` are those of the constructor. nano is made for 17 frames of 96x64, 16 steps and ``cfg_scale=2.0``.
        """
        folders = packed_model(name)
        paths = str(folders.t2v_dir), str(folders.i2v_dir), str(folders.lora_dir)
        return cls(*paths, dtype=dtype, **options)

    def generate_t2v(
        self,
        prompt: str,
        num_frames: int = 81,
        height: int = 480,
        width: int = 832,
        seed: int = 0,
        steps: int = 40,
        cfg_scale: float | tuple[float, float] = 3.5,
        negative_prompt: str | None = None,
        loras: Loras = (),
    ) -> Tensor:
        """Render a clip from text alone: float32 ``[1, 3, num_frames, height, width]`` in [-1, 1].

        ``num_frames`` is 4n+1, sizes are multiples of 16. ``cfg_scale`` is one guidance scale, or a pair: for
        the low-noise and for the high-noise expert. 1 skips the unconditional pass. ``loras`` are added for this clip
        alone, without loading the experts again: paths, or mappings with the keys of ``LoraSettings``.
        """
        sampler = _sampler(num_frames, height, width, steps, cfg_scale, negative_prompt)
        return self._generate(T2V, prompt, seed, sampler, loras=loras)

    def generate_m2v(
        self,
        prompt: str,
        memory_frames: Sequence[ImageLike],
        num_frames: int = 81,
        height: int = 480,
        width: int = 832,
        seed: int = 0,
        steps: int = 40,
        cfg_scale: float | tuple[float, float] = 3.5,
        negative_prompt: str | None = None,
        loras: Loras = (),
    ) -> Tensor:
        """Render a new shot (a cut) with at most ten ``memory_frames``, oldest first; result as of ``generate_t2v``."""
        sampler = _sampler(num_frames, height, width, steps, cfg_scale, negative_prompt)
        return self._generate(M2V, prompt, seed, sampler, memory_frames=memory_frames, loras=loras)

    def generate_mi2v(
        self,
        prompt: str,
        memory_frames: Sequence[ImageLike],
        first_frame: ImageLike,
        num_frames: int = 81,
        height: int = 480,
        width: int = 832,
        seed: int = 0,
        steps: int = 40,
        cfg_scale: float | tuple[float, float] = 3.5,
        negative_prompt: str | None = None,
        loras: Loras = (),
    ) -> Tensor:
        """Render a shot that continues from ``first_frame``, its first frame; otherwise as ``generate_m2v``."""
        sampler = _sampler(num_frames, height, width, steps, cfg_scale, negative_prompt)
        first = to_image_tensor(first_frame)
        return self._generate(MI2V, prompt, seed, sampler, memory_frames=memory_frames, first_frame=first, loras=loras)

    def generate_mm2v(
        self,
        prompt: str,
        memory_frames: Sequence[ImageLike],
        motion_frames: Sequence[ImageLike] | Tensor,
        num_frames: int = 81,
        height: int = 480,
        width: int = 832,
        seed: int = 0,
        steps: int = 40,
        cfg_scale: float | tuple[float, float] = 3.5,
        negative_prompt: str | None = None,
        loras: Loras = (),
    ) -> Tensor:
        """Render a shot that continues from five ``motion_frames``, its first frames; otherwise as ``generate_m2v``."""
        needed = NUM_GIVEN_FRAMES[MM2V]
        if len(motion_frames) != needed:
            raise ConfigError(f"motion_frames has {len(motion_frames)} frames; generate_mm2v takes {needed}")
        frames = torch.stack([to_image_tensor(frame) for frame in motion_frames])
        sampler = _sampler(num_frames, height, width, steps, cfg_scale, negative_prompt)
        return self._generate(
            MM2V, prompt, seed, sampler, memory_frames=memory_frames, motion_frames=frames, loras=loras
        )

    def unload_models(self) -> None:
        """Drop all weights, and the process groups of this pipeline. The next ``generate_*`` call loads them again."""
        self._unload()

    def __enter__(self) -> "StoryMemPipeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unload(error)

    def _unload(self, error: BaseException | None = None) -> None:
        if self._engine is not None:
            self._engine.close(error)
        self._engine, self._engine_key = None, None
        self._embeds.clear()

    def _generate(
        self,
        mode: str,
        prompt: str,
        seed: int,
        sampler: SamplerSettings,
        memory_frames: Sequence[ImageLike] = (),
        first_frame: Tensor | None = None,
        motion_frames: Tensor | None = None,
        loras: Loras = (),
    ) -> Tensor:
        if seed < 0:
            raise ConfigError(f"seed={seed} is not allowed; it must be at least 0")
        if len(memory_frames) > MAX_RECALLED:
            raise ConfigError(f"memory_frames has {len(memory_frames)} images; at most {MAX_RECALLED} are allowed")
        request = ClipRequest(
            mode=mode,
            prompt=PromptEmbeds(prompt_LE=torch.empty(0), negative_LE=None),
            seed=seed,
            sampler=sampler,
            memory_images=[to_image_tensor(frame) for frame in memory_frames],
            first_frame=first_frame,
            motion_frames=motion_frames,
            loras=[asdict(one) for one in shot_loras(loras)],
            lora_key=lora_key(lora_inputs(loras)),
        )
        engine = self._engine_for(mode, sampler)
        texts = [prompt, sampler.negative_prompt] if sampler.needs_negative_prompt else [prompt]
        missing = [text for text in texts if text not in self._embeds]
        if missing:
            self._warn_of_cut_texts(missing)
            self._embeds.update(engine.encode_texts(missing, keep_encoder=self._keep_text_encoder))
        embeds = PromptEmbeds(
            prompt_LE=self._embeds[prompt],
            negative_LE=self._embeds[sampler.negative_prompt] if sampler.needs_negative_prompt else None,
        )
        return engine.clips.sample(replace(request, prompt=embeds))[None]

    def _warn_of_cut_texts(self, texts: Sequence[str]) -> None:
        for text in texts:
            if (problem := self._cut_text(text)) is not None:
                warnings.warn(f"the prompt {text[:40]!r}... has {problem}", stacklevel=4)

    def _engine_for(self, mode: str, sampler: SamplerSettings) -> Engine:
        """Return the engine whose LoRA fits ``mode``; closes an engine with another LoRA."""
        kind = KIND_OF_MODE[mode]
        continuation = MM2V if mode == MM2V else MI2V
        key = (kind, continuation if kind == M2V else "")
        if self._engine is None or key != self._engine_key:
            if self._engine is not None:
                self._engine.close()
            self._engine = None
            weights = open_weights(self._model, [kind], continuation)
            config = weights.any_checkpoint.dit_config
            session = start_session(self._parallel, num_heads=config.num_heads)
            grid = LatentGrid(
                num_frames=sampler.num_frames,
                height=sampler.height,
                width=sampler.width,
                num_memory=MAX_RECALLED if kind == M2V else 0,
            )
            model, _ = decide_attention(self._model, session, config, num_tokens=grid.num_tokens)
            self._engine = Engine.start(model, weights, self._parallel, sampler, session=session)
            self._cut_text = cut_text_of(weights.any_checkpoint)
            self._engine_key = key
        return self._engine


def _sampler(
    num_frames: int,
    height: int,
    width: int,
    steps: int,
    cfg_scale: float | tuple[float, float],
    negative_prompt: str | None,
) -> SamplerSettings:
    low, high = cfg_scale if isinstance(cfg_scale, tuple) else (cfg_scale, cfg_scale)
    settings = SamplerSettings(
        num_frames=num_frames,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale_low=low,
        guidance_scale_high=high,
    )
    return settings if negative_prompt is None else replace(settings, negative_prompt=negative_prompt)
