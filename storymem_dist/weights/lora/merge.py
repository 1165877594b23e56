"""Adds a LoRA, with its scale, to rows of weights while they are loaded."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storymem_dist.errors import CheckpointError, WeightsNotFound, require_one_of
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.weights.loading import ROW_BLOCK
from storymem_dist.weights.lora.container import backbone_files
from storymem_dist.weights.lora.file import (
    BOTH,
    REFUSE,
    SKIP,
    LoraFile,
    LoraModule,
    open_backbone,
    open_lora_by_expert,
)
from storymem_dist.weights.lora.layouts import expert_in_name
from storymem_dist.weights.lora.scale import ALPHA_RULE, AUTO, RSLORA, SCALE_RULES, scale_of
from storymem_dist.weights.lora.settings import LoraSettings, explain_missing
from storymem_dist.weights.state_dict import first_keys


class ScaledLora:
    """A LoRA file with its scale: a ``WeightDelta`` for ``load_dit_weights``.

    Products are fp32, over fixed blocks of rows, so a weight's bits do not depend on the rows that a caller wants.
    Exact changes (patches) are multiplied by the strength alone.
    """

    def __init__(
        self, file: LoraFile, *, scale_rule: str = AUTO, alpha: float | None = None, strength: float = 1.0
    ) -> None:
        require_one_of("scale_rule", scale_rule, SCALE_RULES)
        self.file = file
        self.name = str(file.path)
        self._rule, self._alpha, self._strength = scale_rule, alpha, strength
        self._biases = {f"{name}.bias": name for name, module in file.modules.items() if module.bias_key}
        self._shapes = {f"{name}.weight": module.shape for name, module in file.modules.items()}
        self._shapes |= {key: torch.Size((file.modules[name].out_features,)) for key, name in self._biases.items()}
        for parameter, key in file.patches.items():
            shape = file.source.shape(key)
            if self._shapes.setdefault(parameter, shape) != shape:
                raise CheckpointError(
                    f"{self.name}: {key} has shape {list(shape)}, the halves for {parameter} give "
                    f"{list(self._shapes[parameter])}"
                )
        self._down: tuple[str, torch.device, Tensor, float] | None = None

    @property
    def identity(self) -> str:
        """Changes with the file's content and with the scale.

        Where the scales are those of the rule and the ``.alpha`` tensors alone, they are not part of it: such a LoRA
        has the same identity whether its rule is ``auto`` or the one that ``auto`` finds.
        """
        rule = ALPHA_RULE if self._rule == AUTO else self._rule
        described = f"{self.file.identity} {rule} {self._alpha} {self._strength}"
        scales = {name: self.scale(name) for name in self.file.modules}
        plain = {
            name: self._strength * scale_of(rule, _first(self._alpha, module.tensor_alpha, module.rank), module.rank)
            for name, module in self.file.modules.items()
        }
        if scales != plain:
            described = f"{self.file.identity} {sorted(scales.items())} {self._strength}"
        return hashlib.sha256(described.encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """File, scale and identity as plain values for manifests, records and reports."""
        file = self.file
        return {
            "path": str(file.path.resolve()),
            "file_identity": file.identity,
            "identity": self.identity,
            "scale_rule": self._rule,
            "alpha": self._alpha,
            "strength": self._strength,
            "expert_named_by_keys": file.expert,
            "rank": _counted(module.rank for module in file.modules.values()),
            "scale": _counted(f"{self.scale(name):.6g}" for name in file.modules),
            "scale_found_in": list(file.places),
            "rule_used": _counted(self._rule_of(module) for module in file.modules.values()),
            "num_targets": len(file.modules),
            "num_exact_changes": len(file.patches),
            "skipped_keys": list(file.unmatched),
        }

    def summary(self) -> str:
        """One line about what was found: rank, scale and where it stands, exact changes, skipped keys."""
        facts = self.describe()
        parts = []
        if self.file.modules:
            parts.append(f"{facts['num_targets']} targets of rank {facts['rank']}, scale {facts['scale']}")
            found = f"from {' and '.join(self.file.places)}" if self.file.places else "not stored: taken as the rank"
            parts.append(f"rule {facts['rule_used']}, alpha {found if self._alpha is None else 'from the settings'}")
        if self._biases:
            parts.append(f"{len(self._biases)} biases of lora_B")
        if self.file.patches:
            parts.append(f"{len(self.file.patches)} exact changes")
        if self.file.expert:
            parts.append(f"its keys name {self.file.expert}")
        if self.file.unmatched:
            parts.append(f"skipped {len(self.file.unmatched)} keys: {first_keys(self.file.unmatched)}")
        return f"{self.name}: {'; '.join(parts)}"

    def fitted(self, shapes: Mapping[str, torch.Size], *, unmatched: str = REFUSE) -> "ScaledLora":
        """This LoRA for a model of these parameters; ``skip`` leaves out what the model lacks or has in other sizes.

        Raises:
            CheckpointError: a target is not in the model or has another size, and is not skipped; or nothing is left.
        """
        flat = {
            name: shapes[f"{name}.weight"][2:]
            for name, module in self.file.modules.items()
            if not module.kernel
            and len(whole := shapes.get(f"{name}.weight", torch.Size())) > 2
            and whole[1:].numel() == module.in_features
        }
        if flat:  # halves of a convolution, stored as matrices: extracted LoRAs
            modules = {
                name: replace(one, kernel=tuple(flat.get(name, one.kernel))) for name, one in self.file.modules.items()
            }
            return self._with(replace(self.file, modules=modules)).fitted(shapes, unmatched=unmatched)
        wrong = [key for key, shape in self._shapes.items() if shapes.get(key) != shape]
        if not wrong:
            return self
        if unmatched != SKIP or len(wrong) == len(self._shapes):
            raise CheckpointError(self._misfit(wrong, shapes))
        modules, patches, left = dict(self.file.modules), dict(self.file.patches), list(self.file.unmatched)
        for key in wrong:
            left += [patches.pop(key)] if key in patches else []
            name = key.removesuffix(".weight").removesuffix(".bias")
            module = modules.get(name)
            if module is None:
                continue
            if key.endswith(".weight"):
                left += [module.down_key, module.up_key, *([module.bias_key] if module.bias_key else [])]
                del modules[name]
            elif module.bias_key:
                left.append(module.bias_key)
                modules[name] = replace(module, bias_key=None)
        return self._with(replace(self.file, modules=modules, patches=patches, unmatched=tuple(left)))

    def _with(self, file: LoraFile) -> "ScaledLora":
        return ScaledLora(file, scale_rule=self._rule, alpha=self._alpha, strength=self._strength)

    def scale(self, module_name: str) -> float:
        """The factor of the product of the two halves, strength included."""
        module = self.file.modules[module_name]
        alpha = _first(self._alpha, module.alpha, module.rank)
        return self._strength * scale_of(self._rule_of(module), alpha, module.rank)

    def shapes(self) -> Mapping[str, torch.Size]:
        """Shapes of the changed weights, by native parameter name."""
        return self._shapes

    def add_to(self, rows: Tensor, key: str, first_row: int) -> None:
        """Add ``scale * up @ down`` and exact changes, rows ``first_row ...``, to fp32 ``rows [n, ...]`` in place.

        Raises:
            CheckpointError: a tensor of the file holds NaN or Inf, or their product does.
        """
        held = slice(first_row, first_row + rows.shape[0])
        module = self.file.modules.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        if module is not None:
            self._add_product(rows, module, self.scale(key.removesuffix(".weight")), first_row)
        if name := self._biases.get(key):
            bias_key = self.file.modules[name].bias_key
            assert bias_key is not None
            rows.add_(self._read(bias_key, held)[0].to(rows.device), alpha=self.scale(name))
        if key in self.file.patches:
            rows.add_(self._read(self.file.patches[key], held)[0].to(rows.device), alpha=self._strength)

    def halves(self, module_name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``down [rank, in]`` and ``up [out, rank]`` of a module; ``up`` times the scale (in fp32), strength included.

        Raises:
            CheckpointError: a half holds NaN or Inf, or the scale or ``dtype`` makes it so.
        """
        module, halves = self.file.modules[module_name], []
        for key, scale in ((module.down_key, None), (module.up_key, self.scale(module_name))):
            stored = self.file.source.read(key).flatten(1)
            half = stored.to(dtype) if scale is None else stored.float().mul(scale).to(dtype)
            if not all(map(math.isfinite, torch.stack(half.aminmax()).tolist())):
                require_finite(stored, self.name, key)
                raise CheckpointError(f"{self.name}: {key} times its scale is too large for {dtype}")
            halves.append(half)
        return halves[0], halves[1]

    def exact_change(self, key: str) -> Tensor | None:
        """What is added to weight ``key`` next to the product of halves, fp32, strength included; None: nothing."""
        change = None
        if name := self._biases.get(key):
            change = self._read(self.file.modules[name].bias_key or "")[0].float() * self.scale(name)
        if key in self.file.patches:
            patch = self._read(self.file.patches[key])[0].float() * self._strength
            change = patch if change is None else change + patch
        if change is not None:
            require_finite(change, self.name, f"the change of {key}")
        return change

    @property
    def strength(self) -> float:
        """The factor of everything in it."""
        return self._strength

    def _add_product(self, rows: Tensor, module: LoraModule, scale: float, first_row: int) -> None:
        down, largest_down = self._down_half(module, rows.device)
        row, end = first_row, first_row + rows.shape[0]
        while row < end:
            block = row // ROW_BLOCK * ROW_BLOCK
            stop = min(end, block + ROW_BLOCK)
            up, largest = self._read(module.up_key, slice(block, min(block + ROW_BLOCK, module.out_features)))
            delta = up.to(rows.device).flatten(1).float() @ down
            if not abs(scale) * module.rank * largest * largest_down < torch.finfo(torch.float32).max:
                require_finite(delta * scale, self.name, f"the product of {module.up_key} and {module.down_key}")
            part = delta[row - block : stop - block].view(stop - row, *rows.shape[1:])
            rows[row - first_row : stop - first_row].add_(part, alpha=scale)
            row = stop

    def _down_half(self, module: LoraModule, device: torch.device) -> tuple[Tensor, float]:
        """The down half in fp32, and its largest value. The last one is kept: a weight arrives in several chunks."""
        if self._down is None or self._down[:2] != (module.down_key, device):
            down, largest = self._read(module.down_key)
            self._down = (module.down_key, device, down.to(device).flatten(1).float(), largest)
        return self._down[2:]

    def _read(self, key: str, rows: slice | None = None) -> tuple[Tensor, float]:
        tensor = self.file.source.read(key, rows)
        return tensor, require_finite(tensor, self.name, key)

    def _rule_of(self, module: LoraModule) -> str:
        return (module.rule or ALPHA_RULE) if self._rule == AUTO else self._rule

    def _misfit(self, wrong: Sequence[str], shapes: Mapping[str, torch.Size]) -> str:
        way_out = "" if len(wrong) == len(self._shapes) else "; to leave them out, give this LoRA unmatched: skip"
        absent = [key for key in wrong if key not in shapes]
        if absent:
            return f"{self.name}: the model has no such weights: {first_keys(absent)}{way_out}"
        key = wrong[0]
        return (
            f"{self.name}: made for another width: its {key} is {list(self._shapes[key])}, this model's is "
            f"{list(shapes[key])}{way_out}"
        )


def require_finite(tensor: Tensor, file: str, key: str) -> float:
    """The largest absolute value of a tensor. Raises ``CheckpointError`` naming file and key for NaN or Inf."""
    largest = float(tensor.float().abs().max()) if tensor.numel() else 0.0
    if not math.isfinite(largest):
        raise CheckpointError(f"{file}: {key} holds NaN or Inf; the file is damaged, or its training diverged")
    return largest


def open_loras(
    settings: Sequence[LoraSettings], expert: str, shapes: Mapping[str, torch.Size] | None = None
) -> list[ScaledLora]:
    """The LoRAs of a list that belong to ``expert``, opened, in order; checked against the model's ``shapes`` if given.

    Raises:
        WeightsNotFound, CheckpointError: as of ``open_lora_by_expert``; also when the keys of a file name one expert
            and its settings the other, and when a folder like StoryMem's has one file for settings of both experts.
    """
    loras = []
    for one in settings:
        explain_missing(one.path)
        backbones = backbone_files(Path(one.path))
        file = _of_folder(one, backbones, expert) if backbones else _of_file(one, expert)
        if file is None:
            continue
        rule = one.scale_rule
        if backbones and rule == AUTO and not any(module.rule for module in file.modules.values()):
            rule = RSLORA  # as of model.storymem_lora: such files are trained as StoryMem's own, which do not store it
        lora = ScaledLora(file, scale_rule=rule, alpha=one.alpha, strength=one.strength)
        loras.append(lora if shapes is None else lora.fitted(shapes, unmatched=one.unmatched))
    return loras


def _of_file(one: LoraSettings, expert: str) -> LoraFile | None:
    parts = open_lora_by_expert(one.path, unmatched=one.unmatched)
    if BOTH not in parts and one.expert not in (BOTH, *parts):
        raise CheckpointError(
            f"{one.path}: its keys name the {' and '.join(parts)} expert, its settings say expert: {one.expert}"
        )
    if one.expert not in (expert, BOTH):
        return None
    return parts.get(BOTH, parts.get(expert))


def _of_folder(one: LoraSettings, backbones: Mapping[str, Path], expert: str) -> LoraFile | None:
    """The part of a folder like StoryMem's that is for ``expert``."""
    for wanted in EXPERTS:
        if wanted not in backbones and one.expert in (wanted, BOTH):
            (found,) = backbones
            raise WeightsNotFound(
                f"LoRA {one.path}: this folder has backbone_{found} and no backbone_{wanted}.safetensors; if it is "
                f"for one expert alone, give this LoRA expert: {found}"
            )
    if one.expert not in (expert, BOTH):
        return None
    return open_backbone(backbones[expert], expert, unmatched=one.unmatched)


def lora_warnings(
    lora: ScaledLora, expert: str, *, does: str = "is merged into", where: str = "model.loras"
) -> list[str]:
    """A message if keys of a LoRA are left out, and if its file's name speaks of another expert than ``expert``."""
    messages = []
    if keys := lora.file.unmatched:
        messages.append(f"{lora.name}: {len(keys)} keys have no place and are left out: {', '.join(keys)}")
    named = expert_in_name(lora.file.path) if lora.file.expert is None else None
    if named not in (None, expert):
        messages.append(
            f"{lora.name}: its name says {named}, but it {does} {expert}; for one expert alone give it as "
            f"{{path: ..., expert: {named}}} in {where}"
        )
    return messages


def lora_facts(loras: Mapping[str, Sequence[ScaledLora]]) -> dict[str, list[dict[str, Any]]]:
    """The descriptions of the LoRAs of both experts, for records."""
    return {expert: [lora.describe() for lora in loras[expert]] for expert in EXPERTS if loras[expert]}


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _counted(values: Any) -> str:
    counts = Counter(map(str, values))
    return ", ".join(value if len(counts) == 1 else f"{value} (x{count})" for value, count in counts.most_common())
