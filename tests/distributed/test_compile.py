"""Ulysses and ring inside per-block compiled regions, under FSDP2, compute what one eager device computes.

The compiler's front end alone is used ("eager"): it captures, guards and decides about recompilation as always, but
does not spend minutes on generating code.
"""

from dataclasses import replace
from functools import partialmethod
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters

from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_dit import CONFIG, largest_error, make_dit, make_inputs

TOLERANCE = 1e-5
ONE_BLOCK = replace(CONFIG, num_layers=1)
CASES = [{"ulysses": 2, "weights": "fsdp"}, {"ring": 2, "weights": "fsdp"}]


def _compiled_errors(compiler: str) -> list[tuple[float, list[str]]]:
    """For each case the error, and why the compiler left its graph."""
    dist.init_process_group("gloo")
    single = make_dit(ONE_BLOCK)
    inputs = _inputs_of(3)  # 45 tokens: the last run is padded
    outcomes = []
    for case in CASES:
        torch._dynamo.reset()
        counters.clear()
        settings = ParallelSettings(compile=True, **case)
        with start_session(settings) as session, torch.no_grad():
            with patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend=compiler)):
                many = parallelize(make_dit(ONE_BLOCK), session.mesh, settings)
            assert set(many.state_dict()) == set(single.state_dict()), "parameter names must not change"
            error = largest_error(many(*inputs), single(*inputs))
            assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
            outcomes.append((error, sorted(counters["graph_break"])))
    return outcomes


def _inputs_of(times: int) -> tuple[torch.Tensor, ...]:
    return make_inputs(times=times)


def test_compiled_blocks_equal_one_device_and_only_the_ring_leaves_the_graph() -> None:
    for outcomes in run_ranks(_compiled_errors, 2, ("eager",), timeout_seconds=280):
        (ulysses_error, ulysses_breaks), (ring_error, ring_breaks) = outcomes
        assert max(ulysses_error, ring_error) <= TOLERANCE
        assert ulysses_breaks == []
        assert len(ring_breaks) == 1
        assert "_attend_on_ring" in ring_breaks[0]


STORY = (5, 6, 7, 8, 4, 9, 10)
"""Numbers of frames (15 tokens each). On 4 ranks the last runs are filled up by 1, 2, 3, 0, 0, 1 and 2 tokens."""


def _graphs_over_a_story(compiler: str) -> list[list[int]]:
    """For each layout, how many graphs there are after each size."""
    dist.init_process_group("gloo")
    single = make_dit()
    layouts = []
    for layout in ({"ulysses": 4}, {"ring": 4}, {"ulysses": 2, "ring": 2}):
        torch._dynamo.reset()
        counters.clear()
        settings = ParallelSettings(compile=True, **layout)
        with start_session(settings) as session, torch.no_grad():
            with patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend=compiler)):
                dit = parallelize(make_dit(), session.mesh, settings)
            num_graphs = []
            for times in STORY:
                inputs = _inputs_of(times)
                assert largest_error(dit(*inputs), single(*inputs)) <= TOLERANCE, (layout, times)
                num_graphs.append(counters["stats"]["unique_graphs"])
        layouts.append(num_graphs)
    return layouts


def test_graphs_serve_all_numbers_of_memory_frames_whether_or_not_ranks_divide_the_tokens() -> None:
    for ulysses, ring, both in run_ranks(_graphs_over_a_story, 4, ("eager",), timeout_seconds=280):
        assert ulysses == [1, 1, 1, 2, 2, 2, 2], "one graph with padding, one without"
        assert ring == [ring[0]] * len(STORY), "the parts around a ring never see padding"
        assert both == [both[0]] * len(STORY)
