"""The settings of one LoRA, and how a person may write them: a path, or a mapping with ``path`` and more."""

import difflib
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from storymem_dist.errors import ConfigError, WeightsNotFound, require_between, require_one_of
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.weights.lora.container import SUFFIXES
from storymem_dist.weights.lora.file import BOTH, REFUSE, UNMATCHED
from storymem_dist.weights.lora.scale import AUTO, SCALE_RULES

_WORDS = {
    "strength": "weight weights scale scaling multiplier factor lora_scale lora_weight lora_strength adapter_weight "
    "adapter_weights strength_model model_strength lora_multiplier ratio intensity",
    "path": "file filename name lora lora_path lora_name model_path weight_name safetensors id repo",
    "expert": "experts model noise stage target transformer which",
    "scale_rule": "rule rslora use_rslora scaling_rule rank_rule",
    "alpha": "lora_alpha network_alpha ss_network_alpha",
    "unmatched": "skip strict ignore missing unexpected",
}
"""Other programs' words for each of our keys."""

_MAX_SCALE = 1e6
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^:]+))?")
_HUB_URL = re.compile(
    r"(?:https?://)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/]+/[^/]+)(?:/(?:blob|resolve|tree)/[^/]+/?(?P<file>[^?#]*))?"
)


@dataclass(kw_only=True, slots=True)
class LoraSettings:
    """One LoRA to merge on top of the base weights.

    ``path``: a file, a folder of peft, or one with ``backbone_high_noise`` and ``backbone_low_noise`` files, which are
    for one expert each. ``scale_rule``: ``auto`` = what the file says, else alpha / rank (backbone files: rsLoRA, as
    StoryMem's own); ``rslora`` = alpha / sqrt(rank), ``alpha`` = alpha / rank, ``none`` = 1. The scale is multiplied by
    ``strength``. ``alpha`` None means the file's own alpha if it gives one, else the rank. ``expert`` is the expert to
    change, or ``both``: those that the file's keys name, else both. ``unmatched``: keys without a place in the
    transformer are refused (``refuse``), or left out and listed (``skip``).
    """

    path: str
    scale_rule: str = AUTO
    strength: float = 1.0
    alpha: float | None = None
    expert: str = BOTH
    unmatched: str = REFUSE

    def __post_init__(self) -> None:
        require_one_of("model.loras.scale_rule", self.scale_rule, SCALE_RULES)
        if self.expert not in (*EXPERTS, BOTH) and f"{self.expert}_noise" in EXPERTS:
            raise ConfigError(f"model.loras.expert={self.expert!r} is not allowed; did you mean {self.expert}_noise?")
        require_one_of("model.loras.expert", self.expert, (*EXPERTS, BOTH))
        require_one_of("model.loras.unmatched", self.unmatched, UNMATCHED)
        require_between("model.loras.strength", self.strength, -_MAX_SCALE, _MAX_SCALE)
        if self.alpha is not None:
            require_between("model.loras.alpha", self.alpha, 0, _MAX_SCALE)


def lora_list(given: Any) -> list[LoraSettings]:
    """The settings of all LoRAs from what a person gave as ``model.loras``: a list, or a single one.

    Raises:
        ConfigError: an entry is neither a path nor a mapping, or has another key; the message says which was meant.
    """
    if given is None:
        return []
    return [lora_settings(one) for one in (given if isinstance(given, list | tuple) else [given])]


_JOB = "model.loras"
"""Where the LoRAs of all shots are given; ``LoraSettings`` names it in its errors."""


def lora_settings(given: Any, where: str = _JOB) -> LoraSettings:
    """The settings of one LoRA, given at ``where`` as a path or as a mapping. Raises ``ConfigError``."""
    if isinstance(given, LoraSettings):
        return given
    if isinstance(given, str | Path) and str(given).strip():
        return LoraSettings(path=str(given))
    allowed = [one.name for one in fields(LoraSettings)]
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: {given!r} is not allowed; give a path, or a mapping with: {', '.join(allowed)}")
    for key in given:
        if key not in allowed:
            meant = _meant(str(key), allowed)
            if not meant and len(given) == 1 and isinstance(given[key], int | float):
                meant = f"{{path: {key}, strength: {given[key]}}}"
            raise ConfigError(
                f"{where}: {key!r} is not a key of a LoRA; "
                + (f"did you mean {meant}?" if meant else f"allowed: {', '.join(allowed)}")
            )
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key in ("strength", "alpha"):
            values[key] = None if value is None and key == "alpha" else _number(f"{where}: {key}", value)
        elif isinstance(value, str) and value.strip():
            values[key] = value
        else:
            raise ConfigError(f"{where}: {key}={value!r} is not allowed; it must be text")
    if "path" not in values:
        raise ConfigError(f"{where}: a LoRA without path: {dict(given)!r}; give the file as path: FILE")
    try:
        return LoraSettings(**values)
    except ConfigError as error:
        if where == _JOB:
            raise
        raise ConfigError(str(error).replace(f"{_JOB}.", f"{where}: ", 1)) from None


def explain_missing(path: str) -> None:
    """Raise ``WeightsNotFound`` with the command that fetches it if ``path`` is a repository's name or an address.

    A path of this machine whose file is missing passes.
    """
    if Path(path).exists():
        return
    url = _HUB_URL.fullmatch(path)
    found = url or _HUB_ID.fullmatch(path)
    if found is None:
        if re.match(r"[a-z]+://", path):
            raise WeightsNotFound(f"LoRA {path}: an address, not a file; download it and give the file's path")
        return
    repo, file = found["repo"], found["file"]
    is_local = (
        Path(repo).suffix in SUFFIXES or (file is not None and Path(repo).is_dir()) or repo.startswith(("./", "../"))
    )
    if is_local and url is None:
        return
    name = repo.rpartition("/")[2]
    command = ["hf", "download", repo, *([file] if file else []), "--local-dir", f"weights/{name}"]
    raise WeightsNotFound(
        f"LoRA {path}: no such file or folder; if it is in a repository on Hugging Face, get it with: "
        f"{shlex.join(command)} and give the path of the file"
    )


def _number(what: str, value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{what}={value!r} is not a number") from None


def _meant(key: str, allowed: list[str]) -> str | None:
    lowered = key.lower().replace("-", "_")
    for ours, words in _WORDS.items():
        if lowered == ours or lowered in words.split():
            return ours
    return next(iter(difflib.get_close_matches(lowered, allowed, n=1)), None)
