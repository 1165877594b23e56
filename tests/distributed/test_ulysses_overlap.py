"""The values' exchange of Ulysses runs while queries and keys are normed and rotated: order, bytes, the same bits."""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from storymem_dist.models.attention import Attend
from storymem_dist.models.wan.dit import SelfAttention
from storymem_dist.parallel import sequence
from storymem_dist.parallel.mesh import Axis
from storymem_dist.parallel.parallelize import parallelize
from storymem_dist.parallel.sequence import SequenceParallelAttend
from storymem_dist.parallel.session import start_session
from storymem_dist.parallel.settings import ParallelSettings
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_dit import CONFIG, make_dit, make_inputs

TOKENS = 45  # 3 latent frames of 3 x 5: no number of ranks divides them


class Exchanges(TorchDispatchMode):
    """Notes every exchange when it is issued, with the bytes of this rank, and when it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("all_to_all_single", "wait_tensor"):
            self.order.append((name, args[0].nbytes if name == "all_to_all_single" else 0))
        return func(*args, **(kwargs or {}))


@contextmanager
def noting(attention: SelfAttention, order: list[tuple[str, int]]) -> Any:
    """Note the parts of ``attention`` in ``order``, too."""
    with patch.object(Attend, "forward", autospec=True, side_effect=Attend.forward) as attend:
        original = attend.side_effect

        def attended(*args: Any) -> Tensor:
            order.append(("attend", 0))
            return original(*args)

        attend.side_effect = attended
        handles = [
            module.register_forward_pre_hook(lambda *_, name=name: order.append((name, 0)))
            for name, module in (("v", attention.v), ("norm q", attention.norm_q), ("norm k", attention.norm_k))
        ]
        yield
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _order_in_one_layer(settings: ParallelSettings) -> list[tuple[str, int]]:
    with start_session(settings) as session:
        dit = parallelize(make_dit(replace(CONFIG, num_layers=1)), session.mesh, settings)
        with Exchanges() as exchanges, noting(dit.blocks[0].self_attn, exchanges.order):
            dit(*make_inputs())
        return exchanges.order


def test_values_travel_while_queries_and_keys_are_normed() -> None:
    settings = ParallelSettings(ulysses=2)
    rows = -(-TOKENS // settings.ulysses)
    one = rows * CONFIG.dim * 4  # bytes of this rank's values, of its queries, of its keys, of its output
    for order in run_ranks(_order_in_one_layer, 2, (settings,)):
        assert order[:-1] == [
            ("v", 0),
            ("all_to_all_single", one),
            ("norm q", 0),
            ("norm k", 0),
            ("all_to_all_single", 2 * one),
            ("wait_tensor", 0),
            ("wait_tensor", 0),
            ("attend", 0),
            ("all_to_all_single", one),
            ("wait_tensor", 0),
        ]
        assert order[-1] == ("attend", 0), "to the text, which needs no exchange"


def _packed(self: SequenceParallelAttend, q_BlNH: Tensor, k_BlNH: Tensor, v_BlNH: Tensor) -> Tensor:
    """All three in one exchange, after all three are there."""
    ulysses: Axis = self.split.ulysses
    q, k, v = sequence._arrived(sequence._send_tokens_for_heads([q_BlNH, k_BlNH, v_BlNH], ulysses), ulysses)
    if self.split.ring.size > 1:
        out = self._attend_on_ring(q, k, v)
    else:
        out = self._attend_to_rows(q, k, v, self.split.all_tokens_L0.shape[0])
    return sequence._trade_heads_for_tokens(out, ulysses)


@torch.no_grad()
def _equal_to_packed(settings: ParallelSettings) -> list[bool]:
    equal = []
    with start_session(settings) as session:
        for dtype in (torch.float32, torch.bfloat16):
            dit = parallelize(make_dit(dtype=dtype), session.mesh, settings)
            inputs = make_inputs()
            found = dit(*inputs)
            with (
                patch.object(SequenceParallelAttend, "begin", lambda self, v: v),
                patch.object(SequenceParallelAttend, "forward", _packed),
            ):
                equal.append(torch.equal(found, dit(*inputs)))
    return equal


@pytest.mark.parametrize(
    "settings",
    [ParallelSettings(ulysses=4), ParallelSettings(ring=2, ulysses=2), ParallelSettings(cfg=2, ulysses=2)],
    ids=["ulysses", "ring x ulysses", "guidance x ulysses"],
)
def test_no_bit_changes(settings: ParallelSettings) -> None:
    assert run_ranks(_equal_to_packed, 4, (settings,)) == [[True, True]] * 4
