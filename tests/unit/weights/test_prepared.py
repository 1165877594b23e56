"""Prepared weights: the same numbers as merging while loading; what is unfinished, damaged or stale is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from storymem_dist.errors import CheckpointError, StoryMemError, WeightsNotFound
from storymem_dist.models.quantized_linear import Float8Linear
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.weights import prepare
from storymem_dist.weights.bundle import open_weights
from storymem_dist.weights.checkpoints import open_checkpoint
from storymem_dist.weights.loading import TensorSource, load_dit_weights
from storymem_dist.weights.lora import ScaledLora, open_lora, storymem_lora
from storymem_dist.weights.prepare import prepare_checkpoint
from storymem_dist.weights.prepared import check_files, read_manifest
from storymem_dist.weights.settings import ModelSettings
from storymem_dist.weights.tiny_checkpoint import ModelFolders
from tests.helpers.checkpoints import edit_json, truncate, write_diffusers_layout

MI2V = "Wan2.2-MI2V-A14B"
MANIFEST = "storymem_prepared.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float8": torch.bfloat16}


def loaded(source: TensorSource, like: Path, loras: list[ScaledLora], dtype: torch.dtype) -> WanDiT:
    with torch.device("meta"):
        dit = WanDiT(open_checkpoint(like, "i2v").dit_config, dtype=dtype)
    dit.to_empty(device="cpu")
    load_dit_weights(dit, source, loras)
    return dit


def prepared_from(i2v: Path, lora_dir: Path, output: Path, dtype: str = "float32") -> Path:
    loras = {name: [lora] for name, lora in storymem_lora(lora_dir, "mi2v").items()}
    prepare_checkpoint(open_checkpoint(i2v, "i2v"), loras, output, dtype=dtype, storymem_folder=MI2V)
    return output


@pytest.fixture
def sources(tiny: ModelFolders, i2v_copy: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A base model and StoryMem LoRAs that a test may change."""
    return i2v_copy, shutil.copytree(tiny.lora_dir, tmp_path / "StoryMem")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("expert", ["high_noise", "low_noise"])
def test_prepared_weights_are_bit_equal_to_merging_while_loading(
    tiny: ModelFolders, tmp_path: Path, dtype: str, expert: str
) -> None:
    folder = prepared_from(tiny.i2v_dir, tiny.lora_dir, tmp_path / "prepared", dtype)
    checkpoint = open_checkpoint(folder, "i2v")
    assert checkpoint.layout == "prepared"
    original = open_checkpoint(tiny.i2v_dir, "i2v").expert(expert)
    expected = loaded(original, tiny.i2v_dir, [storymem_lora(tiny.lora_dir, "mi2v")[expert]], DTYPES[dtype])
    found = loaded(checkpoint.expert(expert), tiny.i2v_dir, [], DTYPES[dtype])
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other), name
    unmerged = loaded(original, tiny.i2v_dir, [], DTYPES[dtype])
    assert not torch.equal(found.blocks[0].ffn[0].weight, unmerged.blocks[0].ffn[0].weight)


def test_float8_keeps_what_eight_bits_can_hold_and_the_rest_exactly(tiny: ModelFolders, tmp_path: Path) -> None:
    folder = prepared_from(tiny.i2v_dir, tiny.lora_dir, tmp_path / "prepared", "float8")
    found = loaded(open_checkpoint(folder, "i2v").expert("high_noise"), tiny.i2v_dir, [], torch.bfloat16)
    lora = storymem_lora(tiny.lora_dir, "mi2v")["high_noise"]
    original = open_checkpoint(tiny.i2v_dir, "i2v").expert("high_noise")
    exact = dict(loaded(original, tiny.i2v_dir, [lora], torch.float32).named_parameters())
    for name, parameter in found.named_parameters():
        if name.startswith("blocks.") and parameter.ndim == 2:
            error = (parameter.float() - exact[name]).abs()
            largest = exact[name].abs().amax(dim=1, keepdim=True)
            assert (error <= torch.maximum(exact[name].abs() * 2**-4, largest * 2**-15)).all(), name
            assert error.max() > 0
        else:
            assert torch.equal(parameter, exact[name].to(parameter.dtype)), name
    stored = load_file(folder / "high_noise_model" / "block-000.safetensors")
    assert stored["blocks.0.ffn.0.weight"].dtype == torch.float8_e4m3fn
    assert stored["blocks.0.ffn.0.weight.row_scale"].shape == (128,)


def test_float8_rows_come_back_exactly_as_they_were_rounded() -> None:
    rows = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50)[:, None]
    rows[7] = 0
    values, scales = Float8Linear.quantize(rows)
    restored = values.float() * scales[:, None]
    assert torch.equal(restored, restored.bfloat16().float())
    assert torch.equal(torch.log2(scales), torch.log2(scales).round())
    assert ((restored - rows).abs() <= rows.abs().amax(1, keepdim=True) * 2**-4).all()
    assert torch.equal(restored[7], torch.zeros(30))


def test_a_diffusers_checkpoint_is_prepared_too(tiny: ModelFolders, tmp_path: Path) -> None:
    native = prepared_from(tiny.i2v_dir, tiny.lora_dir, tmp_path / "from_native")
    diffusers = write_diffusers_layout(tiny.i2v_dir, "i2v", tmp_path / "diffusers")
    other = prepared_from(diffusers, tiny.lora_dir, tmp_path / "from_diffusers")
    name = "low_noise_model/block-001.safetensors"
    assert (native / name).read_bytes() == (other / name).read_bytes()
    assert open_checkpoint(other, "i2v").vae_path == other / "vae"


def test_the_manifest_says_what_went_in_and_what_came_out(tiny: ModelFolders, tmp_path: Path) -> None:
    manifest = read_manifest(prepared_from(tiny.i2v_dir, tiny.lora_dir, tmp_path / "prepared", "bfloat16"))
    assert (manifest.kind, manifest.dtype, manifest.storymem_lora) == ("i2v", "bfloat16", MI2V)
    assert manifest.source["identity"] == open_checkpoint(tiny.i2v_dir, "i2v").identity
    (lora,) = manifest.loras["low_noise"]
    assert (lora["scale_rule"], lora["strength"], lora["is_storymem"]) == ("rslora", 1.0, True)
    root = tmp_path / "prepared"
    assert set(manifest.files) | {MANIFEST} == {
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()
    }
    assert manifest.versions["torch"].startswith(torch.__version__.partition("+")[0])
    check_files(tmp_path / "prepared", manifest, hashes=True)


def test_a_prepared_folder_stands_alone(sources: tuple[Path, Path], tmp_path: Path) -> None:
    folder = prepared_from(*sources, tmp_path / "prepared")
    identity = open_checkpoint(folder, "i2v").identity
    for source in sources:
        shutil.rmtree(source)
    assert open_checkpoint(folder, "i2v").identity == identity


def _edit_manifest(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / MANIFEST, lambda manifest: manifest.update(values))


def _flip_a_bit(folder: Path) -> None:
    path = folder / "low_noise_model/block-001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)


REFUSALS: dict[str, tuple[Callable[[Path], object], type[StoryMemError], str]] = {
    "half written": (
        _edit_manifest(complete=False),
        CheckpointError,
        "{root}: half written (preparing was interrupted)",
    ),
    "another version": (
        _edit_manifest(format_version=99),
        CheckpointError,
        "prepared by another version (format 99, this program reads 1)",
    ),
    "broken manifest": (
        lambda folder: (folder / MANIFEST).write_text("{"),
        CheckpointError,
        "not the manifest of a prepared folder",
    ),
    "unknown entry": (_edit_manifest(colour="red"), CheckpointError, "unexpected keyword argument 'colour'"),
    "missing block": (
        lambda folder: (folder / "low_noise_model/block-001.safetensors").unlink(),
        WeightsNotFound,
        "{root}/low_noise_model/block-001.safetensors: missing from the prepared weights",
    ),
    "truncated block": (
        lambda folder: truncate(folder / "high_noise_model/block-000.safetensors", 9),
        CheckpointError,
        "block-000.safetensors: has",
    ),
    "of the other kind": (
        _edit_manifest(kind="t2v"),
        CheckpointError,
        "prepared from T2V weights; here I2V weights are",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_prepared_folder_that_is_not_whole_is_refused(tiny: ModelFolders, tmp_path: Path, case: str) -> None:
    damage, error, message = REFUSALS[case]
    folder = prepared_from(tiny.i2v_dir, tiny.lora_dir, tmp_path / "prepared")
    damage(folder)
    with pytest.raises(error) as caught:
        open_checkpoint(folder, "i2v")
    assert message.format(root=folder) in str(caught.value)


def test_a_flipped_bit_is_found_by_its_hash(tiny: ModelFolders, tmp_path: Path) -> None:
    folder = prepared_from(tiny.i2v_dir, tiny.lora_dir, tmp_path / "prepared")
    _flip_a_bit(folder)
    with pytest.raises(CheckpointError, match=r"block-001.safetensors: its SHA-256 is not that of what was written"):
        check_files(folder, read_manifest(folder), hashes=True)


def test_weights_older_than_their_base_model_are_refused(sources: tuple[Path, Path], tmp_path: Path) -> None:
    folder = prepared_from(*sources, tmp_path / "prepared")
    edit_json(sources[0] / "high_noise_model/config.json", lambda config: config.update(note="new release"))
    with pytest.raises(CheckpointError, match=r"stale: .*i2v changed since it was prepared"):
        open_checkpoint(folder, "i2v")


def test_weights_older_than_their_lora_are_refused(sources: tuple[Path, Path], tmp_path: Path) -> None:
    folder = prepared_from(*sources, tmp_path / "prepared")
    shutil.copy(sources[1] / "Wan2.2-MM2V-A14B/backbone_low_noise.safetensors", sources[1] / MI2V)
    with pytest.raises(CheckpointError, match=r"stale: .*backbone_low_noise.safetensors changed since it was merged"):
        open_checkpoint(folder, "i2v")


def test_an_interrupted_prepare_leaves_nothing_that_can_be_mistaken(
    tiny: ModelFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_link_part", killed)
        with pytest.raises(KeyboardInterrupt):
            prepared_from(tiny.i2v_dir, tiny.lora_dir, tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()
    with pytest.raises(CheckpointError, match="half written"):
        open_checkpoint(tmp_path / ".prepared.preparing", "i2v")
    prepared_from(tiny.i2v_dir, tiny.lora_dir, tmp_path / "prepared")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".prepared.lock", "prepared"]


def test_preparing_again_replaces_the_folder(tiny: ModelFolders, tmp_path: Path) -> None:
    first = read_manifest(prepared_from(tiny.i2v_dir, tiny.lora_dir, tmp_path / "prepared", "bfloat16"))
    second = read_manifest(prepared_from(tiny.i2v_dir, tiny.lora_dir, tmp_path / "prepared", "float32"))
    assert (first.dtype, second.dtype) == ("bfloat16", "float32")


def test_a_folder_with_something_else_in_it_is_left_alone(tiny: ModelFolders, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "aunt.jpg").touch()
    with pytest.raises(CheckpointError, match="holds other files than prepared weights"):
        prepared_from(tiny.i2v_dir, tiny.lora_dir, tmp_path / "photos")
    assert (tmp_path / "photos" / "aunt.jpg").exists()


def test_prepared_weights_are_not_prepared_again(tiny: ModelFolders, tmp_path: Path) -> None:
    folder = prepared_from(tiny.i2v_dir, tiny.lora_dir, tmp_path / "prepared")
    with pytest.raises(CheckpointError, match="these weights are prepared already"):
        prepared_from(folder, tiny.lora_dir, tmp_path / "twice")


@pytest.mark.parametrize(
    ("continuation", "message"),
    [
        ("mi2v", None),
        ("none", None),
        ("mm2v", "prepared with Wan2.2-MI2V-A14B, but this job needs Wan2.2-MM2V-A14B (continuation=mm2v)"),
        (None, "prepared with Wan2.2-MI2V-A14B, but this job needs none"),
    ],
)
def test_the_merged_storymem_lora_must_be_the_jobs(
    tiny: ModelFolders, tmp_path: Path, continuation: str | None, message: str | None
) -> None:
    folder = prepared_from(tiny.i2v_dir, tiny.lora_dir, tmp_path / "prepared")
    manifest = read_manifest(folder)
    if message is None:
        manifest.check_request(folder, continuation, {})
        return
    with pytest.raises(CheckpointError) as caught:
        manifest.check_request(folder, continuation, {})
    assert message in str(caught.value)


def test_further_loras_must_be_the_merged_ones(tiny: ModelFolders, tmp_path: Path) -> None:
    file = open_lora(tiny.lora_dir / MI2V / "backbone_high_noise.safetensors")
    asked, stronger = ScaledLora(file, strength=0.5), ScaledLora(file, strength=0.6)
    prepare_checkpoint(
        open_checkpoint(tiny.t2v_dir, "t2v"), {"high_noise": [asked], "low_noise": []}, tmp_path / "prepared"
    )
    manifest = read_manifest(tmp_path / "prepared")
    manifest.check_request(tmp_path, None, {"high_noise": [asked], "low_noise": []})
    manifest.check_request(tmp_path, None, {"high_noise": [], "low_noise": []})
    with pytest.raises(CheckpointError, match=r"model.loras are not the ones merged into these prepared weights"):
        manifest.check_request(tmp_path, None, {"high_noise": [stronger], "low_noise": []})


@pytest.mark.parametrize(
    ("rule", "lora", "is_right"), [("rslora", "", True), ("alpha", "", False), ("rslora", "absent", True)]
)
def test_a_storymem_lora_that_a_job_names_must_be_the_merged_one(
    tiny: ModelFolders, tmp_path: Path, rule: str, lora: str, is_right: bool
) -> None:
    folder = prepared_from(tiny.i2v_dir, tiny.lora_dir, tmp_path / "prepared")
    settings = ModelSettings(
        i2v_checkpoint=str(folder), storymem_lora=str(tiny.lora_dir / lora), storymem_scale_rule=rule
    )
    if is_right:
        assert open_weights(settings, ["m2v"], "mi2v").loras["m2v"] == {"high_noise": [], "low_noise": []}
        return
    with pytest.raises(CheckpointError, match=r"merged with the rule rslora.*model.storymem_lora=null"):
        open_weights(settings, ["m2v"], "mi2v")


def test_reading_a_part_of_a_float8_weight_gives_those_rows(tiny: ModelFolders, tmp_path: Path) -> None:
    folder = prepared_from(tiny.i2v_dir, tiny.lora_dir, tmp_path / "prepared", "float8")
    source = open_checkpoint(folder, "i2v").expert("low_noise")
    key = "blocks.1.ffn.2.weight"
    assert torch.equal(source.read(key, slice(10, 20)), source.read(key)[10:20])
    assert source.dtype(key) == torch.bfloat16
    assert all(not name.endswith("row_scale") for name in source.keys())  # noqa: SIM118
    assert json.loads((folder / "low_noise_model/config.json").read_text())["in_dim"] == 36
