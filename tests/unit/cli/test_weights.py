"""``storymem-weights`` as a person uses it: what it prints, what it leaves on disk, and how it refuses."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from storymem_dist.cli import weights as weights_cli
from storymem_dist.cli.weights import Published, main, published_weights
from storymem_dist.errors import ConfigError, WeightsNotFound
from storymem_dist.models.wan.dit import WanDiT
from storymem_dist.weights.checkpoints import open_checkpoint
from storymem_dist.weights.hpsv3 import open_hpsv3
from storymem_dist.weights.hub import DownloadState, Hub, plan_download
from storymem_dist.weights.loading import load_dit_weights
from storymem_dist.weights.tiny_checkpoint import ModelFolders, generate_tiny_checkpoint
from tests.helpers.checkpoints import truncate
from tests.helpers.hub_server import FakeHub, serve
from tests.helpers.tiny_hpsv3 import BASE_NAME, WEIGHTS_NAME, write_package, write_tiny_hpsv3

MI2V, MM2V = "Wan2.2-MI2V-A14B", "Wan2.2-MM2V-A14B"
SHARD_4 = "low_noise_model/diffusion_pytorch_model-00004-of-00006.safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolders:
    return generate_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny")


def facts_of(path: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    main(["inspect", str(path), "--json"])
    return json.loads(capsys.readouterr().out)


def test_inspect_names_a_base_model(tiny: ModelFolders, capsys: pytest.CaptureFixture[str]) -> None:
    facts = facts_of(tiny.t2v_dir, capsys)
    assert facts["what"] == "Wan2.2 T2V base model, two experts"
    assert (facts["layout"], facts["in_dim"]) == ("native", 16)
    assert facts["high_noise"] == "147,200 parameters in 69 tensors (float32 100.0%)"


def test_inspect_prints_the_scale_that_a_lora_file_does_not_store(
    tiny: ModelFolders, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = facts_of(tiny.lora_dir, capsys)[f"{MI2V}/backbone_high_noise.safetensors"]
    assert facts["rank"] == "4 (20 targets)"
    assert facts["alpha"] == "not stored: taken as the rank"
    assert facts["scale by rule"] == "rslora 2.0000"
    alone = facts_of(tiny.lora_dir / MI2V / "backbone_low_noise.safetensors", capsys)
    assert alone["what"] == "a LoRA"
    assert alone["scale by rule"] == "alpha 1.0000, rslora 2.0000, none 1.0000"
    assert alone["targets"].startswith("cross_attn.k x2, cross_attn.o x2,")


def test_inspect_reads_a_stored_alpha(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    halves = {f"diffusion_model.blocks.0.ffn.0.lora_{half}.weight": torch.zeros(8, 8) for half in ("down", "up")}
    save_file(halves | {"diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(4.0)}, tmp_path / "x.safetensors")
    facts = facts_of(tmp_path / "x.safetensors", capsys)
    assert (facts["alpha"], facts["scale by rule"]) == ("4.0", "alpha 0.5000, rslora 1.4142, none 1.0000")


@pytest.mark.parametrize(
    ("relative", "what"),
    [
        ("Wan2.1_VAE.pth", "the Wan2.1 VAE"),
        ("models_t5_umt5-xxl-enc-bf16.pth", "a umT5 text encoder"),
        ("high_noise_model/diffusion_pytorch_model-00001-of-00006.safetensors", "a transformer, or its first shard"),
        ("high_noise_model/diffusion_pytorch_model-00004-of-00006.safetensors", "a shard of a transformer"),
    ],
)
def test_inspect_names_single_files(
    tiny: ModelFolders, capsys: pytest.CaptureFixture[str], relative: str, what: str
) -> None:
    assert facts_of(tiny.i2v_dir / relative, capsys)["what"] == what


def test_inspect_prints_a_table_for_people(tiny: ModelFolders, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(tiny.lora_dir)])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert f"{MM2V}/backbone_low_noise.safetensors" in lines
    assert any(line.startswith("rank") and line.endswith("4 (20 targets)") for line in lines)


def test_verify_checks_what_it_is_given(tiny: ModelFolders, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", str(tiny.t2v_dir), str(tiny.lora_dir)])
    assert capsys.readouterr().out.count("files, sizes, index and keys are right") == 2


def _delete(relative: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        path = root / relative
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def _not_a_state_dict(root: Path) -> None:
    torch.save([1, 2], root / "Wan2.1_VAE.pth")


@pytest.mark.parametrize(
    ("command", "damage", "message"),
    [
        (["verify", "{root}"], _delete(SHARD_4), f"shard 4 of 6 is missing: {{root}}/{SHARD_4}"),
        (["verify", "{root}"], lambda root: truncate(root / SHARD_4, 5), f"{SHARD_4}: truncated"),
        (["inspect", "{root}"], _delete("low_noise_model"), "{root}: an expert is missing: low_noise_model/"),
        (["inspect", "{root}/nothing"], None, "{root}/nothing: no such file or folder"),
        (["inspect", "{root}/google"], None, "{root}/google is not a Wan2.2-A14B folder"),
        (["inspect", "{root}/Wan2.1_VAE.pth"], _not_a_state_dict, "{root}/Wan2.1_VAE.pth: not a state dict (a list"),
        (["verify", "{root}", "--hashes"], None, "{root}: no hashes are known"),
        (["prepare", "{root}", "{root}/google"], None, "{root}/google: exists and holds other files"),
        (
            ["prepare", "{root}", "{root}/x", "--storymem-lora", "{root}"],
            None,
            "StoryMem LoRA {root}/Wan2.2-MI2V-A14B/backbone_high_noise.safetensors: no such file",
        ),
        (["prepare", "{root}", "{root}/x", "--lora", "a.safetensors"], None, "LoRA a.safetensors: no such file"),
        (
            ["prepare", "{root}", "{root}/x", "--lora", "a,scale=2"],
            None,
            "--lora a,scale=2: 'scale' is not a key of a LoRA; did you mean strength?",
        ),
        (["prepare", "{root}", "{root}/x", "--lora", "a,alpha=x"], None, "--lora a,alpha=x: alpha='x' is not a number"),
        (["download", "sora"], None, "download sora: unknown; known are: t2v, i2v, storymem"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    tiny: ModelFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str], command, damage, message: str
) -> None:
    root = shutil.copytree(tiny.i2v_dir, tmp_path / "i2v")
    if damage:
        damage(root)
    with pytest.raises(SystemExit) as caught:
        main([part.format(root=root) for part in command])
    assert caught.value.code in (2, 4)
    error = capsys.readouterr().err
    assert error.startswith("storymem-weights: error: ")
    assert message.format(root=root) in error
    assert error.count("\n") == 1


def test_the_storymem_lora_is_refused_for_t2v(tiny: ModelFolders, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", str(tiny.t2v_dir), str(tmp_path / "x"), "--storymem-lora", str(tiny.lora_dir)])
    assert "the StoryMem LoRA belongs to the I2V base model; this one is T2V" in capsys.readouterr().err


def test_prepare_merges_the_storymem_lora_and_further_ones(
    tiny: ModelFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = tiny.lora_dir / MI2V / "backbone_high_noise.safetensors"
    output = tmp_path / "prepared"
    options = ["--storymem-lora", str(tiny.lora_dir), "--continuation", "mm2v", "--dtype", "float32"]
    further = ["--lora", f"{lora},scale_rule=none,strength=0.25,expert=high_noise"]
    main(["prepare", str(tiny.i2v_dir), str(output), *options, *further])
    assert f"render with model.i2v_checkpoint={output}" in capsys.readouterr().out
    key = "blocks.1.cross_attn.v.weight"
    merged = load_file(output / "high_noise_model" / "block-001.safetensors")[key]
    base = open_checkpoint(tiny.i2v_dir, "i2v").expert("high_noise").read(key)
    products = []
    for folder in (MM2V, MI2V):
        halves = load_file(tiny.lora_dir / folder / "backbone_high_noise.safetensors")
        prefix = "base_model.model.blocks.1.cross_attn.v"
        products.append(halves[f"{prefix}.lora_B.weight"] @ halves[f"{prefix}.lora_A.weight"])
    torch.testing.assert_close(merged, base + 2 * products[0] + 0.25 * products[1], atol=1e-6, rtol=1e-6)
    facts = facts_of(output, capsys)
    assert (facts["layout"], facts["StoryMem LoRA merged"], facts["stored as"]) == ("prepared", MM2V, "float32")
    assert len(facts["LoRAs merged"]["high_noise"]) == 2
    main(["verify", str(output), "--hashes"])
    assert "hashes are right" in capsys.readouterr().out


def test_a_downloaded_checkpoint_loads_and_its_hashes_are_right(
    tiny: ModelFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Published(repo="Wan-AI/X", revision="main", folder="I2V", num_bytes=None, purpose="a test")
    monkeypatch.setattr(weights_cli, "published_weights", lambda: {"i2v": entry})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    files = {
        path.relative_to(tiny.i2v_dir).as_posix(): path.read_bytes()
        for path in tiny.i2v_dir.rglob("*")
        if path.is_file()
    }
    with serve(FakeHub("Wan-AI/X", files)) as fake:
        arguments = ["download", "i2v", "--to", str(tmp_path), "--endpoint", fake.endpoint]
        main([*arguments, "--dry-run"])
        assert "Wan-AI/X" in capsys.readouterr().out
        assert not (tmp_path / "I2V").exists()
        main(arguments)
    assert "i2v: complete and checked in" in capsys.readouterr().out
    checkpoint = open_checkpoint(tmp_path / "I2V", "i2v")
    with torch.device("meta"):
        dit = WanDiT(checkpoint.dit_config)
    load_dit_weights(dit.to_empty(device="cpu"), checkpoint.expert("low_noise"))
    main(["verify", str(tmp_path / "I2V"), "--hashes"])
    assert f"{len(files)} hashes are right, 0 files are missing" in capsys.readouterr().out


def test_hpsv3_is_downloaded_with_the_small_files_of_its_base_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tiny_hpsv3(tmp_path / "there")
    published = published_weights()
    own, base = (replace(published[name], num_bytes=None) for name in ("hpsv3", "hpsv3_base"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.syspath_prepend(str(write_package(tmp_path / "site")))
    files = {path.name: path.read_bytes() for path in (root / BASE_NAME).iterdir()}
    others = {"model-00001-of-00005.safetensors": b"x" * 5000, "vocab.json": b"{}"}
    weights = FakeHub(own.repo, {WEIGHTS_NAME: (root / WEIGHTS_NAME).read_bytes(), "README.md": b"read me"})
    with serve(weights), serve(FakeHub(base.repo, files | others)) as small:
        monkeypatch.setattr(weights_cli, "Hub", lambda endpoint: OfTwo(weights.endpoint, small))
        monkeypatch.setattr(weights_cli, "published_weights", lambda: {"hpsv3": own, "hpsv3_base": base})
        main(["download", "hpsv3", "--to", str(tmp_path / "weights")])
    said = capsys.readouterr().out
    assert "hpsv3: complete and checked in" in said and "hpsv3_base: complete and checked in" in said
    here = tmp_path / "weights" / "HPSv3"
    seen = {path.name for path in here.iterdir() if not path.name.startswith(".")}
    assert seen == {WEIGHTS_NAME, BASE_NAME, "storymem_download.json"}
    assert {path.name for path in (here / BASE_NAME).iterdir()} == {*files, "storymem_download.json"}
    assert open_hpsv3(str(here)).num_bytes() == open_hpsv3(str(root)).num_bytes()


class OfTwo(Hub):
    """Two hubs of one repository each."""

    def __init__(self, endpoint: str, other: FakeHub) -> None:
        super().__init__(endpoint)
        self._other = other

    def list_files(self, repo: str, revision: str) -> DownloadState:
        return (Hub(self._other.endpoint) if repo == self._other.repo else super()).list_files(repo, revision)

    def fetch(self, state: DownloadState, *others: Any) -> None:
        (Hub(self._other.endpoint) if state.repo == self._other.repo else super()).fetch(state, *others)


def test_a_file_that_is_needed_and_not_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    needed, message = ["config.json", "tokenizer.json", "x*"], r"a/b@c0ffee0.* lists no tokenizer\.json, no x\*$"
    with serve(FakeHub("a/b", {"config.json": b"{}"})) as fake, pytest.raises(WeightsNotFound, match=message):
        plan_download(Hub(fake.endpoint), "a/b", "main", tmp_path, files=needed)


def test_the_published_list_has_what_a_renderer_needs() -> None:
    published = published_weights()
    assert {name: published[name].repo for name in weights_cli.DEFAULT_NAMES} == {
        "t2v": "Wan-AI/Wan2.2-T2V-A14B",
        "i2v": "Wan-AI/Wan2.2-I2V-A14B",
        "storymem": "Kevin-thu/StoryMem",
    }


def test_a_published_list_with_a_wrong_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("t2v: {repo: a/b, branch: main}")
    with pytest.raises(ConfigError, match="the keys of an entry are: repo, revision, folder, num_bytes, purpose"):
        published_weights(tmp_path / "p.yaml")
