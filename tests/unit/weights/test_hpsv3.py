"""HPSv3 against the package's own class (``tests/fixtures/hpsv3/make.py``), and what is said of missing parts."""

import importlib.metadata
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig

from storymem_dist.cli.weights import published_weights
from storymem_dist.errors import CheckpointError, ExtraNotInstalled, StoryMemError, WeightsNotFound
from storymem_dist.memory.scorers import HPSV3_BYTES
from storymem_dist.models.hpsv3 import HpsV3, empty_hpsv3
from storymem_dist.weights.hpsv3 import open_hpsv3
from tests.helpers.hpsv3_frames import BATCHES, SIZES, frame
from tests.helpers.tiny_hpsv3 import (
    BASE_NAME,
    PACKAGE_SOURCE,
    WEIGHTS_NAME,
    weight_shapes,
    write_package,
    write_tiny_hpsv3,
)

CPU = torch.device("cpu")
EXPECTED = json.loads((Path(__file__).parents[2] / "fixtures" / "hpsv3" / "scores.json").read_text())["scores"]
DOWNLOAD = "run: storymem-weights download hpsv3"
INSTALL = "run: pip install --no-deps hpsv3==1.0.0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hpsv3(tmp_path_factory.mktemp("hpsv3") / "HPSv3")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("site"))


@pytest.fixture
def own_words(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package whose instruction is the tests' own."""
    monkeypatch.syspath_prepend(str(site))


@pytest.fixture(scope="module")
def loaded(folder: Path, site: Path) -> dict[str, HpsV3]:
    """In fp32 and bf16, with the tests' own instruction."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        files = open_hpsv3(str(folder))
    return {name: files.load(CPU, getattr(torch, name)) for name in ("float32", "bfloat16")}


def scores_of(model: HpsV3, batch: str) -> list[float]:
    frames = [frame(*SIZES[size], number) for size, number in BATCHES[batch]]
    if len({one.shape for one in frames}) == 1:
        return model.rate(torch.stack(frames)).tolist()
    return [model.rate(one[None]).item() for one in frames]


def means(dtype: str, words: str, batch: str) -> list[float]:
    return [mean for mean, _ in EXPECTED[dtype][words][batch]]


@pytest.mark.parametrize("batch", BATCHES)
def test_scores_are_those_of_the_package(loaded: dict[str, HpsV3], batch: str) -> None:
    """Its batch of three sizes is padded; ours are of one size each, and padding on the right changes nothing."""
    assert scores_of(loaded["float32"], batch) == pytest.approx(means("float32", "own", batch), abs=1e-4)


def test_scores_with_the_packages_own_instruction_are_those_of_the_package(folder: Path) -> None:
    try:
        importlib.metadata.version("hpsv3")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package hpsv3 is not installed; {INSTALL}")
    model = open_hpsv3(str(folder)).load(CPU, torch.float32)
    for batch in ("small", "portraits"):
        assert scores_of(model, batch) == pytest.approx(means("float32", "package", batch), abs=1e-4)
    assert means("float32", "package", "small") != pytest.approx(means("float32", "own", "small"), abs=0.1)


def test_in_bf16_the_rotary_tables_are_rounded_as_by_the_package(loaded: dict[str, HpsV3], folder: Path) -> None:
    """With exact tables, scores differ by more than all other rounding of bf16 explains."""
    batches = ("landscape", "portraits", "squares")
    expected = [score for batch in batches for score in means("bfloat16", "own", batch)]

    def error() -> float:
        found = [score for batch in batches for score in scores_of(loaded["bfloat16"], batch)]
        return max(abs(one - other) for one, other in zip(found, expected, strict=True))

    rounded = error()
    loaded["bfloat16"].network.make_tables(CPU, torch.float32)
    exact = error()
    loaded["bfloat16"].network.make_tables(CPU, torch.bfloat16)
    assert rounded < 0.05 < 0.1 < exact


def test_the_held_bytes_are_those_of_the_loaded_weights(folder: Path, own_words: None) -> None:
    files = open_hpsv3(str(folder))
    held = files.load(CPU).network.state_dict()
    assert files.num_bytes() == sum(tensor.nbytes for tensor in held.values())
    shapes = {key: shape for key, shape in weight_shapes().items() if not key.startswith("lm_head.")}
    assert sum(tensor.numel() for tensor in held.values()) == sum(shape.numel() for shape in shapes.values())
    dtypes = {tensor.dtype for key, tensor in held.items() if key.startswith("rm_head.")}
    assert dtypes == {torch.float32}, "the head is fp32 in any case"


def test_the_full_model_has_the_published_size() -> None:
    """Sizes of Qwen2-VL-7B-Instruct, with the vocabulary of its tokenizer and the reward token."""
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    config = Qwen2VLConfig(
        text_config=text | {"num_key_value_heads": 4, "vocab_size": 151658},
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 3584},
    )
    shapes = {key: value.shape for key, value in empty_hpsv3(config).state_dict().items()}
    held = sum(shape.numel() * (4 if key.startswith("rm_head.") else 2) for key, shape in shapes.items())
    assert held == HPSV3_BYTES
    in_file = held + 2 * 151658 * 3584  # of its output layer
    assert in_file == pytest.approx(published_weights()["hpsv3"].num_bytes, rel=1e-3)


def test_the_weights_are_found_by_folder_by_file_and_in_the_hubs_cache(
    folder: Path, own_words: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_hpsv3(str(folder / WEIGHTS_NAME)).base == folder / BASE_NAME
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for repo, files in (
        ("MizzenAI/HPSv3", [folder / WEIGHTS_NAME]),
        (f"Qwen/{BASE_NAME}", (folder / BASE_NAME).iterdir()),
    ):
        place = cache / f"models--{repo.replace('/', '--')}"
        (place / "refs").mkdir(parents=True)
        (place / "refs" / "main").write_text("abc")
        (place / "snapshots" / "abc").mkdir(parents=True)
        for file in files:
            shutil.copy(file, place / "snapshots" / "abc")
    assert open_hpsv3(None).num_bytes() == open_hpsv3(str(folder)).num_bytes()


def truncate(root: Path) -> None:
    content = (root / WEIGHTS_NAME).read_bytes()
    (root / WEIGHTS_NAME).write_bytes(content[: len(content) // 2])


def without_a_layer(root: Path) -> None:
    tensors = load_file(root / WEIGHTS_NAME)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, root / WEIGHTS_NAME)


def with_other_words(root: Path) -> None:
    path = root / BASE_NAME / "tokenizer.json"
    words = json.loads(path.read_text())
    words["added_tokens"].append(words["added_tokens"][-1] | {"id": 262, "content": "<|another|>"})
    path.write_text(json.dumps(words))


def as_one_json(name: str, content: Any) -> Callable[[Path], None]:
    return lambda root: (
        (root / BASE_NAME / name).write_text(content if isinstance(content, str) else json.dumps(content)) and None
    )


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (
            lambda root: (root / WEIGHTS_NAME).unlink(),
            WeightsNotFound,
            f"there is no {{root}}/{WEIGHTS_NAME}; {DOWNLOAD}",
        ),
        (truncate, CheckpointError, f"{{root}}/{WEIGHTS_NAME}: truncated: its header describes"),
        (without_a_layer, CheckpointError, "weights are missing: qwen.language_model.layers.1.mlp.up_proj.weight"),
        (with_other_words, CheckpointError, "qwen.language_model.embed_tokens.weight has shape [263, 64]"),
        (
            lambda root: shutil.rmtree(root / BASE_NAME),
            WeightsNotFound,
            f"config.json of Qwen/{BASE_NAME}, which is not in the hub's local cache; {DOWNLOAD}",
        ),
        (
            lambda root: (root / BASE_NAME / "tokenizer.json").unlink(),
            WeightsNotFound,
            f"{{root}}/{BASE_NAME} has no tokenizer.json; {DOWNLOAD}",
        ),
        (as_one_json("config.json", "{"), CheckpointError, f"{{root}}/{BASE_NAME}: cannot be read as a folder of Qwen"),
        (
            as_one_json("chat_template.json", {"chat_template": "{{ messages[0].role }}"}),
            CheckpointError,
            f"{{root}}/{BASE_NAME}: its chat template leaves out the picture or the text",
        ),
        (
            as_one_json("chat_template.json", "[]"),
            CheckpointError,
            f"{{root}}/{BASE_NAME}: its chat template cannot be used",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_named(
    folder: Path,
    own_words: None,
    tmp_path: Path,
    damage: Callable[[Path], None],
    error: type[StoryMemError],
    message: str,
) -> None:
    root = shutil.copytree(folder, tmp_path / "HPSv3")
    damage(root)
    with pytest.raises(error) as caught:
        open_hpsv3(str(root))
    assert message.format(root=root) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "",
        "INSTRUCTION = 'a {text_prompt}'",
        PACKAGE_SOURCE.replace("<|Reward|>", ""),
        PACKAGE_SOURCE.replace("{text_prompt}", "{another}"),
        PACKAGE_SOURCE.replace("INSTRUCTION = ", "INSTRUCTION = print"),
        PACKAGE_SOURCE + "\n  not Python",
    ],
)
def test_a_package_without_the_instruction_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.syspath_prepend(str(write_package(tmp_path / "site", source)))
    with pytest.raises(ExtraNotInstalled) as caught:
        open_hpsv3(str(folder))
    assert str(caught.value) == (
        "memory.quality=hpsv3: the installed package hpsv3 1.0.0 does not have HPSv3's instruction (INSTRUCTION, "
        f"prompt_with_special_token in hpsv3/dataset/data_collator_qwen.py); {INSTALL}"
    )


def test_a_package_that_is_not_installed_is_named_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = [path for path in sys.path if not list(Path(path or ".").glob("hpsv3-*.dist-info"))]
    monkeypatch.setattr(sys, "path", without)
    with pytest.raises(ExtraNotInstalled, match=f"from its package, which is not installed; {INSTALL}"):
        open_hpsv3(str(tmp_path))
