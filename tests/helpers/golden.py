"""Access to the numeric fixtures computed with the original code (tests/golden)."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


def load_golden(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the manifest of one fixture."""
    tensors = load_file(GOLDEN / f"{name}.safetensors") if (GOLDEN / f"{name}.safetensors").exists() else {}
    return tensors, json.loads((GOLDEN / f"{name}.json").read_text())


def strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose key begins with ``prefix``, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
