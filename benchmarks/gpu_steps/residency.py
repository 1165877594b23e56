"""Steps 8 and 9: experts whose weights wait in page-locked host memory, and what of it the allocator takes."""

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu_steps.programs import run_program
from benchmarks.gpu_steps.step import Bench, Row, SkippedError, attempt, num_tokens, wait
from benchmarks.harness import peak_gib
from benchmarks.own_dit import Inputs, make_inputs, make_ours, run_ours
from storymem_dist.diffusion.block_stream import BlocksThatFit, BlockStream, StreamedWeights, no_block
from storymem_dist.diffusion.experts import Residency
from storymem_dist.diffusion.host_swap import HostMemory
from storymem_dist.hardware import ALLOCATOR_VARIABLES, GIB
from storymem_dist.models.attention_choice import seconds_of
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import HIGH_NOISE
from storymem_dist.parallel.loading import build_expert, place_experts
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.weights.loading import StateDictSource

_CYCLES = 2


def time_streams(bench: Bench) -> Iterator[Row]:
    """One expert: resident, swapped whole, and streamed in part and whole; first and second forward, and the bits."""
    sizes, device = bench.sizes, bench.device
    expert = make_ours(sizes.config, sizes.dtype, device)
    inputs = make_inputs(sizes.config, sizes.stream, device)
    expected, resident = _forward(expert, inputs, device)
    expected, resident = _forward(expert, inputs, device)
    gigabytes = sum(parameter.nbytes for parameter in expert.parameters()) / 1e9
    row: Row = {"tokens": num_tokens(sizes.stream)}
    yield row | {"weights": "resident", "second forward, s": resident}
    start = time.perf_counter()
    weights = StreamedWeights(expert, HostMemory(device), device)
    wait(device)
    seconds = time.perf_counter() - start
    yield row | {"weights": "to page-locked memory", "s": seconds, "GB": gigabytes, "GB/s": gigabytes / seconds}
    start = time.perf_counter()
    weights.enter_device()
    wait(device)
    seconds = time.perf_counter() - start
    weights.leave_device()
    yield row | {"weights": "back to the device", "s": seconds, "GB": gigabytes, "GB/s": gigabytes / seconds}
    ways: dict[str, BlocksThatFit | None] = {
        "swapped: all blocks": None,
        f"streamed: {sizes.kept_blocks} blocks fit": lambda _expert, _tokens: sizes.kept_blocks,
        "streamed: none fits": no_block,
    }
    for name, that_fit in ways.items():
        residency = BlockStream({HIGH_NOISE: weights}, that_fit)
        yield attempt(row | {"weights": name}, _measure_residency, residency, expert, inputs, expected, device)


def _measure_residency(
    residency: Residency, expert: WanDiT, inputs: Inputs, expected: Tensor, device: torch.device
) -> Row:
    firsts: list[float] = []
    seconds: list[float] = []
    equal = True

    def cycles() -> None:
        nonlocal equal
        for _ in range(_CYCLES):
            residency.activate(HIGH_NOISE)
            for spent in (firsts, seconds):
                velocity, took = _forward(expert, inputs, device)
                spent.append(took)
                equal = equal and torch.equal(velocity, expected)
            residency.end_shot()

    peak = peak_gib(cycles, device)
    return {
        "first forward, s": min(firsts),
        "second forward, s": min(seconds),
        "peak GiB": peak,
        "same bits": equal,
    }


def _forward(expert: WanDiT, inputs: Inputs, device: torch.device) -> tuple[Tensor, float]:
    start = time.perf_counter()
    velocity = run_ours(expert, inputs)
    wait(device)
    return velocity, time.perf_counter() - start


def time_offload(bench: Bench) -> Iterator[Row]:
    """Offloaded and sharded weights, as a job starts them on one rank, against resident ones; pinned memory."""
    sizes, device = bench.sizes, bench.device
    config = replace(sizes.config, num_layers=sizes.offload_blocks)
    resident = make_ours(config, sizes.dtype, device)
    inputs = make_inputs(config, sizes.stream, device)
    expected = run_ours(resident, inputs)
    row: Row = {"blocks": sizes.offload_blocks, "tokens": num_tokens(sizes.stream)}
    yield row | {"weights": "resident", "s": seconds_of(partial(run_ours, resident, inputs), device)}
    source = StateDictSource("random", {name: value.cpu() for name, value in resident.state_dict().items()})
    resident.to("meta")
    for weights in ("fsdp_offload", "fsdp"):  # the second one starts NCCL and FSDP2, also on one rank
        settings = ParallelSettings(device=device.type, weights=weights)
        yield attempt(row, _measure_placed, config, source, settings, inputs, expected, bench)
    for setting in ("", "pinned_max_round_threshold_mb:1"):
        what = {"weights": f"each tensor pinned alone, {setting or 'no allocator setting'}"}
        yield attempt(row | what, _measure_pinning, setting, bench)


def _measure_placed(
    config: DiTConfig,
    source: StateDictSource,
    settings: ParallelSettings,
    inputs: Inputs,
    expected: Tensor,
    bench: Bench,
) -> Row:
    device = bench.device
    with start_session(settings, num_heads=config.num_heads) as session:
        before = _pinned_bytes(device)
        expert, report = build_expert(config, source, session=session, settings=settings, dtype=bench.sizes.dtype)
        modules, residency = place_experts([(HIGH_NOISE, expert)], device=device, weights=settings.weights, swap=False)
        pinned = _pinned_bytes(device) - before
        residency.activate(HIGH_NOISE)
        velocity = run_ours(modules[HIGH_NOISE], inputs)
        row: Row = {
            "weights": f"{settings.weights}, {session.backend or 'no process group'}",
            "s": seconds_of(partial(run_ours, modules[HIGH_NOISE], inputs), device),
            "weights GiB": report.bytes_read / GIB,
            "pinned GiB": pinned / GIB,
            "same bits": torch.equal(velocity, expected),
        }
        residency.release()
    return row


def _pinned_bytes(device: torch.device) -> int:
    """Page-locked memory that this process uses, without what torch's allocator keeps of an earlier step."""
    if device.type != "cuda":
        return 0
    counts = torch.cuda.host_memory_stats()
    return int(counts.get("active_bytes.current", counts["allocated_bytes.current"]))


def _measure_pinning(setting: str, bench: Bench) -> Row:
    """What a process of its own takes for the weights of some blocks if each is page-locked alone, as FSDP2 does it."""
    variables = dict.fromkeys(ALLOCATOR_VARIABLES[:2], setting) if setting else {}
    kept = {name: value for name, value in os.environ.items() if name not in ALLOCATOR_VARIABLES}
    config = bench.sizes.config
    arguments = [str(config.dim), str(config.ffn_dim), str(bench.sizes.offload_blocks)]
    done = run_program(
        [sys.executable, "-m", "benchmarks.gpu_steps.pinning", *arguments],
        min(60, bench.seconds_left()),
        kept | variables,
    )
    found = json.loads(done.output.strip().splitlines()[-1])
    if found["pinned"] is None:
        raise SkippedError("page-locked memory needs a GPU")
    return {"weights GiB": found["weights"] / GIB, "pinned GiB": found["pinned"] / GIB}
