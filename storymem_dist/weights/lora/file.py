"""Opens LoRA files: which weights of Wan2.2's transformer they change, with which tensors, for which expert.

A file of any suffix is read by its content (safetensors, or what ``torch.save`` wrote), a folder as peft or diffusers
saves it. A key that has no place in the transformer is refused, unless the caller skips it: a half-applied LoRA would
be a silent error. Reads headers and alphas only. Knows nothing about how base weights are stored.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from storymem_dist.errors import CheckpointError
from storymem_dist.files import file_identity
from storymem_dist.models.wan.presets import EXPERTS, HIGH_NOISE, LOW_NOISE
from storymem_dist.weights.loading import TensorSource
from storymem_dist.weights.lora import layouts
from storymem_dist.weights.lora.container import adapter_config, find_file, number, open_tensors
from storymem_dist.weights.lora.layouts import HIGH_WITH_LOW, LoraKey
from storymem_dist.weights.lora.scale import Scaling, Statement, read_statements, resolve
from storymem_dist.weights.state_dict import check_no_keys, first_keys

BOTH = "both"
REFUSE, SKIP = "refuse", "skip"
UNMATCHED = (REFUSE, SKIP)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraModule:
    """The two halves of one target: names in the file, sizes, and what the file says of its scale (None: nothing).

    ``alpha`` is the one that counts, ``tensor_alpha`` that of the ``.alpha`` tensor. ``kernel`` holds the further sizes
    of a convolution. ``bias_key`` is the bias of the up half: it changes the bias of the target, with the same scale.
    """

    down_key: str
    up_key: str
    rank: int
    in_features: int
    out_features: int
    alpha: float | None
    tensor_alpha: float | None = None
    rule: str | None = None
    kernel: tuple[int, ...] = ()
    bias_key: str | None = None

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight that the product changes."""
        return torch.Size((self.out_features, self.in_features // math.prod(self.kernel), *self.kernel))


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFile:
    """The part of an opened and checked LoRA that is for ``expert`` (None: it names none). No weights read.

    ``modules`` has native module names (``blocks.0.ffn.2``). ``patches`` holds exact changes: native parameter names
    and the keys of tensors of the same shapes. ``unmatched`` are keys without a place in the transformer. ``places``
    says where its scale was found.
    """

    path: Path
    source: TensorSource
    modules: Mapping[str, LoraModule]
    identity: str
    patches: Mapping[str, str] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    expert: str | None = None
    places: tuple[str, ...] = ()


def open_lora(path: str | Path, *, unmatched: str = REFUSE) -> LoraFile:
    """Open a LoRA that names no expert, or only one; see ``open_lora_by_expert``.

    Raises:
        CheckpointError: also when the file holds both experts.
    """
    parts = open_lora_by_expert(path, unmatched=unmatched)
    if len(parts) > 1:
        raise CheckpointError(f"{path}: holds LoRAs of both experts; one is expected here")
    return next(iter(parts.values()))


def open_lora_by_expert(path: str | Path, *, unmatched: str = REFUSE) -> dict[str, LoraFile]:
    """Open a LoRA file or folder and check every key in it.

    Returns the parts of the experts that its keys name, or ``{"both": ...}`` when they name none. ``unmatched``:
    whether keys without a place in the transformer are refused, or skipped and listed.

    Raises:
        WeightsNotFound: there is no such file, or the folder holds no LoRA.
        CheckpointError: a key is unknown or left over, a half is missing, or sizes, experts or scales contradict each
            other.
    """
    file = find_file(Path(path))
    source, metadata = open_tensors(file)
    name, keys = source.name, source.keys()
    _refuse_other_adapters(name, keys)
    try:
        read = [(key, layouts.read_key(key)) for key in keys]
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None
    known = [key for _, key in read if key is not None]
    left = tuple(key for key, understood in read if understood is None)
    _refuse_unmatched(name, known, left, unmatched)
    statements = read_statements(name, metadata, adapter_config(file))
    identity = file_identity(file)
    parts = {}
    by_expert = _by_expert(name, known)
    _check_statements(name, statements, by_expert)
    for expert, of_expert in by_expert.items():
        modules, patches, places = _group(source, of_expert, [one for one in statements if _applies(one, expert)])
        parts[expert or BOTH] = LoraFile(
            path=file,
            source=source,
            modules=modules,
            identity=identity,
            patches=patches,
            unmatched=left,
            expert=expert,
            places=places,
        )
    return parts


def open_backbone(path: Path, expert: str, *, unmatched: str = REFUSE) -> LoraFile:
    """Open the file of ``expert`` in a folder like StoryMem's.

    Raises:
        WeightsNotFound, CheckpointError: as of ``open_lora_by_expert``; also when its keys name the other expert.
    """
    parts = open_lora_by_expert(path, unmatched=unmatched)
    if set(parts) not in ({BOTH}, {expert}):
        raise CheckpointError(f"{path}: its keys name the {' and '.join(parts)} expert, its file name {expert}")
    (file,) = parts.values()
    return file


def _refuse_other_adapters(name: str, keys: Sequence[str]) -> None:
    for key in keys:
        if kind := layouts.unsupported_kind(key):
            raise CheckpointError(
                f"{name}: this is {kind}. It is not supported; plain LoRAs (lora_A, lora_B) and exact changes (diff) "
                f"can be merged (first such key: {first_keys([key])})"
            )


def _refuse_unmatched(name: str, known: Sequence[LoraKey], left: Sequence[str], unmatched: str) -> None:
    if not known:
        if any(layouts.looks_like_lora(key) for key in left):
            raise CheckpointError(
                f"{name}: a LoRA for another model: none of its {len(left)} keys has a place in Wan2.2-A14B's "
                f"transformer ({first_keys(left)})"
            )
        what = "whole weights instead of changes" if any(map(layouts.is_whole_weight, left)) else "other tensors"
        raise CheckpointError(
            f"{name}: not a LoRA: none of its {len(left)} keys ends in lora_A.weight or lora_down.weight ({what}: "
            f"{first_keys(left)})"
        )
    if not left or unmatched == SKIP:
        return
    if all(layouts.I2V_EXTRAS.search(key) for key in left):
        what = "keys are for Wan2.1-I2V's attention to an image embedding, which Wan2.2-A14B does not have"
    elif all(map(layouts.is_whole_weight, left)):
        what = "keys hold whole weights (modules_to_save?) instead of changes of weights"
    else:
        what = "keys are not understood, or have no place in Wan2.2-A14B's transformer"
    raise CheckpointError(
        f"{name}: {len(left)} {what}: {first_keys(left)}; to leave them out and merge the rest, give this LoRA "
        "unmatched: skip"
    )


def _by_expert(name: str, known: Sequence[LoraKey]) -> dict[str | None, list[LoraKey]]:
    """Keys by the expert that they name; ``transformer.`` is high noise next to ``transformer_2.``, else none."""
    first: dict[str | None, str] = {}
    for key in known:
        first.setdefault(key.expert, key.stored)
    named = [expert for expert in EXPERTS if expert in first]
    bare: str | None = None
    if HIGH_WITH_LOW in first and named:
        if named != [LOW_NOISE]:
            raise CheckpointError(
                f"{name}: keys contradict each other: {first[HIGH_NOISE]!r} names the high-noise expert, and so may "
                f"{first[HIGH_WITH_LOW]!r}"
            )
        bare = HIGH_NOISE
    if None in first and named:
        raise CheckpointError(
            f"{name}: keys contradict each other: {first[named[0]]!r} names the {named[0]} expert, {first[None]!r} none"
        )
    groups: dict[str | None, list[LoraKey]] = {}
    for key in known:
        groups.setdefault(bare if key.expert == HIGH_WITH_LOW else key.expert, []).append(key)
    return groups


def _applies(statement: Statement, expert: str | None) -> bool:
    if statement.expert == HIGH_WITH_LOW:
        return expert in (None, HIGH_NOISE)
    return statement.expert in (None, expert)


def _check_statements(name: str, statements: Iterable[Statement], experts: Iterable[str | None]) -> None:
    for statement in statements:
        if not any(_applies(statement, expert) for expert in experts):
            raise CheckpointError(
                f"{name}: contradicts itself: {statement.place} describes an expert that no key of the file names"
            )


def _group(
    source: TensorSource, keys: Sequence[LoraKey], statements: Sequence[Statement]
) -> tuple[dict[str, LoraModule], dict[str, str], tuple[str, ...]]:
    """Modules, patches, and the places of scales, from the keys of one expert."""
    by_role: dict[str, dict[str, LoraKey]] = {}
    for key in keys:
        of_role = by_role.setdefault(key.role, {})
        if key.module in of_role:
            other = of_role[key.module].stored
            raise CheckpointError(f"{source.name}: {other!r} and {key.stored!r} are for the same weight, {key.module}")
        of_role[key.module] = key
    downs, ups, biases = (by_role.get(role, {}) for role in (layouts.DOWN, layouts.UP, layouts.UP_BIAS))
    patches = _patches(source.name, by_role)
    changed = {name.removesuffix(".weight").removesuffix(".bias") for name in patches}
    alphas = by_role.get(layouts.ALPHA, {})
    for problem, names in (
        ("lora_B (lora_up) is missing for", [key.stored for name, key in downs.items() if name not in ups]),
        ("lora_A (lora_down) is missing for", [key.stored for name, key in ups.items() if name not in downs]),
        ("halves are missing for", [key.stored for name, key in biases.items() if name not in downs]),
        ("alphas belong to no target", [name for name in alphas if name not in downs and name not in changed]),
    ):
        check_no_keys(f"{source.name}: {problem}", names)
    modules, places = {}, dict[str, None]()
    for name, key in downs.items():
        alpha = number(source, alphas[name].stored) if name in alphas else None
        modules[name], scaling = _module(source, key, ups[name], biases.get(name), alpha, statements)
        places |= dict.fromkeys(scaling.places)
    return modules, patches, tuple(places)


def _patches(file: str, by_role: Mapping[str, Mapping[str, LoraKey]]) -> dict[str, str]:
    """The exact changes: parameter names, and the keys of their tensors."""
    found: dict[str, str] = {}
    for role, ending in ((layouts.WEIGHT, ".weight"), (layouts.BIAS, ".bias"), (layouts.MODULATION, "")):
        for name, key in by_role.get(role, {}).items():
            parameter = name if name.endswith("modulation") else f"{name}{ending}"
            if parameter in found:
                raise CheckpointError(
                    f"{file}: {found[parameter]!r} and {key.stored!r} are for the same weight, {parameter}"
                )
            found[parameter] = key.stored
    return found


def _module(
    source: TensorSource,
    down_key: LoraKey,
    up_key: LoraKey,
    bias_key: LoraKey | None,
    tensor_alpha: float | None,
    statements: Sequence[Statement],
) -> tuple[LoraModule, Scaling]:
    down, up = source.shape(down_key.stored), source.shape(up_key.stored)
    is_product = len(down) >= 2 and len(up) >= 2 and down[0] == up[1] and down.numel() and set(up[2:]) <= {1}
    if not is_product or not up[0]:
        raise CheckpointError(
            f"{source.name}: {down_key.stored} {list(down)} and {up_key.stored} {list(up)} do not form a product; "
            "allowed: [rank, in] and [out, rank] of a linear layer, or those of a convolution"
        )
    if bias_key is not None and source.shape(bias_key.stored) != up[:1]:
        shape = list(source.shape(bias_key.stored))
        raise CheckpointError(f"{source.name}: {bias_key.stored} has shape {shape}; its half gives {[up[0]]}")
    kernel = () if set(down[2:]) <= {1} else tuple(down[2:])
    scaling = resolve(source.name, down_key, down[0], tensor_alpha, statements, is_conv=len(down) > 2)
    module = LoraModule(
        down_key=down_key.stored,
        up_key=up_key.stored,
        rank=down[0],
        in_features=down[1:].numel(),
        out_features=up[0],
        alpha=scaling.alpha,
        tensor_alpha=tensor_alpha,
        rule=scaling.rule,
        kernel=kernel,
        bias_key=bias_key.stored if bias_key else None,
    )
    return module, scaling
