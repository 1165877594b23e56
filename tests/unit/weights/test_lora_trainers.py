"""Files of single trainers whose meaning is not in the names of their keys, and files that mean something else."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from storymem_dist.errors import CheckpointError, StoryMemError
from storymem_dist.models.wan.presets import HIGH_NOISE
from storymem_dist.weights.lora import LoraSettings, ScaledLora, open_lora, open_loras
from tests.helpers.lora_layouts import SHAPES, product

Q = "blocks.0.self_attn.q"
DOWN, UP = torch.linspace(-1, 1, 4 * 64).view(4, 64), torch.linspace(1, -1, 64 * 4).view(64, 4)
PEFT = {f"base_model.model.{Q}.lora_A.weight": DOWN, f"base_model.model.{Q}.lora_B.weight": UP}


def peft_folder(folder: Path, tensors: dict[str, Tensor] = PEFT, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4, **config}))
    return folder


def added(path: Path, key: str) -> Tensor:
    (lora,) = open_loras([LoraSettings(path=str(path))], HIGH_NOISE, SHAPES)
    rows = torch.zeros(SHAPES[key])
    lora.add_to(rows, key, 0)
    return rows


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "orthogonal", "lora_ga"])
def test_halves_for_base_weights_that_peft_changed_are_refused(tmp_path: Path, start: str) -> None:
    with pytest.raises(CheckpointError, match=f"init_lora_weights={start}: it changes the base weights"):
        open_lora(peft_folder(tmp_path, init_lora_weights=start))


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", None])
def test_other_starts_of_training_do_not_matter(tmp_path: Path, start: object) -> None:
    peft_folder(tmp_path, init_lora_weights=start)
    assert torch.allclose(added(tmp_path, f"{Q}.weight").double(), product(DOWN, UP), atol=1e-5)


def test_an_activated_lora_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="counts for some tokens only"):
        open_lora(peft_folder(tmp_path, alora_invocation_tokens=[1, 2]))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"(q": 4}, "no regular expression"),
        ({"(a|" * 3000 + "b" + ")" * 3000: 4}, "allowed are 300 characters"),
        ({"((q{999}){999}){999}": 4}, "allowed are 300 characters and 3 repeats"),
        ({f"{number}.*x.*y": 4 for number in range(100_000)}, "take too long"),
    ],
)
def test_patterns_that_are_broken_or_costly_are_refused(tmp_path: Path, patterns: dict, message: str) -> None:
    started = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        open_lora(peft_folder(tmp_path, rank_pattern=patterns))
    assert time.process_time() - started < 10


@pytest.mark.parametrize("pattern", [r"(([a-z_0-9.]+)+)+!", ".*" * 25 + "!", "(a|a)*" * 20 + "!"])
def test_backtracking_takes_bounded_time(tmp_path: Path, pattern: str) -> None:
    started = time.process_time()
    try:
        open_lora(peft_folder(tmp_path, alpha_pattern={pattern: 9}))
    except StoryMemError as error:
        assert "take too long" in str(error)
    assert time.process_time() - started < 10


def test_patterns_count_as_in_peft(tmp_path: Path) -> None:
    folder = peft_folder(
        tmp_path, rank_pattern={"q": 4, "k": 7}, r=2, alpha_pattern={r"^blocks\.\d{1,2}\.self_attn.q": 6}
    )
    module = open_lora(folder).modules[Q]
    assert (module.rank, module.alpha) == (4, 6)


def test_kohyas_alpha_of_0_is_the_rank(tmp_path: Path) -> None:
    path, name = tmp_path / "a.safetensors", "lora_unet_" + Q.replace(".", "_")
    tensors = {f"{name}.lora_down.weight": DOWN, f"{name}.lora_up.weight": UP, f"{name}.alpha": torch.tensor(4.0)}
    save_file(tensors, path, metadata={"ss_network_alpha": "0", "ss_network_dim": "4"})
    assert ScaledLora(open_lora(path)).scale(Q) == 1


def test_halves_of_a_convolution_may_be_matrices(tmp_path: Path) -> None:
    shape = SHAPES["patch_embedding.weight"]
    down, up = torch.randn(2, shape[1:].numel()), torch.randn(shape[0], 2)
    tensors = {
        "diffusion_model.patch_embedding.lora_down.weight": down,
        "diffusion_model.patch_embedding.lora_up.weight": up,
    }
    save_file(tensors, tmp_path / "a.safetensors")
    found = added(tmp_path / "a.safetensors", "patch_embedding.weight").double()
    assert torch.allclose(found, product(down, up).view(shape), atol=1e-5)


def test_wrappers_may_be_nested(tmp_path: Path) -> None:
    both = "_fsdp_wrapped_module._checkpoint_wrapped_module."
    wrapped = {
        f"_fsdp_wrapped_module.{key.replace('blocks.0.', f'blocks.0.{both}')}": value for key, value in PEFT.items()
    }
    save_file(wrapped, tmp_path / "a.safetensors")
    assert set(open_lora(tmp_path / "a.safetensors").modules) == {Q}


def test_trained_and_averaged_halves_in_one_file_are_refused(tmp_path: Path) -> None:
    averaged = {key: value / 2 for key, value in PEFT.items()}
    torch.save({"module": PEFT, "ema": averaged}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="twice with different values, in 'module' and in 'ema'"):
        open_lora(tmp_path / "a.pt")
    torch.save({"generator_ema": averaged, "step": 3}, tmp_path / "b.pt")
    assert torch.allclose(added(tmp_path / "b.pt", f"{Q}.weight").double(), product(DOWN, UP) / 4, atol=1e-5)


def test_a_very_long_name_takes_no_time(tmp_path: Path) -> None:
    save_file({**PEFT, "module." * 100_000 + f"{Q}.lora_A.weight": DOWN.clone()}, tmp_path / "a.safetensors")
    started = time.process_time()
    with pytest.raises(CheckpointError, match=r"1 keys are not understood.*\(700,0\d\d characters\)"):
        open_lora(tmp_path / "a.safetensors")
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("style/adapter_model.safetensors",), r"adapters by name \(style/\); name one of these folders"),
        ((".metadata", "__0_0.distcp"), "dcp_to_torch"),
        (("model.safetensors", "optimizer.bin"), "holds several"),
    ],
)
def test_folders_that_are_no_lora_say_what_they_are(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(StoryMemError, match=message):
        open_lora(tmp_path)
