"""How public trainers name the tensors of a LoRA: the one table of spellings, and how a stored name is read with it.

Four groups of rows, each with its source: prefixes (some name an expert), wrappers inside a name, what a tensor is
(half, alpha, exact patch), and what is not supported. After the prefixes, ``.`` and ``_`` mean the same, and a module
may have its native or its diffusers name; so kohya's names (``blocks_0_self_attn_q``) and mixtures of both need no
rows. Knows names only: no files, shapes or numbers.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.models.wan.presets import EXPERTS, HIGH_NOISE, LOW_NOISE, TINY
from storymem_dist.weights.key_maps import diffusers_dit_key

DOWN, UP, UP_BIAS, ALPHA, WEIGHT, BIAS, MODULATION = "down", "up", "up bias", "alpha", "weight", "bias", "modulation"

HIGH_WITH_LOW = "transformer"
"""The expert of the bare prefix ``transformer.``: high noise next to ``transformer_2.``, else none."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prefix, the expert it names (None: none), and where it comes from."""

    text: str
    expert: str | None
    source: str


PREFIXES = (
    Prefix("base_model.model.", None, "peft: PeftModel.save_pretrained"),
    Prefix("model.diffusion_model.", None, "ComfyUI: whole checkpoints and what is extracted from them"),
    Prefix("diffusion_model.", None, "ComfyUI, diffusion-pipe, lightx2v, ai-toolkit"),
    Prefix("diffusion_model.transformer_1.", HIGH_NOISE, "ai-toolkit: wan22_14b, one file for both experts"),
    Prefix("diffusion_model.transformer_2.", LOW_NOISE, "ai-toolkit: wan22_14b, one file for both experts"),
    Prefix("transformer.", HIGH_WITH_LOW, "diffusers: WanPipeline.save_lora_weights; finetrainers"),
    Prefix("transformer_1.", HIGH_NOISE, "ai-toolkit: wan22_14b"),
    Prefix("transformer_2.", LOW_NOISE, "diffusers: WanPipeline.save_lora_weights"),
    Prefix("high_noise_model.", HIGH_NOISE, "folders of Wan-AI's own files"),
    Prefix("low_noise_model.", LOW_NOISE, "folders of Wan-AI's own files"),
    Prefix("high_noise.", HIGH_NOISE, "backbone names of StoryMem's files"),
    Prefix("low_noise.", LOW_NOISE, "backbone names of StoryMem's files"),
    Prefix("lora_unet_", None, "musubi-tuner (kohya)"),
    Prefix("lora_unet__", None, "VideoX-Fun"),
    Prefix("lora_transformer__", None, "ai-toolkit: its kohya export"),
    Prefix("lora_transformer_", None, "OneTrainer"),
    Prefix("lycoris_", None, "LyCORIS"),
    Prefix("transformer$$", None, "ai-toolkit: names inside its network"),
    Prefix("pipe.dit.", None, "DiffSynth-Studio"),
    Prefix("pipe.dit2.", LOW_NOISE, "DiffSynth-Studio: the second expert"),
    Prefix("dit.", None, "DiffSynth-Studio"),
    Prefix("dit2.", LOW_NOISE, "DiffSynth-Studio: the second expert"),
    Prefix("unet.", None, "diffusers: older LoRA files"),
    Prefix("model.", None, "state dicts of a wrapping module: CausVid, Self-Forcing"),
    Prefix("generator.", None, "CausVid, Self-Forcing"),
    Prefix("module.", None, "torch DistributedDataParallel, DeepSpeed"),
    Prefix("_orig_mod.", None, "torch.compile"),
)

WRAPPERS = {
    "_checkpoint_wrapped_module": "torch checkpoint_wrapper",
    "_fsdp_wrapped_module": "torch FSDP",
    "_orig_mod": "torch.compile of single blocks",
}
"""Parts inside a name that wrappers add, with their source."""

_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"  # peft keeps the adapter's name where several can be loaded

ROLES: tuple[tuple[str, str, str], ...] = (
    (rf"[._]lora_A{_ADAPTER}(?:\.weight)?", DOWN, "peft, diffusers, diffusion-pipe, ai-toolkit"),
    (rf"[._]lora_B{_ADAPTER}(?:\.weight)?", UP, "peft, diffusers, diffusion-pipe, ai-toolkit"),
    (rf"[._]lora_down{_ADAPTER}(?:\.weight)?", DOWN, "kohya, lightx2v, VideoX-Fun, OneTrainer"),
    (rf"[._]lora_up{_ADAPTER}(?:\.weight)?", UP, "kohya, lightx2v, VideoX-Fun, OneTrainer"),
    (rf"[._]lora\.down{_ADAPTER}(?:\.weight)?", DOWN, "diffusers: attention processors"),
    (rf"[._]lora\.up{_ADAPTER}(?:\.weight)?", UP, "diffusers: attention processors"),
    (rf"[._]lora_linear_layer\.down{_ADAPTER}(?:\.weight)?", DOWN, "diffusers: older LoRA files"),
    (rf"[._]lora_linear_layer\.up{_ADAPTER}(?:\.weight)?", UP, "diffusers: older LoRA files"),
    (rf"[._]lora_B{_ADAPTER}\.bias", UP_BIAS, "peft: lora_bias=True"),
    (rf"[._]lora_up{_ADAPTER}\.bias", UP_BIAS, "peft: lora_bias=True"),
    (r"\.alpha", ALPHA, "kohya"),
    (r"\.diff", WEIGHT, "ComfyUI: LoRAs extracted from fine-tuned models; LyCORIS: full"),
    (r"\.diff_b", BIAS, "ComfyUI: LoRAs extracted from fine-tuned models; LyCORIS: full"),
    (r"\.diff_m", MODULATION, "ComfyUI-WanVideoWrapper: lightx2v LoRAs"),
    (r"\.w_norm", WEIGHT, "LyCORIS: norms"),
    (r"\.b_norm", BIAS, "LyCORIS: norms"),
)
"""What a tensor is, by the end of its name: pattern, role, source."""

UNSUPPORTED: tuple[tuple[str, str], ...] = (
    (r"[._](dora_scale|lora_magnitude_vector)", "DoRA: it also rescales every row of a weight (dora_scale)"),
    (r"[._]lokr_", "LoKr: a Kronecker product (lokr_w1, lokr_w2), not two halves"),
    (r"[._]hada_", "LoHa: a Hadamard product of four matrices (hada_w1_a ...), not two halves"),
    (r"[._](b?oft_|oft_blocks)", "OFT: it rotates weights (oft_blocks)"),
    (r"[._](ia3_|on_input$)", "IA3: it scales activations"),
    (r"[._]vera_", "VeRA: vectors between shared random matrices"),
    (r"[._]lora_mid", "LoCon with a Tucker core (lora_mid), not two halves"),
    (r"\.[ab][12]\.weight$", "GLoRA: four matrices (a1, a2, b1, b2), not two halves"),
    (r"_loras\.(down|up)\.", "Stand-In: halves that count for the tokens of one picture alone, not for a weight"),
    (r"\.(scale_weight|weight_scale|scale_input|input_scale)$", "an 8-bit file whose halves have scales of their own"),
    (r"[._]lora_embedding_", "a LoRA of an embedding table; Wan's transformer has none"),
    (r"\.(set_weight|reshape_weight)$", "a patch that replaces weights; only deltas can be merged"),
)
"""Other adapters, which give each weight another delta: pattern in the name, and what it is."""

I2V_EXTRAS = re.compile(r"[._](k_img|v_img|norm_k_img|add_[kv]_proj|norm_added_[kqv])(?![a-z])|img_emb|image_embedder")
"""Names of what Wan2.1-I2V has and Wan2.2-A14B has not: attention to the embedding of an image."""

_MAX_NAME = 1000
"""Longest name that is read, in characters: the time for prefixes grows with the square of it."""

_WHOLE = re.compile(r"(?:[._]modules_to_save[^.]*)?\.(?:weight|bias)|[._]modulation")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraKey:
    """A stored name that was understood.

    ``module`` is native (``blocks.0.ffn.2``; ``head.modulation`` is a parameter of its own). ``expert`` is one of
    ``EXPERTS``, ``HIGH_WITH_LOW`` or None. ``stored_module`` and ``plain_module`` are the module's names with and
    without prefixes, as patterns of peft's configurations name it.
    """

    stored: str
    module: str
    role: str
    expert: str | None
    stored_module: str
    plain_module: str


def read_key(stored: str) -> LoraKey | None:
    """Read the name of a tensor; None when it is not part of a LoRA for Wan2.2's transformer.

    Raises:
        ValueError: the name has the prefixes of both experts.
    """
    found = _role(stored) if len(stored) <= _MAX_NAME else None
    if found is None:
        return None
    stored_module, role = found
    expert, plain = split_prefixes(stored_module)
    if role == MODULATION and not _flat(plain).endswith("modulation"):
        plain = f"{plain}.modulation"
    module = _native_names().get(_flat(plain)) or _in_a_block(plain)
    if module is None:
        return None
    return LoraKey(
        stored=stored, module=module, role=role, expert=expert, stored_module=stored_module, plain_module=plain
    )


def looks_like_lora(stored: str) -> bool:
    """Whether a name ends like part of any adapter, of this model or another."""
    return _role(stored) is not None or unsupported_kind(stored) is not None


def is_alpha(stored: str) -> bool:
    """Whether a name is that of an alpha."""
    found = _role(stored)
    return found is not None and found[1] == ALPHA


def unsupported_kind(stored: str) -> str | None:
    """What kind of adapter a name belongs to, if it is one that is not supported."""
    return next((what for pattern, what in UNSUPPORTED if re.search(pattern, stored)), None)


def is_whole_weight(stored: str) -> bool:
    """Whether a name is that of a weight itself instead of a change of it."""
    match = re.fullmatch(rf"(.+?)(?:{_WHOLE.pattern})", stored)
    return match is not None and not looks_like_lora(stored)


def split_prefixes(name: str) -> tuple[str | None, str]:
    """The expert that the prefixes of a module's stored name give, and the name without prefixes and wrappers.

    Raises:
        ValueError: the prefixes name both experts.
    """
    rest = name.replace("$$", ".")
    for wrapper in WRAPPERS:
        rest = re.sub(rf"(?:^|[._]){wrapper}(?=[._])", "", rest)
    rest = rest.lstrip(".")
    experts: set[str] = set()
    while match := _PREFIX.match(rest):
        expert = _EXPERTS_OF_PREFIXES[_flat(match[0])]
        if expert is not None:
            experts.add(expert)
        rest = rest[match.end() :]
    named = experts & set(EXPERTS)
    if len(named) > 1:
        raise ValueError(f"{name!r} names both experts")
    return next(iter(named or experts), None), rest


def _role(stored: str) -> tuple[str, str] | None:
    """The stored name of the module, and what the tensor is for it."""
    for pattern, role in _ROLE_PATTERNS:
        if match := pattern.fullmatch(stored):
            return match["module"], role
    return None


def _flat(name: str) -> str:
    return re.sub(r"[._$]+", "_", name).strip("_")


def _prefix_pattern(text: str) -> str:
    parts = [re.escape(part) for part in re.split(r"[._$]+", text) if part]
    pattern = r"[._]+".join(parts)
    if text.startswith("_"):
        pattern = f"_?{pattern}"
    if parts == ["transformer"]:  # transformer_blocks is a module of other models
        pattern += r"(?!_blocks)"
    return rf"{pattern}[._]+"


def expert_in_name(path: Path) -> str | None:
    """The expert that a file's name speaks of (``style_high_noise``, ``style-LOW``), as trainers name pairs of files.

    A hint for a warning, never a reason to change what is merged.
    """
    found = set(_EXPERT_IN_NAME.findall(path.stem.lower()))
    return {"high": HIGH_NOISE, "low": LOW_NOISE}[found.pop()] if len(found) == 1 else None


_EXPERT_IN_NAME = re.compile(r"(?<![a-z])(high|low)(?=[ _.-]?noise|$)")
_EXPERTS_OF_PREFIXES = {_flat(prefix.text): prefix.expert for prefix in reversed(PREFIXES)}
_PREFIX = re.compile(
    "|".join(_prefix_pattern(prefix.text) for prefix in sorted(PREFIXES, key=lambda one: -len(_flat(one.text))))
)
_ROLE_PATTERNS = tuple((re.compile(rf"(?P<module>.+?)(?:{pattern})"), role) for pattern, role, _ in ROLES)
_BLOCK = re.compile(r"blocks[._]+(\d+)[._]+(.+)")


@lru_cache(maxsize=1)
def _native_names() -> dict[str, str]:
    """Native names of modules and modulations by their flat native and diffusers spellings, for block 0 only."""
    with torch.device("meta"):
        parameters = [name for name, _ in WanDiT(TINY.t2v).named_parameters()]
    names: dict[str, str] = {}
    for parameter in parameters:
        if parameter.startswith("blocks.") and not parameter.startswith("blocks.0."):
            continue
        for spelling in (diffusers_dit_key(parameter), parameter):
            names[_flat(re.sub(r"\.(weight|bias)$", "", spelling))] = re.sub(r"\.(weight|bias)$", "", parameter)
    return names


def _in_a_block(plain: str) -> str | None:
    match = _BLOCK.fullmatch(plain)
    if match is None:
        return None
    native = _native_names().get(f"blocks_0_{_flat(match[2])}")
    return native and f"blocks.{int(match[1])}.{native.removeprefix('blocks.0.')}"
