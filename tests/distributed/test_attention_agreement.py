"""All ranks of a replica run the attention kernel that their leader chose, also where their own times differ."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from storymem_dist.errors import ConfigError
from storymem_dist.models import attention_choice
from storymem_dist.models.attention import start_backend
from storymem_dist.models.wan.presets import TINY
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.render import attention as render_attention
from storymem_dist.render.attention import attention_form, decide_attention
from storymem_dist.weights.settings import ModelSettings
from tests.helpers.ranks import run_ranks

KERNELS = ("sdpa_math", "sdpa_flash")
MODEL = ModelSettings(dtype="float32")


def decide(settings: dict[str, int], cache: str, broken_on_rank: int | None) -> tuple[str, str, int]:
    """The decision of this rank, where the leader is fastest with one kernel and all others with the other one."""
    timed = 0
    with start_session(ParallelSettings(device="cpu", **settings)) as session:
        seconds = [0.2, 0.1] if session.is_leader else [0.1, 0.2]

        def clock(run: Callable[[], Any], device: torch.device) -> float:
            nonlocal timed
            timed += 1
            run()
            return seconds[(timed - 1) % 2]

        def start(kernel: str, **here: Any) -> None:
            if session.rank == broken_on_rank and kernel == "sdpa_flash":
                raise ConfigError("this rank's torch has no such kernel")
            start_backend(kernel, **here)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(render_attention, "CANDIDATES", KERNELS)
            patch.setattr(render_attention, "start_backend", start)
            patch.setenv("STORYMEM_CACHE", cache)
            model, words = decide_attention(MODEL, session, TINY.t2v, num_tokens=90, clock=clock)
    return model.attention, words, timed


@pytest.mark.parametrize("settings", [{"ulysses": 2}, {"ring": 2}, {"cfg": 2}])
def test_the_leader_times_and_all_ranks_take_its_kernel(settings: dict[str, int], tmp_path: Path) -> None:
    results = run_ranks(decide, 2, (settings, str(tmp_path), None))
    assert [result[0] for result in results] == ["sdpa_flash"] * 2
    assert results[0][1] == results[1][1] == "sdpa_flash (100 ms, 2.00x as fast as sdpa_math)"
    assert [result[2] for result in results] == [2, 0]


def test_replicas_decide_on_their_own_and_share_what_is_remembered(tmp_path: Path) -> None:
    run_ranks(decide, 2, ({"ulysses": 2}, str(tmp_path), None))
    again = run_ranks(decide, 4, ({"ulysses": 2}, str(tmp_path), None))
    assert [(result[0], result[2]) for result in again] == [("sdpa_flash", 0)] * 4
    assert {result[1] for result in again} == {"sdpa_flash (100 ms, 2.00x as fast as sdpa_math; measured before)"}


def test_a_kernel_that_one_rank_cannot_run_is_left_out_on_all(tmp_path: Path) -> None:
    results = run_ranks(decide, 2, ({"ulysses": 2}, str(tmp_path), 1))
    assert [result[0] for result in results] == ["auto"] * 2, "with one kernel left, torch decides"
    assert results[0][1] == "auto (flash)"


def form_of(settings: dict[str, int]) -> Any:
    with start_session(ParallelSettings(device="cpu", **settings)) as session:
        return attention_form(TINY.t2v, session.layout, torch.float32, 91)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ulysses": 2}, {"num_tokens": 91, "num_heads": TINY.t2v.num_heads // 2, "strided": True, "with_lse": False}),
        ({"ring": 2}, {"num_tokens": 46, "num_heads": TINY.t2v.num_heads, "strided": False, "with_lse": True}),
        ({"cfg": 2}, {"num_tokens": 91, "num_heads": TINY.t2v.num_heads, "strided": False, "with_lse": False}),
    ],
)
def test_the_shape_that_is_timed_is_what_a_rank_computes(settings: dict[str, int], expected: dict[str, Any]) -> None:
    for form in run_ranks(form_of, 2, (settings,)):
        assert {name: getattr(form, name) for name in expected} == expected


def test_a_kernel_that_the_settings_name_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_more: object) -> None:
        raise AssertionError("nothing may be timed")

    monkeypatch.setattr(attention_choice, "time_kernels", refuse)
    monkeypatch.setattr(render_attention, "choose_kernel", refuse)
    named = ModelSettings(dtype="float32", attention="sdpa_math")
    with start_session(ParallelSettings(device="cpu")) as session:
        assert decide_attention(named, session, TINY.t2v, num_tokens=90) == (named, "sdpa_math")
