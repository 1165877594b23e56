"""Layers in eight bits on several ranks: loaded part by part, gathered and multiplied as on one device."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.parallel.loading import build_expert, local_part, place_experts
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.weights.checkpoints import open_checkpoint
from storymem_dist.weights.loading import load_dit_weights
from storymem_dist.weights.lora import storymem_lora
from storymem_dist.weights.tiny_checkpoint import ModelFolders, generate_tiny_checkpoint
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_dit import largest_error, make_inputs

FORMATS = pytest.mark.parametrize("linears", ["float8", "int8"])
old_torch = pytest.mark.skipif(torch.__version__ < "2.13", reason="FSDP2 of older torch (2.10 was tried) refuses int8")
SHARDED_FORMATS = pytest.mark.parametrize("linears", ["float8", pytest.param("int8", marks=old_torch)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolders:
    return generate_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny")


def load_whole(tiny: ModelFolders, linears: str, expert: str = "high_noise") -> WanDiT:
    checkpoint = open_checkpoint(tiny.i2v_dir, "i2v")
    dit = WanDiT(checkpoint.dit_config, dtype=torch.bfloat16).eval().requires_grad_(False)
    quantize_linears(dit.blocks, linears)
    load_dit_weights(dit, checkpoint.expert(expert), [storymem_lora(tiny.lora_dir, "mi2v")[expert]])
    return dit


def _build(tiny: ModelFolders, linears: str, session, settings: ParallelSettings, expert: str = "high_noise"):
    checkpoint = open_checkpoint(tiny.i2v_dir, "i2v")
    return build_expert(
        checkpoint.dit_config,
        checkpoint.expert(expert),
        [storymem_lora(tiny.lora_dir, "mi2v")[expert]],
        session=session,
        settings=settings,
        dtype=torch.bfloat16,
        linears=linears,
    )


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def _differing(found: WanDiT, expected: WanDiT) -> list[str]:
    """Names of the parameters whose part here differs from those rows of the whole."""
    names = []
    for (name, one), (other_name, other) in zip(found.named_parameters(), expected.named_parameters(), strict=True):
        part = local_part(name, one)
        rows = other[part.row_offset : part.row_offset + part.num_rows]
        if name != other_name or one.dtype != other.dtype or not torch.equal(_as_bytes(part.tensor), _as_bytes(rows)):
            names.append(name)
    return names


@torch.no_grad()
def _on_layouts(tiny: ModelFolders, layouts: list[ParallelSettings], linears: str) -> list[dict[str, object]]:
    dist.init_process_group("gloo")
    whole = load_whole(tiny, linears)
    inputs = make_inputs(whole.config)
    expected = whole(*inputs)
    outcomes = []
    for settings in layouts:
        with start_session(settings) as session:
            dit, report = _build(tiny, linears, session, settings)
            held = sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in dit.parameters())
            velocity = dit(*inputs)
            outcomes.append(
                {
                    "differing": _differing(dit, whole),
                    "held_ratio": held / sum(p.nbytes for p in whole.parameters()),
                    "bytes_read": report.bytes_read,
                    "equal": torch.equal(velocity, expected),
                    "error": largest_error(velocity, expected),
                }
            )
    return outcomes


@SHARDED_FORMATS
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sharded_layers_have_the_bits_of_one_device(tiny: ModelFolders, linears: str, num_ranks: int) -> None:
    layouts = [
        ParallelSettings(cfg=2, ulysses=num_ranks // 2, weights="fsdp"),
        ParallelSettings(cfg=2, ulysses=num_ranks // 2, weights="fsdp_offload"),
        ParallelSettings(ring=num_ranks, weights="fsdp"),
    ]
    for outcomes in run_ranks(_on_layouts, num_ranks, (tiny, layouts, linears)):
        for settings, outcome in zip(layouts, outcomes, strict=True):
            assert outcome["differing"] == [], settings
            # (1, 6, D) modulation cannot be cut along its first dimension: rank 0 holds it whole
            assert outcome["held_ratio"] < 1.15 / num_ranks, settings
            if settings.ulysses == settings.ring == 1:
                assert outcome["equal"], settings
            # Measured: 0 with ulysses, 9.3e-3 with ring 4, where exact layers in bf16 differ by 1.7e-3.
            assert outcome["error"] < 2e-2, settings


@FORMATS
def test_one_rank_reads_and_quantizes_for_all(tiny: ModelFolders, linears: str) -> None:
    layouts = [ParallelSettings(), ParallelSettings(share_reads=False)]
    by_rank = run_ranks(_on_layouts, 2, (tiny, layouts, linears))
    for rank, (shared, alone) in enumerate(by_rank):
        assert shared["differing"] == alone["differing"] == []
        assert shared["equal"]
        assert alone["equal"]
        assert bool(shared["bytes_read"]) == (rank == 0)
        assert alone["bytes_read"] > 0


@torch.no_grad()
def _swapped(tiny: ModelFolders, linears: str, weights: str) -> list[bool]:
    settings = ParallelSettings(cfg=1 if weights == "replicated" else 2, weights=weights)
    names = ("high_noise", "low_noise")
    with start_session(settings) as session:
        built = ((name, _build(tiny, linears, session, settings, name)[0]) for name in names)
        experts, residency = place_experts(built, device=session.device, weights=weights, swap=True)
        whole = {name: load_whole(tiny, linears, name) for name in names}
        inputs = make_inputs(whole["high_noise"].config)
        equal = []
        for name in (*names, *names):
            residency.activate(name)
            equal.append(torch.equal(experts[name](*inputs), whole[name](*inputs)))
            residency.idle()
        return equal


@SHARDED_FORMATS
@pytest.mark.parametrize(("weights", "num_ranks"), [("replicated", 1), ("fsdp", 2)])
def test_experts_take_turns_on_the_device(tiny: ModelFolders, linears: str, weights: str, num_ranks: int) -> None:
    assert run_ranks(_swapped, num_ranks, (tiny, linears, weights)) == [[True] * 4] * num_ranks
