"""A ``WanDiT`` whose tokens are spread over ranks computes what one device computes."""

from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from storymem_dist.parallel import sequence
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.session import Session, start_session
from storymem_dist.parallel.settings import ParallelSettings
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_dit import largest_error, make_dit, make_inputs

TOLERANCE = 1e-5
SIZES = (
    {"times": 2, "height": 4, "width": 4},  # 8 tokens: divides by 2, 4 and 8
    {"times": 3, "height": 6, "width": 10},  # 45 tokens
    {"times": 1, "height": 2, "width": 10},  # 5 tokens: on 4 ranks of a ring the last holds none
    {"times": 5, "height": 2, "width": 10, "batch": 2},  # 25 tokens, both passes of guidance in one batch
)


def _errors_over_sizes(session: Session, settings: ParallelSettings) -> dict[str, float]:
    single = make_dit()
    many = parallelize(make_dit(), session.mesh, settings)
    names = set(single.state_dict())
    assert set(many.state_dict()) == names, "parameter names must not change"
    errors = {}
    with torch.no_grad():
        for size in SIZES:
            inputs = make_inputs(**size)
            errors[f"{settings.weights} {size}"] = largest_error(many(*inputs), single(*inputs))
    return errors


def _compare(ring: int, ulysses: int, all_weights: tuple[str, ...]) -> dict[str, float]:
    errors = {}
    dist.init_process_group("gloo")
    for weights in all_weights:
        settings = ParallelSettings(ring=ring, ulysses=ulysses, weights=weights)
        with start_session(settings, num_heads=4) as session:
            errors |= _errors_over_sizes(session, settings)
    return errors


@pytest.mark.parametrize(
    ("ring", "ulysses"), [(1, 2), (1, 4), (2, 1), (3, 1), (4, 1), (2, 2)], ids=lambda size: str(size)
)
def test_a_split_forward_equals_one_device(ring: int, ulysses: int) -> None:
    world_size = ring * ulysses
    for rank, errors in enumerate(run_ranks(_compare, world_size, (ring, ulysses, ("replicated", "fsdp")))):
        assert len(errors) == 2 * len(SIZES)
        for what, error in errors.items():
            assert error <= TOLERANCE, f"rank {rank}, {what}"


def _leave_padding_in_attention() -> dict[str, float]:
    start = sequence.TokenSplit.start

    def start_with_padding(split: sequence.TokenSplit, tokens_BLD: torch.Tensor) -> None:
        start(split, tokens_BLD)
        split.all_tokens_L0 = torch.empty(split.sequence.size * split.tokens_per_rank, 0)

    def padded(split: sequence.TokenSplit, ring_rank: int) -> int:
        return split.ulysses.size * split.tokens_per_rank

    with patch.multiple(sequence.TokenSplit, start=start_with_padding, tokens_on_ring=padded):
        return {name: error for ulysses in (1, 2) for name, error in _padded_errors(ulysses).items()}


def _padded_errors(ulysses: int) -> dict[str, float]:
    settings = ParallelSettings(ring=2 // ulysses, ulysses=ulysses)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    with start_session(settings) as session:
        return {f"ulysses {ulysses} {size}": error for size, error in _errors_over_sizes(session, settings).items()}


def test_padding_left_in_attention_would_be_seen() -> None:
    for errors in run_ranks(_leave_padding_in_attention, 2):
        for what, error in errors.items():
            divides = "'times': 2, 'height': 4" in what
            assert (error <= TOLERANCE) if divides else (error > 100 * TOLERANCE), what
