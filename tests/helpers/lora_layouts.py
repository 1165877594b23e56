"""LoRAs in random layouts, with their truth: what each should add to the weights of the tiny transformer.

``lora_cases`` draws a truth (targets, ranks, scales, exact changes, experts), writes it the way some trainer would, and
may damage the file afterwards. The spellings come from the table that is tested, ``weights.lora.layouts``.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from storymem_dist.models.wan.presets import EXPERTS, HIGH_NOISE, LOW_NOISE, TINY
from storymem_dist.weights.checkpoints import dit_shapes
from storymem_dist.weights.key_maps import diffusers_dit_key
from storymem_dist.weights.lora.layouts import PREFIXES, WRAPPERS

SHAPES = dit_shapes(TINY.t2v)
LINEARS = [
    name.removesuffix(".weight") for name, shape in SHAPES.items() if name.endswith(".weight") and len(shape) == 2
]
CONV = "patch_embedding"
PATCHED = {
    "blocks.0.self_attn.norm_q.weight": "blocks.0.self_attn.norm_q.diff",
    "blocks.1.norm3.weight": "blocks.1.norm3.w_norm",
    "blocks.1.norm3.bias": "blocks.1.norm3.b_norm",
    "blocks.0.ffn.0.bias": "blocks.0.ffn.0.diff_b",
    "blocks.1.modulation": "blocks.1.diff_m",
    "head.modulation": "head.diff_m",
    "head.head.weight": "head.head.diff",
    "head.head.bias": "head.head.diff_b",
    "patch_embedding.weight": "patch_embedding.diff",
    "time_projection.1.bias": "time_projection.1.diff_b",
    "text_embedding.2.weight": "text_embedding.2.diff",
}
"""Exact changes: the parameter, and how files of native names call the change."""

HALVES = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_A", "lora_B"),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
"""Types in which halves are stored."""

EXPERT_PREFIXES = {
    HIGH_NOISE: ("transformer_1.", "high_noise_model.", "diffusion_model.transformer_1."),
    LOW_NOISE: ("transformer_2.", "low_noise_model.", "diffusion_model.transformer_2.", "pipe.dit2."),
}


@dataclass
class LoraCase:
    """What a file holds and what it should add, for each expert (``both`` where it names none)."""

    tensors: dict[str, Tensor] = field(repr=False)
    truth: dict[str, dict[str, Tensor]] = field(repr=False)
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] | None = None
    container: str = "safetensors"

    def write(self, folder: Path) -> Path:
        """Write the file, and ``adapter_config.json`` if there is one; return what to open."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.contiguous() for key, value in self.tensors.items()}
        if self.config is not None:
            (folder / "adapter_config.json").write_text(json.dumps(self.config))
        if self.container == "safetensors":
            path = folder / "adapter_model.safetensors"
            save_file(tensors, path, metadata=self.metadata or None)
            return folder if self.config is not None else path
        path = folder / "adapter_model.bin"
        torch.save({"state_dict": tensors, **self.metadata} if self.container == "nested" else tensors, path)
        return folder if self.config is not None else path


def spell_module(native: str, style: str) -> str:
    """A native module's name in a style: ``native``, ``diffusers``, or one of kohya's (underscores)."""
    name = native
    if style.startswith("diffusers"):
        name = diffusers_dit_key(f"{native}.weight").removesuffix(".weight")
    return name.replace(".", "_") if style.endswith("flat") else name


def product(down: Tensor, up: Tensor) -> Tensor:
    """The weight that two halves give, in float64."""
    flat = up.double().flatten(1) @ down.double().flatten(1)
    return flat.view(up.shape[0], *down.shape[1:])


@st.composite
def lora_cases(draw: st.DrawFn, *, damaged: bool = False) -> LoraCase:
    """Draw a LoRA, its truth and its layout; with ``damaged``, a random fault is put into the file."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    dtype = draw(st.sampled_from(DTYPES))
    names = draw(st.lists(st.sampled_from([*LINEARS, CONV]), min_size=1, max_size=4, unique=True))
    style = draw(st.sampled_from(("native", "diffusers", "native flat", "diffusers flat")))
    down_end, up_end = draw(st.sampled_from(HALVES))
    wrapper = draw(st.sampled_from(["", *WRAPPERS])) if style in ("native", "diffusers") else ""
    where = draw(st.sampled_from(("none", "tensors", "header", "adapter metadata", "config", "kohya")))
    uses_rslora = where in ("adapter metadata", "config") and draw(st.booleans())
    rank = draw(st.integers(1, 5))
    alpha = float(draw(st.sampled_from((1, 2, 8, 11))))
    scale = 1.0 if where == "none" else alpha / (math.sqrt(rank) if uses_rslora else rank)
    patched = draw(st.lists(st.sampled_from(list(PATCHED)), max_size=3, unique=True)) if style == "native" else []
    experts = draw(st.sampled_from(("both", "both", "split", "low", "diffusers split")))
    prefixes = _prefixes(draw, experts, is_flat=style.endswith("flat"))

    tensors: dict[str, Tensor] = {}
    truth: dict[str, dict[str, Tensor]] = {}
    for expert, prefix in prefixes.items():
        added = truth.setdefault(expert, {})
        for native in names:
            name = spell_module(native, style)
            if wrapper and name.startswith("blocks."):
                _, number, rest = name.split(".", 2)
                name = f"blocks.{number}.{wrapper}.{rest}"
            shape = SHAPES[f"{native}.weight"]
            down = (torch.randn(rank, *shape[1:], generator=generator) * 0.3).to(dtype)
            up = (torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) * 0.3).to(dtype)
            tensors[f"{prefix}{name}.{down_end}"], tensors[f"{prefix}{name}.{up_end}"] = down, up
            if where in ("tensors", "kohya"):
                kind = draw(st.sampled_from((torch.float32, torch.int64)))
                tensors[f"{prefix}{name}.alpha"] = torch.full(draw(st.sampled_from(((), (1,)))), alpha).to(kind)
            added[f"{native}.weight"] = scale * product(down, up)
        for parameter in patched:
            change = torch.randn(SHAPES[parameter], generator=generator) * 0.3
            tensors[prefix + PATCHED[parameter]] = change
            added[parameter] = added.get(parameter, torch.zeros(())) + change.double()
    case = LoraCase(tensors=tensors, truth=truth)
    _say_scale(case, where, alpha=alpha, rank=rank, uses_rslora=uses_rslora, experts=experts)
    if where in ("none", "tensors", "config"):
        case.container = draw(st.sampled_from(("safetensors", "torch", "nested")))
    if damaged:
        draw(st.sampled_from(DAMAGES))(draw, case)
    return case


def _prefixes(draw: st.DrawFn, experts: str, *, is_flat: bool) -> dict[str, str]:
    """The prefix of each expert's keys; flat names need one that ends a kohya name."""
    plain = [one.text for one in PREFIXES if one.expert is None]
    stacked = draw(st.lists(st.sampled_from([text for text in plain if text.endswith(".")]), max_size=2))
    last = draw(st.sampled_from(["lora_unet_", "lora_unet__", "lycoris_"])) if is_flat else ""
    before = "".join(stacked)
    if experts == "both":
        return {"both": before + draw(st.sampled_from(["", "transformer."])) + last}
    if experts == "diffusers split":
        return {HIGH_NOISE: f"{before}transformer.{last}", LOW_NOISE: f"{before}transformer_2.{last}"}
    chosen = EXPERTS if experts == "split" else (LOW_NOISE,)
    return {expert: before + draw(st.sampled_from(EXPERT_PREFIXES[expert])) + last for expert in chosen}


def _say_scale(case: LoraCase, where: str, *, alpha: float, rank: int, uses_rslora: bool, experts: str) -> None:
    peft = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": uses_rslora, "rank_pattern": {}}
    if where == "header":
        case.metadata = {"alpha": str(alpha), "rank": str(rank), "format": "pt"}
    elif where == "kohya":
        case.metadata = {"ss_network_alpha": str(alpha), "ss_network_dim": str(rank), "ss_network_args": "{}"}
    elif where == "config":
        case.config = peft
    elif where == "adapter metadata":
        components = {"both": ("transformer",), "low": ("transformer_2",)}.get(
            experts, ("transformer", "transformer_2")
        )
        packed = {f"{component}.{key}": value for component in components for key, value in peft.items()}
        case.metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(packed)}


def _drop_key(draw: st.DrawFn, case: LoraCase) -> None:
    halves = [key for key in case.tensors if "alpha" not in key and "lora" in key]
    del case.tensors[draw(st.sampled_from(halves))]


def _not_finite(draw: st.DrawFn, case: LoraCase) -> None:
    key = draw(st.sampled_from([key for key, value in case.tensors.items() if value.is_floating_point()]))
    case.tensors[key] = case.tensors[key].float().clone()
    case.tensors[key].view(-1)[0] = draw(st.sampled_from((math.nan, math.inf)))


def _strange_key(draw: st.DrawFn, case: LoraCase) -> None:
    case.tensors[draw(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)) + "?"] = torch.zeros(2)


def _wrong_block(draw: st.DrawFn, case: LoraCase) -> None:
    for half, shape in (("lora_down", (2, 64)), ("lora_up", (64, 2))):
        case.tensors[f"diffusion_model.blocks.99.self_attn.q.{half}.weight"] = torch.ones(shape)


def _other_adapter(draw: st.DrawFn, case: LoraCase) -> None:
    ending = draw(st.sampled_from(("dora_scale", "lokr_w1", "hada_w1_a", "lora_magnitude_vector", "oft_blocks")))
    case.tensors[f"blocks.0.ffn.0.{ending}"] = torch.ones(2, 2)


def _wrong_shape(draw: st.DrawFn, case: LoraCase) -> None:
    key = draw(st.sampled_from([key for key, value in case.tensors.items() if value.ndim > 1]))
    case.tensors[key] = torch.zeros(draw(st.sampled_from(((3,), (7, 7), (0, 4), (1, 6, 7), ()))))


def _contradiction(draw: st.DrawFn, case: LoraCase) -> None:
    case.container = "safetensors"
    case.metadata = {**case.metadata, draw(st.sampled_from(("rank", "r", "ss_network_dim"))): "77"}


def _bad_number(draw: st.DrawFn, case: LoraCase) -> None:
    case.container = "safetensors"
    case.metadata = {**case.metadata, "lora_alpha": draw(st.sampled_from(("nan", "1e999", "x", "[]")))}


def _bad_config(draw: st.DrawFn, case: LoraCase) -> None:
    case.config = draw(
        st.sampled_from(
            (
                {"peft_type": "LOHA"},
                {"peft_type": "LORA", "use_dora": True},
                {"peft_type": "LORA", "r": -1},
                {"peft_type": "LORA", "rank_pattern": {"(": 4}},
                {"peft_type": "LORA", "r": 6, "lora_alpha": "many"},
            )
        )
    )


DAMAGES: tuple[Callable[[st.DrawFn, LoraCase], None], ...] = (
    _drop_key,
    _not_finite,
    _strange_key,
    _wrong_block,
    _other_adapter,
    _wrong_shape,
    _contradiction,
    _bad_number,
    _bad_config,
)
"""Faults, each of which must be refused."""
