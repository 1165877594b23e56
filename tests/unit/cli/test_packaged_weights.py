"""``storymem-weights`` and the settings with single files as ComfyUI has them: described, verified and prepared."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from storymem_dist.cli.weights import main
from storymem_dist.config.schema import RenderConfig
from storymem_dist.doctor.job import check_weights
from storymem_dist.errors import WeightsNotFound
from storymem_dist.weights.bundle import open_weights
from storymem_dist.weights.checkpoints import open_checkpoint
from storymem_dist.weights.settings import ModelSettings
from storymem_dist.weights.tiny_checkpoint import ModelFolders, generate_tiny_checkpoint
from tests.helpers import packagings


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolders:
    """Read only."""
    return generate_tiny_checkpoint(tmp_path_factory.mktemp("weights") / "tiny", seed=0)


@pytest.fixture
def models(tiny: ModelFolders, tmp_path: Path) -> Path:
    """A ``models`` folder of ComfyUI with both base models."""
    packagings.comfyui_models(tiny.t2v_dir, tmp_path / "models", packagings.scaled())
    packagings.comfyui_models(tiny.i2v_dir, tmp_path / "models", packagings.cast(torch.bfloat16), "i2v")
    return tmp_path / "models"


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main(["inspect", "--json", str(path)])
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


def test_a_folder_with_both_base_models_is_described(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspected(models, capsys)
    assert facts["what"] == "Wan2.2 base models: T2V and I2V"
    assert "float8_e4m3fn" in facts["T2V"]["high_noise"] and facts["I2V"]["in_dim"] == 36
    assert facts["T2V"]["low_noise file"].endswith("wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors")
    main(["verify", str(models)])
    assert "Wan2.2 base models: T2V and I2V: files, sizes, index and keys are right" in capsys.readouterr().out


def test_single_files_are_known_by_their_content(
    tiny: ModelFolders, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packagings.write_gguf(tmp_path / "x.bin", packagings.expert_tensors(tiny.i2v_dir, "high_noise"), "Q8_0")
    assert inspected(tmp_path / "x.bin", capsys)["in_dim"] == "36 (I2V)"
    for name, what in (("umt5_xxl_fp16", "a umT5 text encoder"), ("wan_2.1_vae", "the Wan2.1 VAE")):
        assert inspected(next(models.rglob(f"{name}.safetensors")), capsys)["what"] == what


def test_one_of_two_base_models_is_prepared(
    tiny: ModelFolders, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="4"):
        main(["prepare", str(models), str(tmp_path / "ready")])
    assert "holds transformers of T2V and I2V; say which: --kind" in capsys.readouterr().err
    vae = tiny.t2v_dir / "Wan2.1_VAE.pth"
    main(["prepare", str(models), str(tmp_path / "ready"), "--kind", "t2v", "--vae", str(vae), "--dtype", "float32"])
    prepared, source = open_checkpoint(tmp_path / "ready", "t2v"), open_checkpoint(models, "t2v")
    for expert in packagings.EXPERT_FOLDERS:
        ready, stored = prepared.expert(expert), source.expert(expert)
        assert set(ready.keys()) == set(stored.keys())
        assert all(torch.equal(ready.read(key).float(), stored.read(key).float()) for key in stored.keys())  # noqa: SIM118
    assert prepared.vae_path.read_bytes() == vae.read_bytes()
    encoder = models / "text_encoders/umt5_xxl_fp16.safetensors"
    assert load_file(prepared.text_encoder_path).keys() == load_file(encoder).keys()


def test_prepared_weights_are_stale_when_a_named_file_changes(models: Path, tmp_path: Path) -> None:
    files = {name: next(models.rglob(f"*i2v_{name}*")) for name in packagings.EXPERT_FOLDERS}
    options = [text for name, path in files.items() for text in (f"--{name.replace('_', '-')}", str(path))]
    main(["prepare", str(models), str(tmp_path / "ready"), *options])
    open_checkpoint(tmp_path / "ready", "i2v")
    content = bytearray(files["low_noise"].read_bytes())
    content[-3] ^= 1
    files["low_noise"].write_bytes(content)
    with pytest.raises(Exception, match=r"stale: .*models changed since it was prepared"):
        open_checkpoint(tmp_path / "ready", "i2v")


def settings_of(models: Path) -> ModelSettings:
    """Every file named, none of the folders that have them."""
    experts = {f"t2v_{name}": str(next(models.rglob(f"*t2v_{name}*"))) for name in packagings.EXPERT_FOLDERS}
    return ModelSettings(
        **experts,
        vae=str(models / "vae/wan_2.1_vae.safetensors"),
        text_encoder=str(models / "text_encoders/umt5_xxl_fp16.safetensors"),
        tokenizer=str(models / "text_encoders/umt5-xxl"),
    )


def test_settings_name_files_or_a_folder_with_them(models: Path) -> None:
    named = open_weights(settings_of(models), ("t2v",), "mi2v")
    found = open_weights(ModelSettings(t2v_checkpoint=str(models)), ("t2v",), "mi2v")
    assert named.identity("t2v") == found.identity("t2v"), "only content is part of the fingerprint"
    with pytest.raises(WeightsNotFound, match=r"model.i2v_checkpoint is not set"):
        open_weights(settings_of(models), ("m2v",), "mi2v")


def test_the_doctor_knows_single_files(models: Path, tiny: ModelFolders) -> None:
    model = ModelSettings(t2v_checkpoint=str(models), i2v_checkpoint=str(models), storymem_lora=str(tiny.lora_dir))
    findings = {one.name: one for one in check_weights(RenderConfig(model=model))}
    for kind in ("t2v", "m2v"):
        assert findings[kind].state == "ok" and f"single files, {models}" in findings[kind].value
