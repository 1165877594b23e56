"""The model that comes with the package: pinned, complete, unpacked once, repaired when damaged."""

import hashlib
import multiprocessing
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from storymem_dist.config.composing import compose_settings
from storymem_dist.errors import CheckpointError, ConfigError, MachineError, StoryMemError, WeightsNotFound
from storymem_dist.resources import config_folder, packed_weights
from storymem_dist.story.modes import KINDS
from storymem_dist.weights import packed
from storymem_dist.weights.bundle import open_weights, packed_model, with_generated_weights
from storymem_dist.weights.packed import read_packed, unpack_once, write_packed
from storymem_dist.weights.settings import ModelSettings

NANO = packed_weights("nano.safetensors")
SHA256 = "98b4b4707f5835a9bd8d8e4ee51c0d30108c30438390bf6e31b09c1eee65cdf2"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    unpack_once(NANO, SHA256, root)
    return root


def test_the_file_is_the_one_that_configuration_and_readme_name() -> None:
    assert hashlib.sha256(NANO.read_bytes()).hexdigest() == SHA256
    assert yaml.safe_load((config_folder() / "model" / "nano.yaml").read_text())["model"]["packed_sha256"] == SHA256
    readme = (NANO.parent / "README.md").read_text()
    assert SHA256 in readme and "Apache-2.0" in readme


def test_the_configuration_alone_gives_weights_of_every_kind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORYMEM_CACHE", str(cache))
    settings = with_generated_weights(compose_settings(["model=nano"]).model)
    assert settings.packed is None
    for continuation in ("mi2v", "mm2v"):
        weights = open_weights(settings, KINDS, continuation)
        assert {kind: one.dit_config.in_dim for kind, one in weights.checkpoints.items()} == {"t2v": 16, "m2v": 36}
        assert weights.checkpoints["m2v"].dit_config.num_heads == 6


def test_what_is_equal_is_one_file(cache: Path) -> None:
    files = [path for path in cache.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".pth")]
    by_content: dict[str, set[int]] = {}
    for path in files:
        by_content.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), set()).add(path.stat().st_ino)
    assert len(files) > len(by_content) and all(len(inodes) == 1 for inodes in by_content.values())


def test_without_hard_links_it_is_copied(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(packed.os, "link", refuse)
    folders = unpack_once(NANO, SHA256, tmp_path)
    [there] = [path for path in cache.iterdir() if path.is_dir()]
    name = "low_noise_model/diffusion_pytorch_model.safetensors"
    assert (folders.i2v_dir / name).read_bytes() == (there / folders.i2v_dir.name / name).read_bytes()


def test_the_t2v_expert_is_the_same_network_without_condition_channels(cache: Path) -> None:
    everything = read_packed(NANO)
    [root] = [path for path in cache.iterdir() if path.is_dir()]
    weights = packed.safe_open(
        root / "Wan2.2-T2V-A14B" / "high_noise_model" / "diffusion_pytorch_model.safetensors", "pt"
    )
    with weights as file:
        for key, value in everything.dit.items():
            wanted = value[:, :16] if key == "patch_embedding.weight" else value
            assert torch.equal(file.get_tensor(key), wanted), key


@pytest.mark.parametrize("damage", ["a byte", "cut short", "missing", "one too many"])
def test_a_damaged_cache_is_repaired(tmp_path: Path, damage: str) -> None:
    folders = unpack_once(NANO, SHA256, tmp_path)
    path = folders.i2v_dir / "high_noise_model" / "diffusion_pytorch_model.safetensors"
    right = path.read_bytes()
    if damage == "a byte":
        path.write_bytes(right[: len(right) // 2] + bytes([right[len(right) // 2] ^ 1]) + right[len(right) // 2 + 1 :])
    elif damage == "cut short":
        path.write_bytes(right[:-5])
    elif damage == "missing":
        path.unlink()
    else:
        (folders.t2v_dir / "high_noise_model" / "more.safetensors").touch()
    again = unpack_once(NANO, SHA256, tmp_path)
    assert again == folders and path.read_bytes() == right
    assert not (folders.t2v_dir / "high_noise_model" / "more.safetensors").exists()


def test_a_whole_cache_is_only_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = unpack_once(NANO, SHA256, tmp_path)
    monkeypatch.setattr("storymem_dist.weights.cached_folder.locked_folder", None)
    assert unpack_once(NANO, SHA256, tmp_path) == folders


@pytest.mark.parametrize("model", ["nano", "tiny"])
@pytest.mark.parametrize("chosen", [True, False])
def test_a_cache_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, chosen: bool
) -> None:
    (tmp_path / "file").touch()
    for name, value in (("XDG_CACHE_HOME", ""), ("STORYMEM_CACHE", ""), ("HOME", str(tmp_path / "file"))):
        monkeypatch.setenv(name, value)
    if chosen:
        monkeypatch.setenv("STORYMEM_CACHE", str(tmp_path / "file" / "cache"))
    sentence = f"small models are written to {tmp_path / 'file'}/.*: .*; free space.*or set STORYMEM_CACHE to another"
    with pytest.raises(MachineError, match=sentence):
        with_generated_weights(compose_settings([f"model={model}"]).model)
    with pytest.raises(MachineError, match=sentence):
        packed_model("nano")


def test_a_packed_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("storymem_dist.weights.packed.file_digest", fail)
    with pytest.raises(WeightsNotFound, match=r"model\.packed=.*nano.* cannot be read: Input/output error"):
        unpack_once(NANO, SHA256, tmp_path)


def _ask(cache: Path, barrier: object, answers: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    settings = ModelSettings(t2v_checkpoint=str(unpack_once(NANO, SHA256, cache).t2v_dir))
    answers.put(open_weights(settings, ["t2v"], "mi2v").identity("t2v"))  # type: ignore[attr-defined]


def test_processes_that_ask_at_once_all_get_it(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    barrier, answers = fork.Barrier(3), fork.Queue()
    processes = [fork.Process(target=_ask, args=(tmp_path, barrier, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    assert len({answers.get(timeout=120) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize(
    ("what", "error", "said"),
    [
        ("damaged", CheckpointError, "install the package again"),
        ("nowhere", WeightsNotFound, "no such file"),
        ("text", CheckpointError, "is not a packed model"),
        ("another model", CheckpointError, "is not a packed model"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(
    tmp_path: Path, what: str, error: type[StoryMemError], said: str
) -> None:
    path, sha256 = tmp_path / "mine.safetensors", None
    if what == "damaged":
        path.write_bytes(NANO.read_bytes()[:-1] + b"x")
        sha256 = SHA256
    elif what == "text":
        path.write_text("weights")
    elif what == "another model":
        save_file({"dit.a": torch.zeros(1)}, path)
    with pytest.raises(error, match=said):
        unpack_once(path, sha256, tmp_path / "cache")
    assert not [one for one in (tmp_path / "cache").glob("*") if one.is_dir()]


def test_a_file_of_ones_own_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORYMEM_CACHE", str(tmp_path / "cache"))
    mine = tmp_path / "mine.safetensors"
    write_packed(mine, read_packed(NANO), licence="mine", origin="here")
    overrides = ["model=nano", f"model.packed={mine}", "model.packed_sha256=null"]
    settings = with_generated_weights(compose_settings(overrides).model)
    assert settings.t2v_checkpoint is not None and "/mine-" in settings.t2v_checkpoint


def test_the_same_contents_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_packed(tmp_path / name, read_packed(NANO), licence="x", origin="y")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_two_models_at_once_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.packed=.* and model\.generate=tiny are two models"):
        compose_settings(["model=nano", "model.generate=tiny"])
