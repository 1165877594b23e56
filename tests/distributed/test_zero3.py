"""DeepSpeed ZeRO-3 with weights in host memory computes what one device computes."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from storymem_dist.diffusion.text_cache import text_cache_of
from storymem_dist.models.adapters import Adapter, set_adapters
from storymem_dist.models.quantized_linear import quantize_linears
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.parallel.loading import build_expert, place_experts
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.parallel.zero3 import hand_to_zero3
from storymem_dist.weights.loading import StateDictSource, load_dit_weights
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_dit import CONFIG, largest_error, make_dit, make_inputs

pytest.importorskip("deepspeed")

WIDE = replace(CONFIG, dim=384, ffn_dim=512)
"""Wide enough that matrices exceed the 100,000 elements below which DeepSpeed keeps a parameter on the device."""


def _run_zero3() -> dict[str, object]:
    _use_no_compiled_extension()
    linear = torch.nn.functional.linear
    settings = ParallelSettings(weights="zero3")
    with start_session(settings) as session, torch.no_grad():
        single = [make_dit(WIDE, dtype=torch.bfloat16, seed=seed) for seed in (0, 1)]
        experts = {}
        for name, dit in zip(("high_noise", "low_noise"), single, strict=True):
            source = StateDictSource(name, dit.state_dict())
            experts[name], _ = build_expert(
                WIDE, source, session=session, settings=settings, dtype=torch.bfloat16, cache_text_keys=True
            )
        _, residency = place_experts(experts.items(), device=session.device, weights="zero3", swap=True)
        equal = []
        for step in range(6):
            name = ("high_noise", "low_noise")[step % 2]
            residency.activate(name)
            inputs = make_inputs(WIDE, times=1 + step // 2)
            cache = text_cache_of(experts[name])
            cache.forget()
            for _ in range(2):  # the second pass uses what the first one kept of the text
                with cache.during("cond"):
                    equal.append(torch.equal(experts[name](*inputs), single[step % 2](*inputs)))
        return {
            "equal": equal,
            "dtypes": sorted({str(p.dtype) for p in experts["low_noise"].parameters()}),
            "status": experts["low_noise"].blocks[0].ffn[0].weight.ds_status.name,
            "linear is torch's": torch.nn.functional.linear is linear,
        }


def test_a_zero3_replica_equals_one_device_bit_by_bit() -> None:
    (outcome,) = run_ranks(_run_zero3, 1, timeout_seconds=200)
    assert outcome["equal"] == [True] * 12
    assert outcome["dtypes"] == ["torch.bfloat16", "torch.float32"]
    assert outcome["status"] == "NOT_AVAILABLE", "an idle layer must not stay gathered"
    assert outcome["linear is torch's"]


def _run_quantized(linears: str) -> tuple[list[bool], str]:
    _use_no_compiled_extension()
    settings = ParallelSettings(weights="zero3")
    source = StateDictSource("here", make_dit(WIDE, dtype=torch.bfloat16).state_dict())
    single = WanDiT(WIDE, dtype=torch.bfloat16).eval().requires_grad_(False)
    quantize_linears(single.blocks, linears)
    load_dit_weights(single, source)
    with start_session(settings) as session, torch.no_grad():
        dit, _ = build_expert(WIDE, source, session=session, settings=settings, dtype=torch.bfloat16, linears=linears)
        equal = [torch.equal(dit(*inputs), single(*inputs)) for inputs in map(_inputs_of, (1, 2, 1))]
        return equal, dit.blocks[0].ffn[0].weight.ds_status.name


@pytest.mark.parametrize("linears", ["float8", "int8"])
def test_layers_in_eight_bits_are_fetched_as_they_are(linears: str) -> None:
    assert run_ranks(_run_quantized, 1, (linears,), timeout_seconds=200) == [([True] * 3, "NOT_AVAILABLE")]


def _partition_over_two_ranks() -> tuple[list[bool], float]:
    _use_no_compiled_extension()
    dist.init_process_group("gloo")
    single, many = (make_dit(WIDE, dtype=torch.bfloat16) for _ in range(2))
    num_elements = sum(p.numel() for p in many.parameters())
    hand_to_zero3(many, dist.group.WORLD, device=torch.device("cpu"), local_rank=dist.get_rank())
    with torch.no_grad():
        equal = [torch.equal(many(*inputs), single(*inputs)) for inputs in map(_inputs_of, (1, 2, 3))]
    return equal, sum(p.ds_tensor.numel() for p in many.parameters()) / num_elements


def _inputs_of(times: int) -> tuple[torch.Tensor, ...]:
    return make_inputs(WIDE, times=times)


def test_two_ranks_in_step_hold_half_of_the_weights_each_and_equal_one_device() -> None:
    for equal, held_ratio in run_ranks(_partition_over_two_ranks, 2, timeout_seconds=200):
        assert equal == [True] * 3
        assert held_ratio == pytest.approx(0.5, abs=0.01)


def _use_no_compiled_extension() -> None:
    """Without a GPU DeepSpeed would first compile a shared-memory collective, for minutes; gloo does without."""
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def _run_with_adapters() -> tuple[list[float], list[bool], str]:
    """Errors against merged weights of forwards with other adapters each; whether those without stay the same."""
    _use_no_compiled_extension()
    settings = ParallelSettings(weights="zero3")
    plain, inputs = make_dit(WIDE), make_inputs(WIDE)
    source, generator = StateDictSource("here", plain.state_dict()), torch.Generator().manual_seed(1)
    errors, equal = [], []
    with start_session(settings) as session, torch.no_grad():
        dit, _ = build_expert(WIDE, source, session=session, settings=settings, dtype=torch.float32)
        for names in (["blocks.0.ffn.0", "blocks.1.cross_attn.v", "head.head"], ["blocks.0.self_attn.norm_q"]):
            merged, adapters = make_dit(WIDE), {}
            for name in names:
                weight = merged.get_submodule(name).weight
                if weight.ndim == 1:
                    adapters[name] = Adapter(weight=torch.randn(weight.shape, generator=generator))
                    weight.add_(adapters[name].weight)
                    continue
                sizes = (4, weight.shape[1]), (weight.shape[0], 4)
                down, up = (0.1 * torch.randn(size, generator=generator) for size in sizes)
                adapters[name] = Adapter(down=down, up=up)
                weight.add_(up @ down)
            set_adapters(dit, adapters, session.device)
            errors.append(largest_error(dit(*inputs), merged(*inputs)))
            set_adapters(dit, {}, session.device)
            equal.append(torch.equal(dit(*inputs), plain(*inputs)))
        return errors, equal, dit.blocks[0].ffn[0].weight.ds_status.name


def test_adapters_are_added_to_layers_that_deepspeed_fetches() -> None:
    ((errors, equal, status),) = run_ranks(_run_with_adapters, 1, timeout_seconds=200)
    assert max(errors) <= 1e-5
    assert equal == [True, True]
    assert status == "NOT_AVAILABLE"
