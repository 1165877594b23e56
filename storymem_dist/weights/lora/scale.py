"""By how much a LoRA is multiplied: every place where trainers keep alpha, rank and the rule, read and compared.

Source of the rules: alpha / rank is the usual one (``alpha``); rsLoRA (arXiv 2312.03732) is alpha / sqrt(rank).
StoryMem's files are rsLoRA with alpha = rank = 128, so their scale is 11.3137; the files do not store this.

Places: ``.alpha`` tensors (kohya), the header of a safetensors file (``alpha``, ``rank``, kohya's ``ss_network_alpha``,
diffusers' ``lora_adapter_metadata``), ``adapter_config.json`` (peft), and plain values next to the tensors of a ``.pt``
file. Sources that contradict each other are refused, naming both.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from storymem_dist.errors import CheckpointError
from storymem_dist.models.wan.presets import HIGH_NOISE, LOW_NOISE
from storymem_dist.weights.lora.layouts import HIGH_WITH_LOW, LoraKey
from storymem_dist.weights.lora.patterns import ModulePatterns

AUTO, RSLORA, ALPHA_RULE, NONE = "auto", "rslora", "alpha", "none"
SCALE_RULES = (AUTO, RSLORA, ALPHA_RULE, NONE)

ALPHA_NAMES = ("alpha", "lora_alpha", "network_alpha", "ss_network_alpha")
RANK_NAMES = ("rank", "r", "lora_rank", "lora_dim", "network_dim", "ss_network_dim")
_RULE_NAMES = ("use_rslora", "rslora", "rs_lora")
_UNSET = ("", "none", "null", "dynamic")  # kohya's resizing writes "Dynamic" where layers differ
_PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8}  # peft.LoraConfig's, for what a configuration leaves out
_OTHER_BASE = ("pissa", "olora", "loftq", "corda", "orthogonal", "lora_ga")  # peft changes base weights with these
_ADAPTER_METADATA = "lora_adapter_metadata"
_COMPONENTS = {"transformer": HIGH_WITH_LOW, "transformer_1": HIGH_NOISE, "transformer_2": LOW_NOISE}


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """What one place says. ``rule`` is ``rslora``, ``alpha`` or None (it says nothing), ``expert`` whose keys it means.

    ``is_baked``: the file's ``.alpha`` tensors hold the alpha with which alpha / rank gives this place's scale.
    """

    place: str
    expert: str | None = None
    alpha: float | None = None
    rank: int | None = None
    rule: str | None = None
    conv_alpha: float | None = None
    conv_rank: int | None = None
    alpha_pattern: ModulePatterns | None = None
    rank_pattern: ModulePatterns | None = None
    is_baked: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """What the file says of one module. ``alpha`` and ``rule`` are None where it says nothing."""

    alpha: float | None
    rule: str | None
    places: tuple[str, ...]


def scale_of(rule: str, alpha: float, rank: int) -> float:
    """The factor of the product of the halves: alpha / sqrt(rank), alpha / rank, or 1."""
    if rule == NONE:
        return 1.0
    return alpha / (math.sqrt(rank) if rule == RSLORA else rank)


def read_statements(file: str, metadata: Mapping[str, Any], config: Mapping[str, Any] | None) -> list[Statement]:
    """What the header (or the values next to the tensors) and ``adapter_config.json`` say.

    Raises:
        CheckpointError: a value is no number, or two names in one place contradict each other.
    """
    statements = []
    header = _Values(file, "its header", _without_zero_alpha(metadata))
    lycoris = header.nested("ss_network_args")
    plain = Statement(
        place="its header",
        alpha=header.number(ALPHA_NAMES),
        rank=header.whole(RANK_NAMES),
        rule=header.rule() or lycoris.rule(),
        conv_alpha=lycoris.number(("conv_alpha",)),
        conv_rank=lycoris.whole(("conv_dim",)),
        is_baked=header.rule() is None and lycoris.rule() == RSLORA,  # LyCORIS multiplies its alphas by sqrt(rank)
    )
    if (plain.alpha, plain.rank, plain.rule) != (None, None, None):
        statements.append(plain)
    adapter = header.nested(_ADAPTER_METADATA).values
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in adapter.items():
        component, dot, name = key.partition(".")
        if isinstance(value, Mapping) and key in _COMPONENTS:
            by_component.setdefault(key, {}).update(value)
        elif dot and component in _COMPONENTS:
            by_component.setdefault(component, {})[name] = value
        else:
            by_component.setdefault("", {})[key] = value
    for component, values in by_component.items():
        where = f"{_ADAPTER_METADATA} in its header" + (f" ({component})" if component else "")
        statements.append(_peft_statement(file, where, values, _COMPONENTS.get(component)))
    if config is not None:
        statements.append(_peft_statement(file, "adapter_config.json", config, None))
    return statements


def _without_zero_alpha(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Without kohya's ``ss_network_alpha`` of 0: its scripts record what was typed, and take 0 as the rank."""
    is_zero = str(metadata.get("ss_network_alpha")).strip() in ("0", "0.0")
    return {key: value for key, value in metadata.items() if not (is_zero and key == "ss_network_alpha")}


def resolve(
    file: str, key: LoraKey, rank: int, tensor_alpha: float | None, statements: Iterable[Statement], *, is_conv: bool
) -> Scaling:
    """Compare what all places say of one module, whose halves have ``rank``.

    Raises:
        CheckpointError: two places contradict each other; the message names both.
    """
    alphas: list[tuple[str, float, Statement | None]] = []
    rules: list[tuple[str, str]] = []
    if tensor_alpha is not None:
        alphas.append(("its .alpha tensors", tensor_alpha, None))
    for statement in statements:
        stated_rank = _by_pattern(statement.rank_pattern, key, statement.rank)
        stated_alpha = _by_pattern(statement.alpha_pattern, key, statement.alpha)
        if is_conv and statement.conv_rank is not None:
            stated_rank, stated_alpha = statement.conv_rank, statement.conv_alpha or stated_alpha
        if stated_rank is not None and stated_rank != rank:
            raise CheckpointError(
                f"{file}: contradicts itself: {statement.place} gives rank {stated_rank:g}, the halves of "
                f"{key.stored_module} have rank {rank}"
            )
        if stated_alpha is not None:
            alphas.append((statement.place, stated_alpha, statement))
        if statement.rule is not None and not (statement.is_baked and tensor_alpha is not None):
            rules.append((statement.place, statement.rule))
    for place, asked in rules[1:]:
        if asked != rules[0][1]:
            raise CheckpointError(
                f"{file}: contradicts itself: {rules[0][0]} asks for the scale rule {rules[0][1]}, {place} for {asked}"
            )
    for place, alpha, said in alphas[1:]:
        first_place, first_alpha, _ = alphas[0]
        baked = tensor_alpha is not None and said is not None and said.rule == RSLORA
        allowed = (first_alpha, first_alpha / math.sqrt(rank)) if baked else (first_alpha,)
        if not any(math.isclose(alpha, one, rel_tol=1e-2) for one in allowed):  # alphas may be stored as bf16
            raise CheckpointError(
                f"{file}: contradicts itself: alpha of {key.stored_module} is {first_alpha:g} in {first_place} and "
                f"{alpha:g} in {place}"
            )
    rule = rules[0][1] if rules else None
    places = tuple(dict.fromkeys([place for place, *_ in alphas] + [place for place, _ in rules]))
    if not alphas:
        return Scaling(alpha=None, rule=rule, places=places)
    exact = min(alphas, key=lambda one: one[2] is None) if rule == RSLORA else alphas[0]
    return Scaling(alpha=exact[1], rule=rule, places=places)


def _peft_statement(file: str, place: str, given: Mapping[str, Any], expert: str | None) -> Statement:
    values = _Values(file, place, given)
    kind = str(given.get("peft_type") or "LORA").rpartition(".")[2].upper()
    if kind != "LORA":
        raise CheckpointError(f"{file}: {place} says peft_type={kind}: not a LoRA; only LoRAs can be merged")
    if values.flag("use_dora"):
        raise CheckpointError(
            f"{file}: {place} says use_dora: DoRA also rescales every row of a weight; it is not supported, only plain "
            "LoRAs can be merged"
        )
    start = str(given.get("init_lora_weights")).lower()
    if start.startswith(_OTHER_BASE):
        raise CheckpointError(
            f"{file}: {place} says init_lora_weights={start}: it changes the base weights as well, so the halves do "
            "not fit the published ones; peft converts some of these (save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    if given.get("alora_invocation_tokens"):
        raise CheckpointError(
            f"{file}: {place} says alora_invocation_tokens: an activated LoRA counts for some tokens only; it cannot "
            "be merged"
        )
    alpha, rank = values.number(("lora_alpha", "alpha")), values.whole(("r", "rank"))
    alpha_pattern, rank_pattern = (values.nested(name).patterns() for name in ("alpha_pattern", "rank_pattern"))
    return Statement(
        place=place,
        expert=expert,
        alpha=_PEFT_DEFAULTS["lora_alpha"] if alpha is None else alpha,
        rank=_PEFT_DEFAULTS["r"] if rank is None else rank,
        rule=values.rule(),
        alpha_pattern=alpha_pattern,
        rank_pattern=rank_pattern,
    )


def _by_pattern(patterns: ModulePatterns | None, key: LoraKey, default: float | None) -> float | None:
    found = patterns.find((key.plain_module, key.stored_module)) if patterns else None
    return default if found is None else found


class _Values:
    """Values of one place by name; texts that hold JSON or numbers count as what they hold."""

    def __init__(self, file: str, place: str, values: Mapping[str, Any]) -> None:
        self._file, self._place, self.values = file, place, values

    def number(self, names: Iterable[str]) -> float | None:
        """The finite number under any of ``names``; None without one."""
        found = {name: value for name in names if (value := self._one(name)) is not None}
        for name, value in found.items():
            first = next(iter(found))
            if value != found[first]:
                raise CheckpointError(
                    f"{self._file}: contradicts itself: {self._place} has {first}={found[first]:g} and {name}={value:g}"
                )
        return next(iter(found.values()), None)

    def whole(self, names: Iterable[str]) -> int | None:
        """The positive whole number under any of ``names``; None without one."""
        value = self.number(names)
        if value is not None and (value != int(value) or value < 1):
            raise CheckpointError(
                f"{self._file}: {self._place} has the rank {value:g}; it must be a whole number from 1"
            )
        return None if value is None else int(value)

    def flag(self, name: str) -> bool | None:
        """A truth value, also as text; None without one."""
        value = self.values.get(name)
        text = str(value).strip().lower()
        if value is None or text in _UNSET:
            return None
        if text not in ("true", "false", "1", "0"):
            raise CheckpointError(f"{self._file}: {self._place} has {name}={value!r}; it must be true or false")
        return text in ("true", "1")

    def rule(self) -> str | None:
        """The scale rule that a flag for rsLoRA gives."""
        flags = {self.flag(name) for name in _RULE_NAMES} - {None}
        if len(flags) > 1:
            raise CheckpointError(f"{self._file}: contradicts itself: {self._place} says both rslora and not")
        return (RSLORA if flags.pop() else ALPHA_RULE) if flags else None

    def nested(self, name: str) -> "_Values":
        """The values of an object, or of JSON text; empty without one."""
        value = self.values.get(name)
        if isinstance(value, str) and value.strip().lower() not in _UNSET:
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise CheckpointError(f"{self._file}: {self._place} has {name} that is not JSON") from None
        if value is None or (isinstance(value, str) and value.strip().lower() in _UNSET):
            value = {}
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self._file}: {self._place} has {name} that is not a JSON object")
        return _Values(self._file, f"{name} in {self._place}", {str(key): one for key, one in value.items()})

    def patterns(self) -> ModulePatterns | None:
        """All values as numbers, by regular expressions; None without any."""
        found = {name: self._one(name) for name in self.values}
        numbers = {name: value for name, value in found.items() if value is not None}
        return ModulePatterns(f"{self._file}: {self._place}", numbers) if numbers else None

    def _one(self, name: str) -> float | None:
        value = self.values.get(name)
        if value is None or str(value).strip().lower() in _UNSET:
            return None
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise CheckpointError(f"{self._file}: {self._place} has {name}={value!r}; it must be a finite number")
        return number
