"""Settings of the weights: where they are and in which form they are kept. Knows nothing about how they are read."""

from dataclasses import dataclass, field
from typing import Any

from storymem_dist.errors import ConfigError, require_between, require_one_of
from storymem_dist.models.attention import BACKENDS
from storymem_dist.models.precision import VAE_PRECISIONS
from storymem_dist.models.quantized_linear import LINEARS
from storymem_dist.weights.lora import SCALE_RULES, lora_list

COMPUTE_DTYPES = ("bfloat16", "float32")
EXPERT_RESIDENCIES = ("auto", "resident", "stream", "swap")


@dataclass(kw_only=True, slots=True)
class ModelSettings:
    """The ``model`` group.

    ``t2v_checkpoint`` and ``i2v_checkpoint`` are folders of any layout of ``weights.checkpoints``. ``t2v_high_noise``
    and the three like it name the file (or folder) of one expert, in pairs; ``vae``, ``text_encoder`` and ``tokenizer``
    those parts. They come before what the folder holds.

    ``packed`` is a file with a whole small model (``weights.packed``), and ``packed_sha256`` what it must be (None: not
    checked). ``generate`` names a preset with seeded random weights. In both cases a checkpoint is written to the
    user's cache on first use, and the three paths are filled from it. ``storymem_scale_rule`` is the rule of that LoRA
    (StoryMem's own are rsLoRA). ``loras`` are merged after it, in order; each is a path or a mapping with the fields of
    ``LoraSettings``, and becomes one. ``experts``: ``resident`` keeps both on the device. ``stream`` keeps both in
    host memory, and on the device as many blocks of the one that computes as there is room for; the others arrive ahead
    of their use. ``swap`` is the same with all blocks. ``auto`` decides by what is free on the device.

    ``attention`` is one of ``models.attention.BACKENDS``; ``auto`` is the fastest one of the device. ``linears`` is the
    number format of the blocks' matrix products, one of ``models.quantized_linear.LINEARS``; all but ``exact`` are
    lossy. ``cache_text_keys`` keeps the keys and values of a shot's texts on the device (A14B: 0.84 GB) instead of
    computing them at every step; pixels are the same. ``vae_precision`` is the precision of the VAE's convolutions on
    CUDA: ``tf32`` (torch's default, and so the original code's) or ``float32``; all other fp32 arithmetic is exact in
    both cases. ``bfloat16`` is the whole VAE in bf16, with half the memory, and lossy.
    """

    t2v_checkpoint: str | None = None
    i2v_checkpoint: str | None = None
    t2v_high_noise: str | None = None
    t2v_low_noise: str | None = None
    i2v_high_noise: str | None = None
    i2v_low_noise: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    storymem_lora: str | None = None
    storymem_scale_rule: str = "rslora"
    loras: Any = field(default_factory=list)
    packed: str | None = None
    packed_sha256: str | None = None
    generate: str | None = None
    generate_seed: int = 0
    dtype: str = "bfloat16"
    experts: str = "auto"
    text_encoder_device: str = "auto"
    text_encoder_dtype: str = "bfloat16"
    attention: str = "auto"
    linears: str = "exact"
    cache_text_keys: bool = False
    vae_precision: str = "tf32"

    def __post_init__(self) -> None:
        if self.packed is not None and self.generate is not None:
            raise ConfigError(
                f"model.packed={self.packed} and model.generate={self.generate} are two models; set one to null"
            )
        self.loras = lora_list(self.loras)
        require_between("model.generate_seed", self.generate_seed, -(2**62), 2**62)
        require_one_of("model.storymem_scale_rule", self.storymem_scale_rule, SCALE_RULES)
        require_one_of("model.dtype", self.dtype, COMPUTE_DTYPES)
        require_one_of("model.text_encoder_dtype", self.text_encoder_dtype, COMPUTE_DTYPES)
        require_one_of("model.experts", self.experts, EXPERT_RESIDENCIES)
        require_one_of("model.attention", self.attention, BACKENDS)
        require_one_of("model.linears", self.linears, LINEARS)
        require_one_of("model.vae_precision", self.vae_precision, VAE_PRECISIONS)
        require_one_of("model.text_encoder_device", self.text_encoder_device, ("auto", "cpu", "cuda"))
