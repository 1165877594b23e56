"""Compiled code, too, computes queries and keys while the values travel. Inductor generates it; nothing is sent."""

import re
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.testing._internal.distributed.fake_pg import FakeStore

from storymem_dist.models.compile import LATE_WAITS
from storymem_dist.parallel.mesh import Axis
from storymem_dist.parallel.sequence import _arrived, _send_tokens_for_heads


@pytest.fixture
def ulysses() -> Iterator[Axis]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield Axis(name="ulysses", size=2, rank=0, group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()


def test_the_wait_for_the_values_comes_after_the_work_on_queries(ulysses: Axis) -> None:
    def layer(x: Tensor, to_v: Tensor, to_q: Tensor) -> Tensor:
        values = _send_tokens_for_heads([(x @ to_v).unflatten(-1, (2, -1))], ulysses)
        queries = _send_tokens_for_heads([(x @ to_q).unflatten(-1, (2, -1))], ulysses)
        (v,) = _arrived(values, ulysses)
        (q,) = _arrived(queries, ulysses)
        return q * v

    inputs = torch.randn(1, 6, 8), torch.randn(8, 8), torch.randn(8, 8)
    with torch.no_grad():
        _, (code, *_) = run_and_get_code(torch.compile(layer, options=LATE_WAITS), *inputs)
    order = re.findall(r"^ *(?:buf\d+ = )?(extern_kernels\.mm|torch\.ops\._c10d_functional\.\w+)", code, re.MULTILINE)
    multiply, send, wait = (
        "extern_kernels.mm",
        *(f"torch.ops._c10d_functional.{n}" for n in ("all_to_all_single", "wait_tensor")),
    )
    assert order == [multiply, send, multiply, send, wait, wait]
