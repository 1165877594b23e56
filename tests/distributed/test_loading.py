"""Experts are built part by part on the ranks that need the part, and hold what one device would hold."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from storymem_dist.errors import CheckpointError
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.parallel.loading import build_expert
from storymem_dist.parallel.session import Session, start_session
from storymem_dist.parallel.settings import ParallelSettings
from storymem_dist.weights.checkpoints import open_checkpoint
from storymem_dist.weights.loading import TensorSource, load_dit_weights
from storymem_dist.weights.lora import LoraSettings, ScaledLora, open_lora, open_loras, storymem_lora
from storymem_dist.weights.tiny_checkpoint import ModelFolders, generate_tiny_checkpoint
from tests.helpers.lora_layouts import PATCHED, SHAPES
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny_dit import largest_error, make_inputs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolders:
    folders = generate_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny")
    same_in_t2v_and_i2v = {parameter: key for parameter, key in PATCHED.items() if "patch_embedding" not in parameter}
    save_file({key: torch.randn(SHAPES[name]) for name, key in same_in_t2v_and_i2v.items()}, _exact_changes(folders))
    return folders


def load_whole(tiny: ModelFolders, deltas: list[ScaledLora], dtype: torch.dtype) -> WanDiT:
    checkpoint = open_checkpoint(tiny.i2v_dir, "i2v")
    dit = WanDiT(checkpoint.dit_config, dtype=dtype).eval().requires_grad_(False)
    load_dit_weights(dit, checkpoint.expert("high_noise"), deltas)
    return dit


def _same_bits(found: WanDiT, expected: WanDiT, session: Session) -> list[str]:
    """Names of the parameters that differ."""
    pairs = zip(found.named_parameters(), expected.named_parameters(), strict=True)
    return [name for (name, a), (_, b) in pairs if a.dtype != b.dtype or not torch.equal(_full(a, session), b)]


def _full(parameter: Tensor, session: Session) -> Tensor:
    """All rows. Not ``full_tensor``: DTensor keeps the first of meshes with equal ranks, also when its session ends."""
    if not isinstance(parameter, DTensor):
        return parameter.detach()
    parts = [torch.empty(0)] * session.mesh.shard.size
    dist.all_gather_object(parts, parameter.to_local().detach(), group=session.mesh.shard.group)
    return torch.cat(parts)


def _exact_changes(tiny: ModelFolders) -> Path:
    """Where this test keeps a LoRA of exact changes: weights, biases, norms and modulations."""
    return tiny.lora_dir.parent / "exact.safetensors"


def _build_on_layouts(
    tiny: ModelFolders, layouts: list[ParallelSettings], dtype: torch.dtype
) -> list[dict[str, object]]:
    dist.init_process_group("gloo")
    loras = [storymem_lora(tiny.lora_dir, "mi2v")["high_noise"], ScaledLora(open_lora(_exact_changes(tiny)))]
    whole = load_whole(tiny, loras, dtype)
    outcomes = []
    for settings in layouts:
        checkpoint = open_checkpoint(tiny.i2v_dir, "i2v")
        source = checkpoint.expert("high_noise")
        with start_session(settings) as session:
            seen: list[tuple[int, int]] = []
            dit, report = build_expert(
                checkpoint.dit_config,
                source,
                loras,
                session=session,
                settings=settings,
                dtype=dtype,
                progress=lambda done, total, seen=seen: seen.append((done, total)),
            )
            held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in dit.parameters())
            outcomes.append(
                {
                    "differing": _same_bits(dit, whole, session),
                    "held_ratio": held / sum(p.numel() for p in whole.parameters()),
                    "bytes_read": report.bytes_read,
                    "bytes_counted": source.bytes_read,
                    "bytes_total": sum(4 * p.numel() for p in whole.parameters()),
                    "progress_ends": seen[-1] if seen else None,
                }
            )
    return outcomes


def test_each_rank_reads_its_own_part_and_holds_the_same_bits_as_one_device(tiny: ModelFolders) -> None:
    layouts = [
        ParallelSettings(ulysses=4, weights="fsdp"),
        ParallelSettings(ulysses=4, weights="fsdp_offload"),
        ParallelSettings(cfg=2, ulysses=2, weights="fsdp", share_reads=False),
    ]
    by_rank = run_ranks(_build_on_layouts, 4, (tiny, layouts, torch.bfloat16))
    for rank, outcomes in enumerate(by_rank):
        for settings, outcome in zip(layouts, outcomes, strict=True):
            assert outcome["differing"] == [], f"rank {rank}, {settings}"
            # (1, 6, D) modulation cannot be cut along its first dimension: rank 0 holds it whole
            assert outcome["held_ratio"] < 0.25 * 1.1, f"rank {rank}"
            assert outcome["bytes_read"] == outcome["bytes_counted"] <= 0.25 * 1.1 * outcome["bytes_total"]
            assert outcome["progress_ends"] == (outcome["bytes_read"], outcome["bytes_read"])
    for outcomes_of_layout in zip(*by_rank, strict=True):
        assert sum(o["bytes_read"] for o in outcomes_of_layout) == outcomes_of_layout[0]["bytes_total"]


def test_replicas_of_a_node_read_the_weights_once_between_them(tiny: ModelFolders) -> None:
    layouts = [
        ParallelSettings(),
        ParallelSettings(ulysses=2, weights="fsdp"),
        ParallelSettings(ulysses=4),
        ParallelSettings(share_reads=False),
    ]
    by_rank = run_ranks(_build_on_layouts, 4, (tiny, layouts, torch.bfloat16))
    for rank, outcomes in enumerate(by_rank):
        for settings, outcome in zip(layouts, outcomes, strict=True):
            assert outcome["differing"] == [], f"rank {rank}, {settings}"
    total = by_rank[0][0]["bytes_total"]
    bytes_read = [[outcome["bytes_read"] for outcome in layout] for layout in zip(*by_rank, strict=True)]
    assert bytes_read[0] == [total, 0, 0, 0]
    assert sum(bytes_read[1]) == total
    assert bytes_read[1][2:] == [0, 0]
    assert bytes_read[2] == [total, 0, 0, 0]
    assert bytes_read[3] == [total] * 4


def _load_differently(tiny: ModelFolders, what: str) -> tuple[list[str], bool]:
    settings = ParallelSettings()
    with start_session(settings) as session:
        checkpoint = open_checkpoint(tiny.i2v_dir, "i2v")
        other = session.replica == 1
        source = checkpoint.expert("low_noise" if what == "expert" and other else "high_noise")
        dit, report = build_expert(
            checkpoint.dit_config,
            source,
            session=session,
            settings=settings,
            dtype=torch.float32,
            stream=what == "place" and other,
        )
        alone = WanDiT(checkpoint.dit_config, dtype=torch.float32)
        load_dit_weights(alone, source)
        return _same_bits(dit, alone, session), report.bytes_read > 0


@pytest.mark.parametrize("what", ["expert", "place"])
def test_replicas_that_load_other_weights_or_to_another_place_read_on_their_own(tiny: ModelFolders, what: str) -> None:
    """One GPU of a node may be fuller than the next: what goes to its host memory cannot come by NCCL."""
    assert run_ranks(_load_differently, 2, (tiny, what)) == [([], True), ([], True)]


def _forward_with_wrong_scale(tiny: ModelFolders) -> tuple[float, float]:
    """Errors against one device: with the LoRA at its own scale, and at 1."""
    right = storymem_lora(tiny.lora_dir, "mi2v")["high_noise"]
    path = str(right.file.path)
    (wrong,) = open_loras([LoraSettings(path=path, scale_rule="none", expert="high_noise")], "high_noise")
    whole = load_whole(tiny, [right], torch.float32)
    checkpoint = open_checkpoint(tiny.i2v_dir, "i2v")
    settings = ParallelSettings(ulysses=2, weights="fsdp")
    inputs = make_inputs(checkpoint.dit_config)
    errors = []
    with start_session(settings) as session, torch.no_grad():
        for lora in (right, wrong):
            source = checkpoint.expert("high_noise")
            dit, _ = build_expert(
                checkpoint.dit_config, source, [lora], session=session, settings=settings, dtype=torch.float32
            )
            errors.append(largest_error(dit(*inputs), whole(*inputs)))
    return errors[0], errors[1]


def test_a_lora_merged_into_shards_at_scale_one_would_be_seen(tiny: ModelFolders) -> None:
    for right, wrong in run_ranks(_forward_with_wrong_scale, 2, (tiny,)):
        assert right <= 1e-5
        assert wrong > 1e-3


class FailingSource:
    """Behaves like ``source``, but one rank cannot read ``key``."""

    def __init__(self, source: TensorSource, key: str) -> None:
        self._source, self._key = source, key

    def __getattr__(self, name: str) -> object:
        return getattr(self._source, name)

    def read(self, key: str, rows: slice | None = None, *, pin_memory: bool = False) -> Tensor:
        if key == self._key:
            raise CheckpointError(f"shard 3 is truncated at {key}")
        return self._source.read(key, rows, pin_memory=pin_memory)


def _one_rank_cannot_read(tiny: ModelFolders, settings: ParallelSettings, broken_rank: int) -> tuple[str, str]:
    checkpoint = open_checkpoint(tiny.t2v_dir, "t2v")
    source = checkpoint.expert("low_noise")
    with start_session(settings) as session:
        if session.rank == broken_rank:
            source = FailingSource(source, "blocks.1.ffn.0.weight")
        try:
            build_expert(checkpoint.dit_config, source, session=session, settings=settings)
        except CheckpointError as error:
            return str(error), _still_in_step(session)
    return "no error", ""


def _still_in_step(session: Session) -> str:
    return str(session.leader_decides(lambda: "in step"))


@pytest.mark.parametrize(
    ("settings", "broken_rank"),
    [(ParallelSettings(ulysses=2, weights="fsdp"), 1), (ParallelSettings(ulysses=2), 0)],
    ids=["each reads", "one reads for all"],
)
def test_a_rank_that_cannot_read_fails_the_load_on_every_rank(
    tiny: ModelFolders, settings: ParallelSettings, broken_rank: int
) -> None:
    for message, afterwards in run_ranks(_one_rank_cannot_read, 2, (tiny, replace(settings), broken_rank)):
        assert message == "shard 3 is truncated at blocks.1.ffn.0.weight"
        assert afterwards == "in step"


def test_one_rank_builds_the_same_expert_without_any_group(tiny: ModelFolders, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.i2v_dir, "i2v")
    settings = ParallelSettings(device="cpu")
    with start_session(settings) as session:
        dit, report = build_expert(
            checkpoint.dit_config, checkpoint.expert("high_noise"), session=session, settings=settings
        )
    assert _same_bits(dit, load_whole(tiny, [], torch.bfloat16), session) == []
    assert report.bytes_read == sum(4 * p.numel() for p in dit.parameters())
