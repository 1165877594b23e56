"""Estimates the work of a shot in TFLOP, to find the longest path through a story.

Pure arithmetic on sizes. Priorities need only ratios, so it knows no machine: ``queue`` measures the seconds per TFLOP.
"""

from dataclasses import dataclass

from storymem_dist.story.modes import T2V

# The A14B forward, fitted to the counted FLOP of two sizes: 1,678 TFLOP at 32,760 tokens, 3,095 at 48,360. The square
# term is attention (scores and values: 4 L^2 * 5120 channels * 40 blocks); the rest is linear in L to within 0.1%.
ATTENTION_FLOP_PER_TOKEN_PAIR = 4 * 5120 * 40
LINEAR_FLOP_PER_TOKEN = 24.4e9

# Decoding 81 frames of 480x832 costs 275 TFLOP in fp32 and runs about 8 times slower per FLOP than the bf16 matmuls.
VAE_TFLOP_PER_PIXEL_FRAME = 275 / (81 * 480 * 832)
VAE_SLOWNESS = 8.0

_TERA = 1e12


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """The sizes that determine the work of a shot.

    ``passes_per_step``: 2 with classifier-free guidance, 1 without, between where a part of the steps is guided.
    ``max_keyframes``: the most that a shot recalls. ``keyframes_per_shot``: expected number that a shot adds (StoryMem
    keeps up to three; some are duplicates).
    ``is_a14b``: whether the model is the A14B; for other models only ratios are meaningful, not the TFLOP.
    """

    num_frames: int = 81
    height: int = 480
    width: int = 832
    num_inference_steps: int = 40
    passes_per_step: float = 2.0
    max_keyframes: int = 10
    keyframes_per_shot: float = 2.5
    is_a14b: bool = True

    def num_tokens(self, num_keyframes: float) -> float:
        """Tokens of one forward with ``num_keyframes`` in memory: 1560 per latent frame or keyframe at 832x480."""
        return ((self.num_frames - 1) // 4 + 1 + num_keyframes) * (self.height // 16) * (self.width // 16)

    def forward_tflop(self, num_keyframes: float) -> float:
        """TFLOP of one A14B forward."""
        tokens = self.num_tokens(num_keyframes)
        return (LINEAR_FLOP_PER_TOKEN * tokens + ATTENTION_FLOP_PER_TOKEN_PAIR * tokens**2) / _TERA

    def shot_tflop(self, num_keyframes: float) -> float:
        """TFLOP (of bf16 matmul time) of a whole shot: denoising, then decoding."""
        decode = VAE_TFLOP_PER_PIXEL_FRAME * VAE_SLOWNESS * self.num_frames * self.height * self.width
        return self.num_inference_steps * self.passes_per_step * self.forward_tflop(num_keyframes) + decode

    def given_tflop(self) -> float:
        """TFLOP that stand for reading a given clip: those of its frames, without the decoder's slowness."""
        return VAE_TFLOP_PER_PIXEL_FRAME * self.num_frames * self.height * self.width

    def expected_keyframes(self, kind: str, num_before: int, num_references: int = 0) -> float:
        """Expected keyframes in memory for a shot with ``num_before`` shots before it; 0 for T2V."""
        if kind == T2V:
            return 0.0
        return min(float(self.max_keyframes), num_references + self.keyframes_per_shot * num_before)
