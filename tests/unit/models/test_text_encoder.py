"""The text encoder reproduces the original's embeddings, from both layouts, and rejects files of other models."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.models.wan.text_encoder import TextEncoder, clean_prompt
from storymem_dist.weights.text_encoder import load_text_encoder, transformers_t5_key
from tests.helpers.golden import load_golden, strip_prefix

NUM_WORDS = 100


@dataclass(frozen=True)
class Files:
    text_encoder_path: Path
    tokenizer_path: Path


def save_tokenizer(folder: Path, num_words: int = NUM_WORDS) -> None:
    """A real tokenizer of words ``w2``, ``w3``, ...: word ``wN`` is token N; </s> (1) is appended."""
    vocabulary = {"<pad>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, num_words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("t5")
    torch.save(strip_prefix(load_golden("t5")[0], "w."), root / "models_t5.pth")
    save_tokenizer(root / "tokenizer")
    return Files(text_encoder_path=root / "models_t5.pth", tokenizer_path=root / "tokenizer")


@pytest.fixture(scope="module")
def encoder(files: Files) -> TextEncoder:
    return load_text_encoder(files, dtype=torch.float32)


def test_padded_rows_equal_the_original_up_to_their_length(encoder: TextEncoder) -> None:
    tensors, manifest = load_golden("t5")
    hidden = encoder.model(tensors["in.ids"], tensors["in.mask"]).last_hidden_state
    for case in manifest["cases"]:
        row, length = case["row"], case["length"]
        torch.testing.assert_close(hidden[row, :length], tensors[f"out.{row}"], **manifest["tolerance"])


def test_position_biases_equal_the_original(encoder: TextEncoder) -> None:
    tensors, _ = load_golden("t5")
    length = 160
    for layer, expected in zip(encoder.model.encoder.block, tensors["relpos.bias"], strict=True):
        bias = layer.layer[0].SelfAttention.compute_bias(length, length)[0]
        relative = torch.arange(length)[None] - torch.arange(length)[:, None]
        assert torch.equal(bias, expected[:, relative + length - 1])


def test_prompts_are_encoded_alone_and_cut_to_their_length(encoder: TextEncoder) -> None:
    tensors, manifest = load_golden("t5")
    ids = tensors["in.ids"][0][: manifest["cases"][0]["length"]].tolist()
    assert ids[-1] == 1
    text = " ".join(f"w{i}" for i in ids[:-1])
    long_text = " ".join(["w7"] * 50)
    (embedding, other, again) = encoder.encode([text, long_text, text])
    torch.testing.assert_close(embedding, tensors["out.0"], **manifest["tolerance"])
    assert other.shape == (51, tensors["out.0"].shape[1])
    assert again is embedding


def test_an_embedding_does_not_depend_on_the_other_texts(encoder: TextEncoder) -> None:
    texts = ["w5 w6", " ".join(["w9"] * 90), "w5"]
    together = encoder.encode(texts)
    for text, embedding in zip(texts, together, strict=True):
        assert torch.equal(encoder.encode([text])[0], embedding)


def test_long_texts_are_cut_to_the_longest_allowed_and_keep_their_end_mark(encoder: TextEncoder) -> None:
    short = TextEncoder(encoder.model, encoder.tokenizer, max_tokens=8)
    embedding = short.encode([" ".join(["w9"] * 500)])[0]
    assert torch.equal(embedding, short.encode([" ".join(["w9"] * 7)])[0])
    assert len(embedding) == 8


def test_an_empty_text_is_its_end_mark_alone(encoder: TextEncoder) -> None:
    assert encoder.encode([""])[0].shape[0] == 1


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  two\n words\t here ", "two words here"),
        ("“curly” quotes’", '"curly" quotes\''),
        ("Tom &amp; Jerry &lt;3", "Tom & Jerry <3"),
        ("2 < 3 &amp;amp; 4", "2 < 3 & 4"),
        ("caf\u00c3\u00a9", "café"),
        ("色调艳丽，过曝", "色调艳丽,过曝"),
    ],
)
def test_prompts_are_cleaned_as_in_training(text: str, cleaned: str) -> None:
    assert clean_prompt(text) == cleaned


def test_every_native_key_is_renamed_as_the_fixture_says() -> None:
    rules = json.loads(json.dumps(load_golden("t5")[1]["native_to_transformers_UMT5EncoderModel"]))
    for native, expected in rules.items():
        for letter in "qkvo" if "{q,k,v,o}" in native else "-":
            concrete, wanted = (
                text.replace("{i}", "17").replace("{q,k,v,o}", letter) for text in (native, expected.split(" (")[0])
            )
            assert transformers_t5_key(concrete) == wanted


def test_the_transformers_folder_gives_the_same_embeddings(encoder: TextEncoder, files: Files, tmp_path: Path) -> None:
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    other = load_text_encoder(Files(tmp_path / "text_encoder", files.tokenizer_path), dtype=torch.float32)
    assert torch.equal(other.encode(["w3 w4 w5"])[0], encoder.encode(["w3 w4 w5"])[0])


def test_weights_are_cast_and_the_shared_embedding_stays_one_parameter(files: Files) -> None:
    model = load_text_encoder(files, dtype=torch.bfloat16).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.encoder.embed_tokens.weight is model.shared.weight


def test_missing_files_are_named(files: Files, tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound, match=r"absent\.pth: no text encoder"):
        load_text_encoder(Files(tmp_path / "absent.pth", files.tokenizer_path))
    with pytest.raises(WeightsNotFound, match="absent: no tokenizer"):
        load_text_encoder(Files(files.text_encoder_path, tmp_path / "absent"))


def test_a_file_of_another_model_is_refused(files: Files, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="not the umT5 encoder"):
        load_text_encoder(Files(tmp_path / "other.pth", files.tokenizer_path))


def test_a_truncated_file_is_refused_by_name(files: Files, tmp_path: Path) -> None:
    cut = tmp_path / "cut.pth"
    cut.write_bytes(files.text_encoder_path.read_bytes()[:-4000])
    with pytest.raises(CheckpointError, match=r"cut\.pth"):
        load_text_encoder(Files(cut, files.tokenizer_path))


def test_missing_and_leftover_weights_are_named(files: Files, tmp_path: Path) -> None:
    native = torch.load(files.text_encoder_path, weights_only=True)
    for change, message in (
        ({k: v for k, v in native.items() if k != "norm.weight"}, r"missing: encoder\.final_layer_norm\.weight"),
        (native | {"decoder.x": torch.zeros(1)}, r"no place in the model: decoder\.x"),
    ):
        torch.save(change, tmp_path / "bad.pth")
        with pytest.raises(CheckpointError, match=message):
            load_text_encoder(Files(tmp_path / "bad.pth", files.tokenizer_path))


def test_a_transformers_folder_with_weights_missing_is_refused(
    encoder: TextEncoder, files: Files, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    encoder.model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: encoder\.block\.1\.layer\.0\.SelfAttention\.q\.weight"):
        load_text_encoder(Files(tmp_path, files.tokenizer_path))


def test_a_folder_without_a_tokenizer_is_refused(files: Files, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer folder"):
        load_text_encoder(Files(files.text_encoder_path, tmp_path))


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(files: Files, tmp_path: Path) -> None:
    save_tokenizer(tmp_path, num_words=500)
    with pytest.raises(CheckpointError, match=r"500 tokens, but .* has embeddings for 120"):
        load_text_encoder(Files(files.text_encoder_path, tmp_path))
