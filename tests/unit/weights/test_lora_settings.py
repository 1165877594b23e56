"""How a person gives LoRAs, and folders like StoryMem's."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from storymem_dist.cli.weights import main
from storymem_dist.config.composing import compose_settings
from storymem_dist.errors import CheckpointError, ConfigError, WeightsNotFound
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.weights.bundle import open_weights, with_generated_weights
from storymem_dist.weights.checkpoints import ModelFolders
from storymem_dist.weights.lora import LoraSettings, expert_in_name, lora_list, open_loras, storymem_lora
from storymem_dist.weights.settings import ModelSettings

RANK = 16


def backbone(folder: Path, *experts: str, suffix: str = ".safetensors", metadata: dict | None = None) -> Path:
    """A folder of LoRAs as people train them for StoryMem's model."""
    folder.mkdir(parents=True, exist_ok=True)
    for expert in experts or EXPERTS:
        halves = {
            "base_model.model.blocks.0.ffn.0.lora_A.weight": torch.ones(RANK, 64),
            "base_model.model.blocks.0.ffn.0.lora_B.weight": torch.ones(128, RANK),
        }
        path = folder / f"backbone_{expert}{suffix}"
        if suffix == ".safetensors":
            save_file(halves, path, metadata=metadata)
        else:
            torch.save(halves, path)
    return folder


@pytest.mark.parametrize(
    ("given", "paths"),
    [
        ("[style.safetensors]", ["style.safetensors"]),
        ("[a.safetensors,sub/b.pt]", ["a.safetensors", "sub/b.pt"]),
        ("['a,b.safetensors']", ["a,b.safetensors"]),
        ("style.safetensors", ["style.safetensors"]),
        ("[peft_folder,{path: b, strength: 0.5}]", ["peft_folder", "b"]),
        ("{path: a.safetensors}", ["a.safetensors"]),
        ("{path:a.safetensors,strength:0.5}", ["a.safetensors"]),
        ("[]", []),
        ("null", []),
    ],
)
def test_loras_are_given_as_paths_or_mappings(given: str, paths: list[str]) -> None:
    loras = compose_settings([f"model.loras={given}"]).model.loras
    assert all(isinstance(lora, LoraSettings) for lora in loras)
    assert [lora.path for lora in loras] == paths


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("[{path: x, weight: 0.5}]", "'weight' is not a key of a LoRA; did you mean strength?"),
        ("[{path: x, scale: 0.5}]", "did you mean strength?"),
        ("[{path: x, lora_scale: 0.5}]", "did you mean strength?"),
        ("[{path: x, strenght: 0.5}]", "did you mean strength?"),
        ("[{file: x}]", "did you mean path?"),
        ("[{path: x, stage: high}]", "did you mean expert?"),
        ("[{path: x, colour: red}]", "allowed: path, scale_rule, strength, alpha, expert, unmatched"),
        ("[{path: x, expert: high}]", "did you mean high_noise?"),
        ("[{strength: 0.5}]", "a LoRA without path"),
        ("[{path: x, strength: strong}]", "strength='strong' is not a number"),
        ("[{path: x, strength: true}]", "strength=True is not a number"),
        ("[{path: x, unmatched: maybe}]", "model.loras.unmatched='maybe' is not allowed"),
        ("[{path: 5}]", "path=5 is not allowed; it must be text"),
        ("[[x]]", "give a path, or a mapping"),
        ("[{a.safetensors: 0.8}]", "did you mean {path: a.safetensors, strength: 0.8}?"),
        ("{a.safetensors: 0.8}", "did you mean {path: a.safetensors, strength: 0.8}?"),
        ("[{path:a.safetensors,strength:0.5},]", "this list cannot be read; an example: 'model.loras=[{path: FILE"),
        ("[7]", "give a path, or a mapping"),
        ("['']", "give a path, or a mapping"),
    ],
)
def test_near_misses_say_what_was_meant_and_never_hydras_advice(given: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_settings([f"model.loras={given}"])
    assert message in str(caught.value)
    assert "+model" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model.loras.0.strength", "model.loras[0].strength", "model.loras.strength"])
def test_settings_of_a_lora_apart_from_its_path_get_an_example(key: str) -> None:
    with pytest.raises(ConfigError, match=r"stand next to its path: 'model.loras=\[\{path: FILE, strength: 0.5\}\]'"):
        compose_settings([f"{key}=.5"])


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("Kijai/WanVideo_comfy", "hf download Kijai/WanVideo_comfy --local-dir weights/WanVideo_comfy"),
        ("org/name/high/model.safetensors", "hf download org/name high/model.safetensors --local-dir weights/name"),
        ("https://huggingface.co/org/name/resolve/main/a.safetensors", "hf download org/name a.safetensors"),
        ("https://huggingface.co/org/name", "hf download org/name --local-dir weights/name"),
        ("https://example.com/a.safetensors", "download it and give the file's path"),
        ("loras/style.safetensors", "no such file; allowed: a .safetensors or .pth file, or a PEFT folder"),
    ],
)
def test_a_repositorys_name_gets_the_command_that_fetches_it(path: str, command: str) -> None:
    with pytest.raises(WeightsNotFound) as caught:
        open_loras(lora_list([path]), "high_noise")
    assert command in str(caught.value)


def test_the_options_of_prepare_are_those_of_the_settings(
    tiny: ModelFolders, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a,b").mkdir()
    lora = backbone(tmp_path / "a,b", "high_noise") / "backbone_high_noise.safetensors"
    output = tmp_path / "out"
    main(["prepare", str(tiny.t2v_dir), str(output), "--dtype", "float32", "--lora", f"{lora},strength=0.5"])
    assert "1 targets of rank 16, scale 0.5" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", str(tiny.t2v_dir), str(output), "--lora", f"{lora},weight=0.5"])
    assert "did you mean strength?" in capsys.readouterr().err


# -- folders like StoryMem's -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize("continuation", ["mi2v", "mm2v"])
def test_a_folder_of_any_name_is_read_as_it_is(tmp_path: Path, continuation: str, suffix: str) -> None:
    folder = backbone(tmp_path / "6am", suffix=suffix)
    loras = storymem_lora(folder, continuation)
    assert [lora.file.path.name for lora in loras.values()] == [f"backbone_{expert}{suffix}" for expert in EXPERTS]
    assert loras["low_noise"].scale("blocks.0.ffn.0") == math.sqrt(RANK)
    plain = storymem_lora(folder, continuation, scale_rule="alpha")["low_noise"]
    assert plain.scale("blocks.0.ffn.0") == 1.0


def test_the_settings_reach_the_weights(tiny: ModelFolders, tmp_path: Path) -> None:
    own = backbone(tmp_path / "6am")
    settings = ModelSettings(
        i2v_checkpoint=str(tiny.i2v_dir),
        storymem_lora=str(own),
        storymem_scale_rule="alpha",
        loras=[str(own / "backbone_low_noise.safetensors")],
    )
    loras = open_weights(settings, ("m2v",), "mi2v").loras["m2v"]
    assert [lora.scale("blocks.0.ffn.0") for lora in loras["high_noise"]] == [1.0, 1.0]
    facts = open_weights(settings, ("m2v",), "mi2v").lora_facts()["m2v"]
    assert [one["rank"] for one in facts["high_noise"]] == ["16", "16"]


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("high_noise_model.safetensors", "high_noise"),
        ("wan2.2_t2v_4steps_v1.1_HighNoise.safetensors", "high_noise"),
        ("style-LOW.safetensors", "low_noise"),
        ("style_low_rank.safetensors", None),
        ("follow.safetensors", None),
        ("high_noise_and_low_noise.safetensors", None),
    ],
)
def test_names_of_pairs_of_files_speak_of_an_expert(name: str, expert: str | None) -> None:
    assert expert_in_name(Path("loras") / name) == expert


def test_a_lora_whose_name_speaks_of_another_expert_is_warned_about(tiny: ModelFolders, tmp_path: Path) -> None:
    file = backbone(tmp_path / "own", "high_noise") / "backbone_high_noise.safetensors"
    folders = {"t2v_checkpoint": str(tiny.t2v_dir), "i2v_checkpoint": str(tiny.i2v_dir), "storymem_lora": None}
    for loras, count in (([str(file)], 1), ([{"path": str(file), "expert": "high_noise"}], 0)):
        weights = open_weights(ModelSettings(**folders, loras=loras), ["t2v"], "none")
        messages = weights.lora_warnings()
        assert len(messages) == count
        assert all("name says high_noise, but it is merged into low_noise" in message for message in messages)


def test_a_generated_model_keeps_the_lora_that_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORYMEM_CACHE", str(tmp_path / "cache"))
    own = backbone(tmp_path / "6am")
    assert with_generated_weights(ModelSettings(generate="tiny", storymem_lora=str(own))).storymem_lora == str(own)
    assert with_generated_weights(ModelSettings(generate="tiny")).storymem_lora != str(own)


def test_a_folder_that_is_incomplete_names_both_ways_to_lay_it_out(tmp_path: Path) -> None:
    for folder in (backbone(tmp_path / "6am", "high_noise"), tmp_path / "empty"):
        with pytest.raises(WeightsNotFound) as caught:
            storymem_lora(folder, "mi2v")
        message = str(caught.value)
        assert "a folder with backbone_high_noise.safetensors and backbone_low_noise.safetensors, or" in message
        assert "Wan2.2-MI2V-A14B/" in message and "hf download Kevin-thu/StoryMem" in message


def test_a_file_that_asks_for_another_rule_than_the_setting_is_refused(tmp_path: Path) -> None:
    folder = backbone(tmp_path / "6am", metadata={"alpha": "32", "use_rslora": "false"})
    with pytest.raises(CheckpointError, match=r"ask for the scale rule alpha, but model.storymem_scale_rule is rslora"):
        storymem_lora(folder, "mi2v")
    assert storymem_lora(folder, "mi2v", scale_rule="auto")["low_noise"].scale("blocks.0.ffn.0") == 2.0


def test_what_is_prepared_with_a_folder_of_ones_own_serves_the_job(tiny: ModelFolders, tmp_path: Path) -> None:
    own, output = backbone(tmp_path / "6am"), tmp_path / "out"
    main(["prepare", str(tiny.i2v_dir), str(output), "--storymem-lora", str(own), "--storymem-scale-rule", "alpha"])
    settings = ModelSettings(i2v_checkpoint=str(output))
    assert open_weights(settings, ("m2v",), "mm2v").lora_facts()["m2v"]["low_noise"][0]["scale"] == "1"


# -- files that hold something else ------------------------------------------------------------------------------------


class _RunsCode:
    def __reduce__(self) -> tuple:
        return print, ("ran",)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors"])
def test_a_file_with_code_is_refused_in_our_own_words(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"x{suffix}"
    torch.save({"x": _RunsCode()}, path)
    with pytest.raises(CheckpointError) as caught:
        open_loras(lora_list([str(path)]), "high_noise")
    assert "holds Python objects" in str(caught.value) and ".safetensors" in str(caught.value)
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF\x03\x00\x00\x00" + b"\x00" * 64, "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".safetensors", ".gguf", ""])
def test_a_file_of_another_format_is_known_by_its_content(
    tmp_path: Path, suffix: str, content: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_loras(lora_list([str(path)]), "high_noise")
    with pytest.raises(SystemExit, match="4"):
        main(["inspect", str(path)])
    assert message in capsys.readouterr().err


def test_a_safetensors_file_under_another_name_is_read(tmp_path: Path) -> None:
    path = backbone(tmp_path, "high_noise") / "backbone_high_noise.safetensors"
    (lora,) = open_loras(lora_list([str(path.rename(tmp_path / "x.ckpt"))]), "high_noise")
    assert lora.shapes()
