"""The self-test passes where ranks agree, and names layout, collective and rank where they do not."""

import contextlib
import io
import os
import time
from unittest.mock import patch

import pytest
import torch.distributed as dist

from storymem_dist.parallel import sequence
from storymem_dist.selftest import __main__ as selftest
from tests.helpers.ranks import run_ranks

OPTIONS = ("--device", "cpu", "--block-dim", "256")


def _run_selftest(*options: str) -> tuple[int, str]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = selftest.main([*OPTIONS, *options])
    return code, shown.getvalue()


@pytest.mark.float8
def test_two_ranks_that_agree_pass_on_every_layout() -> None:
    (code, shown), (other_code, silent) = run_ranks(_run_selftest, 2)
    assert (code, other_code) == (0, 0)
    assert silent == "", "one rank reports"
    for layout in ("ulysses 2, replicated", "ring 2 x ulysses 1, fsdp", "cfg 2 x ring 1 x ulysses 1, fsdp_offload"):
        assert layout in shown
    for number_format in ("float8", "int8"):
        assert f"ring 2 x ulysses 1, fsdp               transformer 2 x 320, {number_format}" in shown
    assert "transformer 1 x 256, bfloat16" in shown
    assert "all equal to one device" in shown


def _corrupt_rank_1() -> tuple[int, str]:
    exchange = dist.all_to_all_single

    def wrong_on_one_rank(received, sent, *splits, **options):  # type: ignore[no-untyped-def]
        exchange(received, sent, *splits, **options)
        if os.environ["RANK"] == "1" and received.numel():
            received.view(-1)[0] += 1

    finish = sequence._finish_exchange

    def wrong_in_the_model(arriving, ulysses):  # type: ignore[no-untyped-def]
        received = finish(arriving, ulysses)
        if os.environ["RANK"] == "1":
            received.view(-1)[0] += 1
        return received

    with (
        patch.object(dist, "all_to_all_single", wrong_on_one_rank),
        patch.object(sequence, "_finish_exchange", wrong_in_the_model),
    ):
        return _run_selftest()


def test_a_collective_that_is_wrong_on_one_rank_is_named() -> None:
    (code, shown), (other_code, _) = run_ranks(_corrupt_rank_1, 2)
    assert (code, other_code) == (1, 1)
    layout = "replica 1 x cfg 1 x ring 1 x ulysses 2, replicated"
    assert f"FAILED {layout}: all_to_all over ulysses: rank 1: error 1.0e+00" in shown
    assert f"FAILED {layout}: all_to_all over ulysses: rank 0" not in shown
    assert f"FAILED {layout}: transformer 2 x 320, float32: rank 1" in shown
    assert "ring 2 x ulysses 1, replicated" in shown, "a wrong result does not end the test"


def _rank_1_is_late() -> tuple[int, str]:
    if os.environ["RANK"] == "1":
        send = dist.batch_isend_irecv

        def late(ops):  # type: ignore[no-untyped-def]
            time.sleep(3)
            return send(ops)

        with patch.object(dist, "batch_isend_irecv", late):
            return _run_selftest("--timeout-seconds", "2")
    return _run_selftest("--timeout-seconds", "2")


def test_a_collective_that_hangs_is_named_and_ends_the_test() -> None:
    (code, shown), (other_code, _) = run_ranks(_rank_1_is_late, 2)
    assert (code, other_code) == (1, 1)
    assert "ring 2 x ulysses 1, replicated: send/receive over ring: rank 0: RuntimeError" in shown
    assert "out of step" in shown
    assert "cfg 2" not in shown
