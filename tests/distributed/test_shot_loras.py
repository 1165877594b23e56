"""A shot's LoRAs on several ranks: latents as with merged ones, and each rank's part of the weights stays as it is."""

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tests.helpers.lora_shots import Loras, Rendered, render, write_backbones, write_lora
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_dit import largest_error

TOLERANCE = 1e-5
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "fsdp": (2, {"ulysses": 2, "weights": "fsdp"}, {}),
    "fsdp swapped": (2, {"cfg": 2, "weights": "fsdp"}, {"experts": "swap"}),
    "fsdp offload": (3, {"ring": 3, "weights": "fsdp_offload"}, {}),
    "replicated": (2, {"ring": 2}, {"experts": "stream", "cache_text_keys": True}),
    "8 bits": (2, {"ulysses": 2, "weights": "fsdp"}, {"linears": "float8"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def shots(folder: Path) -> list[Loras]:
    style = write_lora(folder / "style.safetensors", 1, exact=True)
    walk = write_backbones(folder / "walk", 2)
    return [[], [{"path": style}], [{"path": walk, "strength": 0.4}, {"path": style, "expert": "low_noise"}], []]


@pytest.fixture(scope="module")
def merged(folder: Path, shots: list[Loras]) -> list[Tensor]:
    return [render(str(folder / "tiny"), [[]], merged=loras).latents[0] for loras in shots]


@pytest.mark.parametrize("name", LAYOUTS)
def test_latents_equal_those_of_merged_loras(folder: Path, shots: list[Loras], merged: list[Tensor], name: str) -> None:
    num_ranks, layout, model = LAYOUTS[name]
    expected = merged
    if model.get("linears") == "float8":  # merged weights would be quantized to other values
        expected = render(str(folder / "tiny"), shots, model=model).latents
    arguments = (str(folder / "tiny"), shots, layout, model)
    for rank, found in enumerate(run_ranks(_render, num_ranks, arguments, timeout_seconds=200)):
        tolerance = 2e-2 if model.get("linears") == "float8" else TOLERANCE
        errors = [largest_error(one, other) for one, other in zip(found.latents, expected, strict=True)]
        assert max(errors) <= tolerance, f"rank {rank}: {errors}"
        assert found.latents[0].equal(found.latents[-1])
        assert found.weights_unchanged
        assert found.num_loads == {"t2v": 1}


def _render(root: str, shots: list[Loras], layout: dict[str, Any], model: dict[str, Any]) -> Rendered:
    return render(root, shots, layout=layout, model=model)


def _render_compiled(root: str, shots: list[Loras], layout: dict[str, Any]) -> tuple[Rendered, list[int]]:
    graphs: list[int] = []

    def count(engine: Any) -> None:
        sample = engine.clips.sample

        def counted(*given: Any, **named: Any) -> Tensor:
            latents: Tensor = sample(*given, **named)
            graphs.append(counters["stats"]["unique_graphs"])
            return latents

        engine.clips.sample = counted

    nn.Module.compile = partialmethod(nn.Module.compile, backend="eager")  # type: ignore[assignment,method-assign]
    return render(root, shots, layout={**layout, "compile": True}, change=count), graphs


def test_compiled_and_sharded_blocks_are_compiled_once_for_all_loras(folder: Path) -> None:
    whole = write_lora(folder / "whole.safetensors", 8, rank=2)
    part = write_lora(folder / "part.safetensors", 9, names=["blocks.1.ffn.0", "text_embedding.2"], rank=20)
    several = [{"path": path, "strength": 0.5} for path in (whole, part)]
    shots: list[Loras] = [[], [{"path": whole}], [], [{"path": part}], several]
    expected = render(str(folder / "tiny"), shots).latents
    arguments = (str(folder / "tiny"), shots, {"ulysses": 2, "weights": "fsdp"})
    for found, graphs in run_ranks(_render_compiled, 2, arguments, timeout_seconds=280):
        errors = [largest_error(one, other) for one, other in zip(found.latents, expected, strict=True)]
        assert max(errors) <= TOLERANCE, errors
        assert found.weights_unchanged
        assert graphs[2:] == [graphs[2]] * 3, f"a third shot and those after it compile nothing: {graphs}"


def test_a_file_that_is_damaged_for_one_rank_fails_the_shot_on_all(folder: Path) -> None:
    path = write_lora(folder / "damaged.safetensors", 3)
    for message in run_ranks(_read_damaged, 2, (str(folder / "tiny"), path), timeout_seconds=100):
        assert "NaN" in message


def _read_damaged(root: str, path: str) -> str:
    """What a shot raises whose file can be read by the first rank alone."""
    import os

    from storymem_dist.errors import CheckpointError
    from storymem_dist.weights.lora import ScaledLora
    from tests.helpers.lora_shots import request

    messages: list[str] = []

    def fail(engine: Any) -> None:
        halves = ScaledLora.halves

        def damaged(lora: ScaledLora, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            if os.environ["RANK"] == "1":
                raise CheckpointError(f"{lora.name}: {name} holds NaN or Inf")
            return halves(lora, name, dtype)

        ScaledLora.halves = damaged  # type: ignore[method-assign]
        try:
            engine.clips.sample(request([{"path": path}]))
        except CheckpointError as error:
            messages.append(str(error))
        ScaledLora.halves = halves  # type: ignore[method-assign]

    render(root, [[]], layout={"ulysses": 2}, change=fail)
    return messages[0]
