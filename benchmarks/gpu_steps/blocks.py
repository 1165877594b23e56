"""Steps 4 to 7: one block in every number format, eager and compiled; a whole step; a denoise that never waits."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from benchmarks.gpu_steps.step import Bench, Grid, Row, attempt, num_tokens, require_package, wait
from benchmarks.harness import kernel_names, peak_gib, profile_run
from benchmarks.own_dit import Inputs, make_inputs, make_ours, make_quantized, run_ours, share_weights, step_tflop
from storymem_dist.diffusion.denoise import PromptEmbeds, StepInfo, denoise
from storymem_dist.diffusion.experts import ExpertPair
from storymem_dist.diffusion.guidance import LocalGuidance
from storymem_dist.diffusion.latent_grid import LatentGrid
from storymem_dist.diffusion.solver import Solver
from storymem_dist.models.attention import relative_distance
from storymem_dist.models.attention_choice import seconds_of
from storymem_dist.models.compile import compile_blocks
from storymem_dist.models.quantized_linear import LINEARS
from storymem_dist.models.rope import rope_tables
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import TINY

GUIDANCE_SCALE = 3.5
_GUARDED_STEPS = 7  # the host reads whether latents are finite at every eighth step

BlockArguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def time_block(bench: Bench) -> Iterator[Row]:
    """One block without compilation: time, peak memory, launches and error of every number format."""
    exact = _one_block(bench)
    for name, grid in bench.sizes.blocks.items():
        arguments = block_arguments(bench.sizes.config, exact.dtype, grid, bench.device)
        expected = exact.blocks[0](*arguments) - arguments[0]
        for linears in LINEARS:
            row: Row = {"size": name, "tokens": num_tokens(grid), "layers": linears}
            yield attempt(row, _measure_block, exact, linears, arguments, expected, bench.device)


def _measure_block(
    exact: WanDiT, linears: str, arguments: BlockArguments, expected: Tensor, device: torch.device
) -> Row:
    run = partial(make_quantized(exact, linears).blocks[0], *arguments)
    difference = relative_distance(run() - arguments[0], expected)
    return {
        "ms": seconds_of(run, device) * 1e3,
        "peak GiB": peak_gib(run, device),
        "kernels": profile_run(run, device).num_kernels,
        "difference": difference,
        "longest kernel": kernel_names(run, device)[0][:60],
    }


def time_compiled_block(bench: Bench) -> Iterator[Row]:
    """The same block compiled: seconds until the first result, and graphs, as the number of frames changes."""
    exact = _one_block(bench)
    for linears in bench.sizes.compiled_formats:
        torch._dynamo.reset()
        dit = make_quantized(exact, linears)
        compile_blocks(dit)
        for grid in bench.sizes.compiled:
            row: Row = {"layers": linears, "frames": grid[0], "tokens": num_tokens(grid)}
            yield attempt(row, _measure_compiled, dit, grid, bench)


def _measure_compiled(dit: WanDiT, grid: Grid, bench: Bench) -> Row:
    device, block = bench.device, dit.blocks[0]
    arguments = block_arguments(dit.config, dit.dtype, grid, device)
    before, start = counters["stats"]["unique_graphs"], time.perf_counter()
    block(*arguments)
    wait(device)
    first = time.perf_counter() - start
    seconds = seconds_of(lambda: block(*arguments), device)
    return {
        "first call, s": first,
        "new graphs": counters["stats"]["unique_graphs"] - before,
        "ms": seconds * 1e3,
        # On the CPU, counting live tensors would turn compilation off.
        "peak GiB": peak_gib(lambda: block(*arguments), device) if device.type == "cuda" else "",
    }


def time_model(bench: Bench) -> Iterator[Row]:
    """One guided step of the whole transformer: ours eager and compiled, and diffusers' where it is installed."""
    sizes, device = bench.sizes, bench.device
    ours = make_ours(sizes.config, sizes.dtype, device)
    inputs = make_inputs(sizes.config, sizes.model, device)
    row: Row = {"tokens": inputs.num_tokens, "TFLOP": step_tflop(sizes.config, inputs.num_tokens)}
    yield _speed(attempt(row | {"model": "ours"}, _measure_step, partial(run_ours, ours), inputs, device))
    torch._dynamo.reset()
    compiled = share_weights(ours)
    compile_blocks(compiled)
    measured = attempt(row | {"model": "ours, compiled"}, _measure_step, partial(run_ours, compiled), inputs, device)
    yield _speed(measured)
    yield _speed(attempt(row | {"model": "diffusers"}, _measure_diffusers, ours, inputs, device))


def _speed(row: Row) -> Row:
    return row | {"TFLOP/s": row["TFLOP"] / row["s/step"]} if "s/step" in row else row


def _measure_step(forward: Callable[[Inputs], Tensor], inputs: Inputs, device: torch.device) -> Row:
    def step() -> Tensor:
        conditional = forward(inputs)
        unconditional = forward(inputs.with_context(inputs.negative_context))
        return torch.lerp(unconditional, conditional, GUIDANCE_SCALE)

    start = time.perf_counter()
    step()
    wait(device)
    first = time.perf_counter() - start
    start = time.perf_counter()
    velocity = step()
    queued = time.perf_counter() - start
    wait(device)
    seconds = time.perf_counter() - start
    return {
        "first step, s": first,
        "s/step": seconds,
        "host done after, s": queued,
        "finite": bool(torch.isfinite(velocity).all()),
    }


def _measure_diffusers(ours: WanDiT, inputs: Inputs, device: torch.device) -> Row:
    require_package("diffusers")
    from benchmarks.rivals import make_diffusers, run_diffusers

    theirs = make_diffusers(ours)
    return _measure_step(lambda one: run_diffusers(theirs, one, ours.dtype), inputs, device)


def denoise_without_waiting(bench: Bench) -> Iterator[Row]:
    """Denoise with a small model while the device refuses every operation for which the host would wait."""
    require_package("diffusers")  # the solver's weights
    device, config = bench.device, TINY.i2v
    grid = LatentGrid(num_frames=9, height=64, width=64, num_memory=2)
    generator = torch.Generator().manual_seed(0)
    prompt = PromptEmbeds(
        prompt_LE=torch.randn(7, config.text_dim, generator=generator),
        negative_LE=torch.randn(3, config.text_dim, generator=generator),
    )
    experts = ExpertPair(
        high_noise=make_ours(config, bench.sizes.dtype, device),
        low_noise=make_ours(config, bench.sizes.dtype, device, seed=1),
        boundary_ratio=0.9,
        guidance_scale_high=GUIDANCE_SCALE,
        guidance_scale_low=GUIDANCE_SCALE,
    )
    guarded = 0

    def after_step(info: StepInfo) -> None:
        nonlocal guarded
        guarded += 0 < info.step < _GUARDED_STEPS
        _forbid_waiting(device, info.step < _GUARDED_STEPS)  # before the first step, inputs go to the device

    try:
        latents = denoise(
            experts,
            LocalGuidance(),
            Solver("unipc", num_steps=_GUARDED_STEPS, flow_shift=4.0),
            torch.randn(grid.latent_shape, generator=generator),
            torch.randn(20, *grid.latent_shape[1:], generator=generator),
            prompt,
            grid,
            device=device,
            on_step=after_step,
        )
    finally:
        _forbid_waiting(device, False)
    yield {"steps without waiting": guarded, "finite": bool(torch.isfinite(latents).all())}


def _forbid_waiting(device: torch.device, forbid: bool) -> None:
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error" if forbid else "default")


def block_arguments(config: DiTConfig, dtype: torch.dtype, grid: Grid, device: torch.device) -> BlockArguments:
    """Random arguments of a block: tokens, rotary tables, modulation and text."""
    frames, height, width = grid
    generator = torch.Generator(device).manual_seed(2)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    positions = torch.arange(frames, device=device)
    tables = rope_tables(positions, height // 2, width // 2, config.head_dim, device=device)
    tokens, text = randn(1, num_tokens(grid), config.dim), randn(1, config.text_len, config.dim).to(dtype)
    return tokens, *tables, 0.3 * randn(1, 6, config.dim), text


def _one_block(bench: Bench) -> WanDiT:
    return make_ours(replace(bench.sizes.config, num_layers=1), bench.sizes.dtype, bench.device)
