"""A shot's LoRAs give what merging them gives, however weights are held, and leave nothing behind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from storymem_dist.diffusion.denoise import DenoiseState, DenoiseStopped
from storymem_dist.errors import ShotError, WeightsNotFound
from storymem_dist.models.wan.presets import TINY
from storymem_dist.pipeline import StoryMemPipeline
from storymem_dist.weights.checkpoints import dit_shapes
from storymem_dist.weights.lora import lora_list, open_loras
from storymem_dist.weights.tiny_checkpoint import generate_tiny_checkpoint
from tests.helpers.lora_shots import Loras, render, request, write_backbones, write_lora
from tests.helpers.tiny_dit import largest_error

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("loras")


@pytest.fixture(scope="module")
def shots(folder: Path) -> list[Loras]:
    """Shots of one job: with different LoRAs, alternating, for one expert, several at once, of no strength, without."""
    style = write_lora(folder / "style.safetensors", 1, exact=True)
    walk = write_backbones(folder / "walk", 2)
    return [
        [],
        [{"path": style}],
        [{"path": walk, "strength": 0.4}],
        [{"path": style}],
        [{"path": style, "expert": "low_noise", "strength": -0.5}],
        [{"path": walk, "strength": 0.4}, {"path": style, "scale_rule": "none", "strength": 0.5}],
        [{"path": style, "strength": 0.0}],
        [],
    ]


@pytest.fixture(scope="module")
def merged(folder: Path, shots: list[Loras]) -> list[Tensor]:
    """For each shot the latents of a job that has its LoRAs merged into the weights."""
    return [render(str(folder / "tiny"), [[]], merged=loras).latents[0] for loras in shots]


def test_the_shots_differ(merged: list[Tensor]) -> None:
    plain, style, walk, _, low, both, off, _ = merged
    pairs = [(plain, style), (plain, walk), (style, walk), (plain, low), (style, both), (walk, both)]
    assert min(largest_error(one, other) for one, other in pairs) > 1e-3
    assert torch.equal(plain, off)


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "resident": ({"experts": "resident"}, {}),
    "swap": ({"experts": "swap"}, {}),
    "stream": ({"experts": "stream"}, {}),
    "text keys": ({"experts": "resident", "cache_text_keys": True}, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_latents_equal_those_of_merged_loras(folder: Path, shots: list[Loras], merged: list[Tensor], form: str) -> None:
    model, layout = FORMS[form]
    found = render(str(folder / "tiny"), shots, model=model, layout=layout)
    for number, (latents, expected) in enumerate(zip(found.latents, merged, strict=True)):
        assert largest_error(latents, expected) <= TOLERANCE, f"shot {number}"
    first, *_, off, last = found.latents
    assert torch.equal(first, last) and torch.equal(first, off), "without LoRAs, as before them"
    assert torch.equal(found.latents[1], found.latents[3])
    assert found.weights_unchanged
    assert found.num_loads == {"t2v": 1}


def test_files_are_read_once_for_alternating_shots_and_costs_are_reported(folder: Path, shots: list[Loras]) -> None:
    found = render(str(folder / "tiny"), [shots[1], shots[2], shots[1], shots[2], []])
    assert found.num_reads == 2
    assert [used.already_read for used in found.used[:4]] == [False, False, True, True]
    sizes = dit_shapes(TINY.t2v)
    products = sum(2 * sum(shape) for name, shape in sizes.items() if name.endswith(".weight") and len(shape) == 2)
    assert found.used[1].device_gib * 2**30 == 4 * products, "of one expert at a time"
    assert found.used[0].device_seconds > 0
    assert (found.used[4].num_loras, found.used[4].device_gib) == (0, 0)


class MergedByHand:
    """Adds LoRAs to every layer's output by hooks, without the code that is tested."""

    def __init__(self, loras: Loras) -> None:
        self._loras = lora_list(list(loras))

    def __call__(self, engine: Any) -> None:
        for expert, module in engine.clips._experts._adapters._modules.items():
            for lora in open_loras(self._loras, expert, dit_shapes(TINY.t2v)):
                for key, shape in lora.shapes().items():
                    change = torch.zeros(shape)
                    lora.add_to(change, key, 0)
                    layer = module.get_submodule(key.removesuffix(".weight"))
                    layer.register_forward_hook(lambda _m, given, out, change=change: out + given[0] @ change.T)


@pytest.mark.parametrize("linears", ["int8", "float8"])
def test_8_bit_layers_add_the_exact_change_to_their_own_product(folder: Path, linears: str) -> None:
    path = write_lora(folder / "plain.safetensors", 5)
    model = {"linears": linears, "experts": "resident"}
    loras: Sequence[dict[str, Any]] = [{"path": path, "strength": 0.5}]
    by_hand = render(str(folder / "tiny"), [[]], model=model, change=MergedByHand(loras))
    found = render(str(folder / "tiny"), [[], loras, []], model=model)
    # Tokens are quantized: a last-bit difference before that may round to the next value.
    assert largest_error(found.latents[1], by_hand.latents[0]) <= 2e-2
    assert largest_error(found.latents[1], found.latents[0]) > 1e-1
    assert torch.equal(found.latents[0], found.latents[2])
    assert found.weights_unchanged


def test_a_shot_that_was_stopped_goes_on_to_the_same_latents(folder: Path, shots: list[Loras]) -> None:
    """Also where another shot with other LoRAs was rendered before, and where the process is another."""
    loras, states = shots[1], []

    def stop_midway(engine: Any) -> None:
        steps = iter(range(10))
        with pytest.raises(DenoiseStopped) as stopped:
            engine.clips.sample(request(loras), should_stop=lambda: next(steps) == 2)
        states.append(stopped.value.state)

    whole = render(str(folder / "tiny"), [loras]).latents[0]
    interrupted = render(str(folder / "tiny"), [shots[2], loras], change=stop_midway)
    assert torch.equal(interrupted.latents[1], whole)
    assert interrupted.weights_unchanged

    resumed: list[Tensor] = []

    def go_on(engine: Any) -> None:
        state: DenoiseState = states[0]
        resumed.append(engine.clips.sample(request(loras), resume=state))

    render(str(folder / "tiny"), [], change=go_on)
    assert torch.equal(resumed[0], whole)


def test_a_switch_that_fails_half_way_leaves_nothing_merged(
    folder: Path, shots: list[Loras], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = render(str(folder / "tiny"), [[]]).latents[0]

    def fail_midway(engine: Any) -> None:
        calls = iter(range(100))
        own = nn.Module.__setattr__

        def failing(module: nn.Module, name: str, value: Any) -> None:
            if name == "adapter" and value is not None and next(calls) == 7:
                raise torch.OutOfMemoryError("no memory for adapters")
            own(module, name, value)

        with monkeypatch.context() as patched:
            patched.setattr(nn.Module, "__setattr__", failing)
            with pytest.raises(torch.OutOfMemoryError):
                engine.clips.sample(request(shots[1]))

    found = render(str(folder / "tiny"), [[], shots[1], []], change=fail_midway)
    assert torch.equal(found.latents[0], plain) and torch.equal(found.latents[2], plain)
    assert found.weights_unchanged


def test_a_file_that_changed_since_the_plan_ends_the_shot(folder: Path) -> None:
    path = Path(write_lora(folder / "changing.safetensors", 7))
    planned = request([{"path": str(path)}])

    def changed(engine: Any) -> None:
        write_lora(path, 8)
        with pytest.raises(ShotError, match="has changed since the job began"):
            engine.clips.sample(planned)

    render(str(folder / "tiny"), [], change=changed)


def test_the_python_api_takes_loras_for_one_clip(folder: Path, shots: list[Loras]) -> None:
    tiny = generate_tiny_checkpoint(folder / "tiny")
    small = {"num_frames": 5, "height": 32, "width": 48, "steps": 2}
    style, walk = str(folder / "style.safetensors"), {"path": str(folder / "walk"), "strength": 0.4}
    with StoryMemPipeline(str(tiny.t2v_dir), None, device="cpu", dtype="float32") as pipeline:
        plain, styled, again = (pipeline.generate_t2v("a fox", **small, loras=one) for one in ((), style, ()))
        mixed = pipeline.generate_t2v("a fox", **small, loras=[style, walk])
        with pytest.raises(WeightsNotFound, match="no such file"):
            pipeline.generate_t2v("a fox", **small, loras=["/nowhere.safetensors"])
    assert torch.equal(plain, again)
    assert largest_error(styled, plain) > 1e-2 and largest_error(mixed, styled) > 1e-2


def test_low_memory_gives_the_same_latents(folder: Path, shots: list[Loras]) -> None:
    found: list[Tensor] = []

    def with_little_memory(engine: Any) -> None:
        found.append(engine.clips.sample(request(shots[1]), low_memory=True))

    whole = render(str(folder / "tiny"), [shots[1]], change=with_little_memory).latents[0]
    assert torch.equal(found[0], whole)
