"""How clips are sampled: sizes, solver, schedule, guidance, seeds.

Plain values, checked when they are made; every message begins with the dotted path of the setting. Knows nothing about
models, devices or Hydra.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

from storymem_dist.errors import ConfigError, require_between, require_one_of, require_whole, shown
from storymem_dist.story.modes import CONTINUATIONS, KINDS, MI2V, NUM_GIVEN_FRAMES, T2V

SOLVERS = ("unipc", "dpmpp", "euler")
SEED_RULES = ("index_in_scene", "per_shot")
NOISE_DEVICES = ("cpu", "cuda")

# The negative prompt that Wan publishes as its default for all Wan2.x models.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，"
    "背景人很多，倒着走"
)

_MAX_SEED = 2**63 - 1  # torch's generators take 64 bits; the shot's index is added on top
_MAX_FLOW_SHIFT = 1000.0  # above it, the first UniPC sigma is so close to 1 that log(1 - sigma) loses its digits
_MAX_STEPS = 1000  # the models know 1000 training timesteps
_MAX_FPS = 1000
_MAX_SIZE = 16_384  # of a side, in pixels; H.264 ends there
_MAX_PIXELS = 64 * 10**6  # of a frame; larger ones are not read back
_MAX_FRAMES = 10_001  # ten minutes at 16 frames per second; the memory of a machine ends before


@dataclass(kw_only=True, slots=True)
class SamplerSettings:
    """Everything about sampling that changes pixels, apart from weights and prompts.

    Defaults are the model card's and the StoryMem release's: 81 frames of 832x480 at 16 frames per second, 40 UniPC
    steps, flow shift 12 (T2V) and 4 (M2V), boundary 0.875 and 0.9, guidance 3.5 for both experts.

    ``sigmas`` are the noise levels of ``solver="euler"``: each in (0, 1], falling, one per step, without the final
    zero, not shifted again. They are for models distilled to a few fixed levels. Empty means evenly spaced levels under
    the flow shift. Two settings are faster, but not exact. With ``step_cache_threshold`` above zero, steps may reuse
    the work of earlier ones (``diffusion.step_cache``). ``guidance_interval`` ``[start, end]`` are shares of the steps:
    steps outside of it run the conditional pass alone, as with a scale of 1. Empty: all steps are guided.
    """

    num_inference_steps: int = 40
    solver: str = "unipc"
    sigmas: list[float] = field(default_factory=list)
    num_frames: int = 81
    height: int = 480
    width: int = 832
    fps: int = 16
    flow_shift_t2v: float = 12.0
    flow_shift_m2v: float = 4.0
    boundary_ratio_t2v: float = 0.875
    boundary_ratio_m2v: float = 0.9
    guidance_scale_high: float = 3.5
    guidance_scale_low: float = 3.5
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    continuation: str = MI2V
    first_shot: str = T2V
    seed: int = 0
    seed_rule: str = "index_in_scene"
    noise_device: str = "cpu"
    step_cache_threshold: float = 0.0
    guidance_interval: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        require_one_of("sampler.solver", self.solver, SOLVERS)
        require_one_of("sampler.continuation", self.continuation, CONTINUATIONS)
        require_one_of("sampler.first_shot", self.first_shot, KINDS)
        require_one_of("sampler.seed_rule", self.seed_rule, SEED_RULES)
        require_one_of("sampler.noise_device", self.noise_device, NOISE_DEVICES)
        check_frame_sizes(self.num_frames, self.height, self.width, where="sampler.")
        require_whole("sampler.fps", self.fps, 1, _MAX_FPS)
        require_whole("sampler.num_inference_steps", self.num_inference_steps, 1, _MAX_STEPS)
        require_whole("sampler.seed", self.seed, -_MAX_SEED, _MAX_SEED)
        for name in ("flow_shift_t2v", "flow_shift_m2v"):
            require_between(f"sampler.{name}", getattr(self, name), 0.01, _MAX_FLOW_SHIFT)
        for name in ("boundary_ratio_t2v", "boundary_ratio_m2v"):
            require_between(f"sampler.{name}", getattr(self, name), 0.0, 1.0)
        for name in ("guidance_scale_high", "guidance_scale_low"):
            require_between(f"sampler.{name}", getattr(self, name), 0.0, 100.0)
        require_between("sampler.step_cache_threshold", self.step_cache_threshold, 0.0, 1.0)
        self._check_sigmas()
        self._check_guidance_interval()
        given = NUM_GIVEN_FRAMES.get(self.continuation, 0)
        if self.num_frames <= given:
            raise ConfigError(
                f"sampler.num_frames={self.num_frames} leaves nothing new to render: "
                f"sampler.continuation={self.continuation} repeats {given} frames of the shot before it; "
                f"use at least {4 * -(-given // 4) + 1}"
            )

    def _check_sigmas(self) -> None:
        if not self.sigmas:
            return
        if self.solver != "euler":
            raise ConfigError(
                f"sampler.sigmas is given with sampler.solver={self.solver}; only solver=euler takes its own sigmas"
            )
        if len(self.sigmas) != self.num_inference_steps:
            raise ConfigError(
                f"sampler.sigmas has {len(self.sigmas)} values but sampler.num_inference_steps="
                f"{self.num_inference_steps}; give one value per step (the final 0 is added)"
            )
        check_sigmas(self.sigmas, where="sampler.")

    def _check_guidance_interval(self) -> None:
        if not self.guidance_interval:
            return
        what = f"sampler.guidance_interval={shown(self.guidance_interval)}"
        if len(self.guidance_interval) != 2 or not 0 <= self.guidance_interval[0] < self.guidance_interval[1] <= 1:
            raise ConfigError(
                f"{what} is not allowed; give the first and the last share of the steps to guide, such as [0.0, 0.5], "
                "or [] for all steps"
            )
        if not self.guided_steps:
            raise ConfigError(
                f"{what} holds none of sampler.num_inference_steps={self.num_inference_steps} steps; widen it, or turn "
                "guidance off with sampler.guidance_scale_high=1 sampler.guidance_scale_low=1"
            )

    def flow_shift(self, kind: str) -> float:
        """Shift of the noise schedule for the base model ``kind`` ("t2v" or "m2v")."""
        require_one_of("kind", kind, KINDS)
        return self.flow_shift_t2v if kind == T2V else self.flow_shift_m2v

    def boundary_ratio(self, kind: str) -> float:
        """The high-noise expert of ``kind`` runs at timesteps >= this ratio * 1000."""
        require_one_of("kind", kind, KINDS)
        return self.boundary_ratio_t2v if kind == T2V else self.boundary_ratio_m2v

    @property
    def needs_negative_prompt(self) -> bool:
        """Whether any step runs the unconditional pass."""
        return self.guidance_scale_high != 1.0 or self.guidance_scale_low != 1.0

    @property
    def guided_steps(self) -> range:
        """Indices of the steps that may run the unconditional pass: step i of n if i / n is in the interval."""
        start, end = self.guidance_interval or (0.0, 1.0)
        first, stop = (math.ceil(share * self.num_inference_steps - 1e-9) for share in (start, end))
        return range(first, stop)

    @property
    def passes_per_step(self) -> float:
        """Passes of a step on average: 2 with guidance, 1 without."""
        return 1 + len(self.guided_steps) / self.num_inference_steps if self.needs_negative_prompt else 1

    @property
    def needed_negative_prompt(self) -> str | None:
        """The negative prompt; None where no step reads it."""
        return self.negative_prompt if self.needs_negative_prompt else None


def check_frame_sizes(num_frames: int, height: int, width: int, *, where: str = "") -> None:
    """Raise ``ConfigError`` unless the VAE and the DiT can divide such a clip into whole tokens.

    The VAE packs 4 frames into one latent after the first (so 4n+1 frames) and 8x8 pixels into one latent cell; the
    DiT takes 2x2 latent cells per token (so multiples of 16 pixels, in either orientation).
    """
    require_whole(f"{where}num_frames", num_frames, 1, _MAX_FRAMES)
    for name, size in (("height", height), ("width", width)):
        require_whole(f"{where}{name}", size, 16, _MAX_SIZE)
    if height * width > _MAX_PIXELS:
        raise ConfigError(
            f"{where}height={height} and {where}width={width} are not allowed; a frame may have {_MAX_PIXELS:,} pixels"
        )
    if num_frames % 4 != 1:
        below = max(1, (num_frames - 1) // 4 * 4 + 1)
        raise ConfigError(
            f"{where}num_frames={num_frames!r} is not allowed; it must be 4n+1, such as {below} or {below + 4}"
        )
    for name, size in (("height", height), ("width", width)):
        if size % 16:
            near = max(16, round(size / 16) * 16)
            raise ConfigError(f"{where}{name}={size!r} is not allowed; it must be a multiple of 16, such as {near}")


def check_sigmas(sigmas: list[float], *, where: str = "") -> None:
    """Raise ``ConfigError`` unless ``sigmas`` fall strictly and lie in (0, 1]."""
    falling = all(a > b for a, b in pairwise(sigmas))
    if not sigmas or not falling or not sigmas[0] <= 1.0 or not sigmas[-1] > 0.0:
        raise ConfigError(
            f"{where}sigmas={shown(sigmas)} is not allowed; give falling values in (0, 1], without the final 0"
        )
