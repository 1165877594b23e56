"""All randomness of a render: one seed per shot, one draw per shot. Knows nothing about ranks or models.

A shot's noise depends only on its seed, its size and the kind of noise device, never on the number of GPUs or on
earlier shots.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from storymem_dist.diffusion.settings import NOISE_DEVICES, SEED_RULES
from storymem_dist.errors import ConfigError, require_one_of
from storymem_dist.story.schema import Shot, Story


def shot_seed(job_seed: int, shot: Shot, story: Story, rule: str) -> int:
    """Seed of one shot: the story's own seed, or else the job's, plus the shot's index.

    ``rule="index_in_scene"`` counts from the start of the scene, as StoryMem does (so the first shots of all scenes
    share a seed and results are comparable); ``"per_shot"`` counts through the whole story. A negative seed means "draw
    one"; the job replaces it before this call, so here it raises ``ConfigError``.
    """
    require_one_of("sampler.seed_rule", rule, SEED_RULES)
    base = job_seed if story.seed is None else story.seed
    if base < 0:
        where = "sampler.seed" if story.seed is None else f"the seed of story {story.story_id}"
        raise ConfigError(f"{where}={base} is not allowed here; a negative seed must be replaced by a drawn one first")
    return base + (shot.index_in_scene if rule == "index_in_scene" else shot.index)


def initial_noise(seed: int, shape: Sequence[int], noise_device: str = "cpu") -> Tensor:
    """Standard normal float32 noise of ``shape`` in a single draw from a fresh generator on ``noise_device``.

    "cpu" gives the same numbers on every machine; "cuda" gives those of the original program, which draws on the GPU
    (other numbers for the same seed). The tensor stays on that device. Raises ``ConfigError`` when there is no CUDA.
    """
    require_one_of("sampler.noise_device", noise_device, NOISE_DEVICES)
    if noise_device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("sampler.noise_device=cuda needs a CUDA device and none is visible; use noise_device=cpu")
    generator = torch.Generator(device=noise_device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=noise_device, dtype=torch.float32)
