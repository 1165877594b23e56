"""Sequence parallelism for a finished ``WanDiT``: Ulysses, ring, or both (USP), applied from outside with hooks.

Tokens are cut into equal runs, one per rank of the ``sequence`` axis (ring x ulysses, ulysses fastest), right after the
patch embedding, and joined after the head; everything in between works token by token, except self-attention. There a
Ulysses all-to-all trades tokens for heads: that of the values runs while queries and keys are normed and rotated, which
then travel packed into one message. A ring passes keys and values on while each rank attends to those it holds and
merges partial results by their log-sum-exp. The last run is padded with zero tokens; they are cut off *before*
attention, so no mask is needed and nothing attends to padding.

Knows nothing about weights, guidance or replicas.

Legend: B batch, L tokens of the whole sequence, l tokens per rank, N heads, n heads per ulysses rank, H head width,
R ring size, U ulysses size.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from storymem_dist.errors import LayoutError
from storymem_dist.models.attention import Attend, attend_with_lse
from storymem_dist.models.wan.dit import SelfAttention, WanDiT
from storymem_dist.parallel.clock import timed
from storymem_dist.parallel.mesh import Axis, ReplicaMesh


class TokenSplit:
    """How the tokens of the running forward are spread over the ``sequence`` axis.

    ``num_tokens`` is set when a forward's tokens are split. Compiled blocks must not read it: a number on a module is
    a constant to them, and each new value costs a compilation. They use the size of ``all_tokens_L0``, a tensor without
    elements. One graph then serves all numbers of tokens with padding, and one all numbers without.
    """

    def __init__(self, mesh: ReplicaMesh) -> None:
        self.use((mesh.ring, mesh.ulysses, mesh.sequence))
        self.num_tokens = 0
        self.all_tokens_L0 = torch.empty(0, 0)

    def use(self, axes: tuple[Axis, Axis, Axis]) -> None:
        """Spread the tokens of later forwards over these axes: ``ring``, ``ulysses``, ``sequence``."""
        self.ring, self.ulysses, self.sequence = axes

    @property
    def axes(self) -> tuple[Axis, Axis, Axis]:
        """The axes of ``use``."""
        return self.ring, self.ulysses, self.sequence

    def start(self, tokens_BLD: Tensor) -> None:
        """Set the number of tokens to that of ``tokens_BLD``."""
        self.num_tokens = tokens_BLD.shape[1]
        self.all_tokens_L0 = tokens_BLD.new_empty(self.num_tokens, 0)

    @property
    def tokens_per_rank(self) -> int:
        """l: rows that every rank works on, the padding of the last ones included."""
        return -(-self.num_tokens // self.sequence.size)

    def tokens_on_ring(self, ring_rank: int) -> int:
        """Real tokens of the run that the ulysses group at ``ring_rank`` holds together (0 is possible)."""
        run = self.ulysses.size * self.tokens_per_rank
        return min(run, max(0, self.num_tokens - ring_rank * run))

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """This rank's run of ``x`` along ``dim`` (of size ``num_tokens``), zero-padded, in memory of its own."""
        length = self.tokens_per_rank
        start = min(self.sequence.rank * length, self.num_tokens)
        stop = min(start + length, self.num_tokens)
        run = x.narrow(dim, start, stop - start)
        if stop - start == length:
            return run.clone(memory_format=torch.contiguous_format)
        padding = list(x.shape)
        padding[dim] = length - (stop - start)
        return torch.cat([run, x.new_zeros(padding)], dim)

    def join(self, x_BlX: Tensor) -> Tensor:
        """The whole sequence ``[B, L, X]`` on every rank, without the padding."""
        runs = [torch.empty_like(x_BlX) for _ in range(self.sequence.size)]
        with timed(self.sequence.clock):
            dist.all_gather(runs, x_BlX.contiguous(), group=self.sequence.group)
        return torch.cat(runs, dim=1)[:, : self.num_tokens]


class SequenceParallelAttend(Attend):
    """Replaces the ``attend`` of a self-attention whose tokens are spread over ranks."""

    def __init__(self, attend: Attend, split: TokenSplit) -> None:
        super().__init__(attend.backend)
        self.attend = attend
        self.split = split

    def begin(self, v_BlNH: Tensor) -> Tensor:
        """Start to trade the values' tokens for heads (where ``ulysses`` is above 1); does not wait for them."""
        return v_BlNH if self.split.ulysses.size == 1 else _send_tokens_for_heads([v_BlNH], self.split.ulysses)

    def forward(self, q_BlNH: Tensor, k_BlNH: Tensor, v_BlNH: Tensor) -> Tensor:
        """This rank's tokens attend to all tokens: ``[B, l, N, H]``. Collective over the ``sequence`` axis.

        ``v_BlNH`` is what ``begin`` returned.
        """
        ulysses = self.split.ulysses
        if ulysses.size == 1:
            return self._attend_on_ring(q_BlNH, k_BlNH, v_BlNH)
        arriving = _send_tokens_for_heads([q_BlNH, k_BlNH], ulysses)
        (v,) = _arrived(v_BlNH, ulysses)
        q, k = _arrived(arriving, ulysses)
        if self.split.ring.size == 1:
            out = self._attend_to_rows(q, k, v, self.split.all_tokens_L0.shape[0])
        else:
            out = self._attend_on_ring(q, k, v)
        return _trade_heads_for_tokens(out, ulysses)

    def _attend_to_rows(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, num_tokens: int) -> Tensor:
        """Attention among the first ``num_tokens`` rows; the rows of padding behind them become zero."""
        out = self.attend(*(x.narrow(1, 0, num_tokens) for x in (q_BLNH, k_BLNH, v_BLNH)))
        return _pad_rows(out, q_BLNH.shape[1])

    @torch.compiler.disable(reason="point-to-point messages cannot be traced")  # type: ignore[untyped-decorator]
    def _attend_on_ring(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor) -> Tensor:
        """Attention to the rows of the whole ring, without padding; its rows become zero."""
        ring, num_rows = self.split.ring, q_BLNH.shape[1]
        lengths = [self.split.tokens_on_ring(ring_rank) for ring_rank in range(ring.size)]
        q, k, v = (x[:, : lengths[ring.rank]] for x in (q_BLNH, k_BLNH, v_BLNH))
        return _pad_rows(ring_attention(q, k, v, ring, lengths, self.backend), num_rows)


def apply_sequence_parallel(dit: WanDiT, mesh: ReplicaMesh) -> Callable[[], None]:
    """Spread the tokens of every later forward of ``dit`` over the ``sequence`` axis (of size 1: do nothing).

    Parameter names do not change. Returns a function that undoes it. Raises ``LayoutError`` when ulysses does not
    divide the heads.
    """
    if mesh.sequence.size == 1:
        return lambda: None
    if dit.config.num_heads % mesh.ulysses.size:
        raise LayoutError(f"ulysses={mesh.ulysses.size} does not divide the model's {dit.config.num_heads} heads")
    split = TokenSplit(mesh)

    def cut_tokens(_module: nn.Module, _args: tuple[Tensor, ...], tokens_BLD: Tensor) -> Tensor:
        split.start(tokens_BLD)
        return split.cut(tokens_BLD, 1)

    def cut_tables(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens_BlD, rope_cos_LP, rope_sin_LP, *rest = args
        return tokens_BlD, split.cut(rope_cos_LP, 0), split.cut(rope_sin_LP, 0), *rest

    def join_values(_module: nn.Module, _args: tuple[Tensor, ...], values_BlX: Tensor) -> Tensor:
        return split.join(values_BlX)

    hooks = [
        dit.patch_embedding.register_forward_hook(cut_tokens),
        dit.blocks.register_forward_pre_hook(cut_tables),
        dit.head.register_forward_hook(join_values),
    ]
    attentions = [(module, module.attend) for module in dit.blocks.modules() if isinstance(module, SelfAttention)]
    for module, attend in attentions:
        module.attend = SequenceParallelAttend(attend, split)

    def undo() -> None:
        for hook in hooks:
            hook.remove()
        for module, attend in attentions:
            module.attend = attend

    return undo


def token_split_of(dit: WanDiT) -> TokenSplit | None:
    """Return how the tokens of ``dit`` are spread over ranks; None where they are not."""
    splits = (module.split for module in dit.blocks.modules() if isinstance(module, SequenceParallelAttend))
    return next(splits, None)


def _pad_rows(x_BLNH: Tensor, num_rows: int) -> Tensor:
    """``x_BLNH`` with zeros behind it along L, up to ``num_rows``; itself when there is nothing to add."""
    padding = num_rows - x_BLNH.shape[1]
    return F.pad(x_BLNH, (0, 0, 0, 0, 0, padding)) if padding else x_BLNH


def _send_tokens_for_heads(parts_BlNH: list[Tensor], ulysses: Axis) -> Tensor:
    """Start one all-to-all of ``parts_BlNH``, and return what arrives; ``_arrived`` waits for it."""
    by_rank = [x.unflatten(2, (ulysses.size, -1)).permute(2, 0, 1, 3, 4) for x in parts_BlNH]
    return _start_exchange(torch.stack(by_rank, dim=3), ulysses)


def _arrived(arriving_UBlpnH: Tensor, ulysses: Axis) -> tuple[Tensor, ...]:
    """The ulysses group's rows (U*l) of each part for this rank's heads, ``[B, U*l, n, H]``.

    They are strided views of what arrived: with a batch of one, nothing is copied after the exchange.
    """
    return _finish_exchange(arriving_UBlpnH, ulysses).transpose(0, 1).flatten(1, 2).unbind(2)


def _trade_heads_for_tokens(out_BLnH: Tensor, ulysses: Axis) -> Tensor:
    """The inverse, for attention's output with its rows padded to U*l again: ``[B, l, N, H]``; one all-to-all."""
    sent_UBlnH = out_BLnH.unflatten(1, (ulysses.size, -1)).transpose(0, 1).contiguous()
    received_UBlnH = _finish_exchange(_start_exchange(sent_UBlnH, ulysses), ulysses)
    return received_UBlnH.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _start_exchange(sent_UX: Tensor, ulysses: Axis) -> Tensor:
    """Start an all-to-all of rows, one for each rank, and return what arrives: not to be used before it is finished.

    These two operators work in compiled code, too, and stay apart there.
    """
    assert ulysses.group is not None
    ones = [1] * ulysses.size
    with timed(ulysses.clock):
        arriving: Tensor = torch.ops._c10d_functional.all_to_all_single(sent_UX, ones, ones, ulysses.group.group_name)
        return arriving


def _finish_exchange(arriving_UX: Tensor, ulysses: Axis) -> Tensor:
    with timed(ulysses.clock):
        received: Tensor = torch.ops._c10d_functional.wait_tensor(arriving_UX)
        return received


def ring_attention(
    q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, ring: Axis, lengths: list[int], backend: str = "auto"
) -> Tensor:
    """Attention of this rank's queries to the keys of the whole ring: same shape and dtype as ``q_BLNH``.

    Rank r of the ring holds ``lengths[r]`` tokens (they may differ, and be 0); this rank's inputs have its length. Keys
    and values travel packed to the next rank while this rank attends to those it holds. Partial results are merged in
    fp32.
    """
    batch, num_mine, *heads = q_BLNH.shape
    merged = _MergedAttention(q_BLNH)
    held = torch.stack([k_BLNH, v_BLNH])
    for step in range(ring.size):
        source = (ring.rank - step) % ring.size
        works, arriving = [], held
        if step + 1 < ring.size:
            arriving = held.new_empty(2, batch, lengths[source - 1], *heads)
            works = _pass_on(held, arriving, ring)
        if num_mine and lengths[source]:
            merged.add(*attend_with_lse(q_BLNH, held[0], held[1], backend))
        with timed(ring.clock):
            for work in works:
                work.wait()
        held = arriving
    return merged.result()


def _pass_on(held: Tensor, arriving: Tensor, ring: Axis) -> list[dist.Work]:
    """Start sending ``held`` to the next rank and receiving ``arriving`` from the previous one (empty: no message)."""
    ops = []
    if held.numel():
        ops.append(dist.P2POp(dist.isend, held, group=ring.group, group_peer=(ring.rank + 1) % ring.size))
    if arriving.numel():
        ops.append(dist.P2POp(dist.irecv, arriving, group=ring.group, group_peer=(ring.rank - 1) % ring.size))
    return dist.batch_isend_irecv(ops) if ops else []


class _MergedAttention:
    """Attention over a growing set of keys, from partial outputs and their log-sum-exp."""

    def __init__(self, q_BLNH: Tensor) -> None:
        self._like = q_BLNH
        self._out_BLNH: Tensor | None = None
        self._lse_BLN1: Tensor | None = None

    def add(self, out_BLNH: Tensor, lse_BNL: Tensor) -> None:
        """Merge the result for one more part of the keys.

        Weights are exp(lse) divided by their sum, so the share of the new part is the sigmoid of the difference.
        """
        out_BLNH, lse_BLN1 = out_BLNH.float(), lse_BNL.transpose(1, 2)[..., None]
        if self._out_BLNH is None or self._lse_BLN1 is None:
            self._out_BLNH, self._lse_BLN1 = out_BLNH, lse_BLN1
            return
        share_BLN1 = torch.sigmoid(lse_BLN1 - self._lse_BLN1)
        self._out_BLNH = torch.lerp(self._out_BLNH, out_BLNH, share_BLN1)
        self._lse_BLN1 = torch.logaddexp(self._lse_BLN1, lse_BLN1)

    def result(self) -> Tensor:
        """The merged output in the queries' dtype."""
        if self._out_BLNH is None:
            return torch.empty_like(self._like)  # no queries here
        return self._out_BLNH.to(self._like.dtype)
