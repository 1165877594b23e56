"""ViCLIP from a folder: its weights under published names, and the byte-pair vocabulary of CLIP's texts.

    model.safetensors or *.pth              the state dict (in a ``.pth``, under the key ``model``)
    bpe_simple_vocab_16e6.txt.gz            OpenAI's merges, one a line after a first line of comment

Sizes follow from the shapes of the weights. Knows nothing of clips or scores.
"""

import gzip
import html
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import ftfy
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from storymem_dist.errors import CheckpointError, WeightsNotFound
from storymem_dist.models.viclip import ViClip, config_of
from storymem_dist.weights.safetensors_file import SafetensorsFile
from storymem_dist.weights.torch_file import is_safetensors, read_torch

VOCABULARY_FILE = "bpe_simple_vocab_16e6.txt.gz"
MAX_MERGES = 49_152 - 256 - 2
"""Merges that OpenAI's CLIP reads of its file, which holds more."""

UNUSED_KEYS = ("temp",)
"""The temperature of training."""

_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class ClipTokens:
    """Token ids of texts, as OpenAI's CLIP makes them: cleaned, in lower case, cut where they are too long."""

    def __init__(self, path: Path, context: int) -> None:
        """``context``: length of a row. Raises ``WeightsNotFound`` and ``CheckpointError``."""
        merges = _read_merges(path)
        units = _byte_units()
        words = [*units, *(f"{unit}</w>" for unit in units), *(a + b for a, b in merges)]
        vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
        self._tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        self._tokenizer.normalizer = normalizers.Sequence([spaces, normalizers.Lowercase()])
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._start, self._end = len(vocabulary) - 2, len(vocabulary) - 1
        self.context, self.size = context, len(vocabulary)

    def length(self, text: str) -> int:
        """Tokens of the whole text, with start and end."""
        return len(self._ids(text)) + 2

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """``int64 [B, context]``, padded with 0."""
        rows = torch.zeros(len(texts), self.context, dtype=torch.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [self._start, *self._ids(text)[: self.context - 2], self._end]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def _ids(self, text: str) -> list[int]:
        cleaned = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        ids: list[int] = self._tokenizer.encode(cleaned, add_special_tokens=False).ids
        return ids


def load_viclip(folder: Path, device: torch.device) -> tuple[ViClip, ClipTokens]:
    """The model (fp32, for inference) and its tokenizer.

    Raises:
        WeightsNotFound: no such folder, or a file is missing.
        CheckpointError: a file is damaged, or of another model.
    """
    path = viclip_file(folder)
    state = _state_of(path)
    try:
        config = config_of({key: tuple(value.shape) for key, value in state.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    with torch.device("meta"):
        model = ViClip(config)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    wrong = sorted(key for key in {*wanted, *state} if key not in state or wanted.get(key) != tuple(state[key].shape))
    if wrong:
        raise CheckpointError(
            f"{path}: not a complete ViCLIP: {len(wrong)} weights are missing, unknown or of another shape, first "
            f"{', '.join(wrong[:3])}"
        )
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    tokens = ClipTokens(folder / VOCABULARY_FILE, config.context)
    if tokens.size != config.vocabulary:
        raise CheckpointError(
            f"{folder / VOCABULARY_FILE}: makes {tokens.size} tokens, the model has {config.vocabulary}; they belong "
            "to different models"
        )
    return model.to(device).eval().requires_grad_(False), tokens


def viclip_file(folder: Path) -> Path:
    """The file with the weights. Raises ``WeightsNotFound``, and ``CheckpointError`` where several could be meant."""
    found = sorted([*folder.glob("*.safetensors"), *folder.glob("*.pth")]) if folder.is_dir() else []
    if not found:
        raise WeightsNotFound(f"{folder}: there are no weights of ViCLIP (a .safetensors or .pth file)")
    if len(found) > 1:
        raise CheckpointError(f"{folder}: several files of weights: {', '.join(path.name for path in found)}; keep one")
    return found[0]


def _state_of(path: Path) -> Mapping[str, Tensor]:
    if is_safetensors(path):
        file = SafetensorsFile(path)
        state = {key: file.read(key) for key in file}
    else:
        loaded = read_torch(path)
        loaded = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise CheckpointError(f"{path}: not a state dict of ViCLIP (a {type(loaded).__name__})")
        state = loaded
    return {key: value for key, value in state.items() if key not in UNUSED_KEYS}


def _read_merges(path: Path) -> list[tuple[str, str]]:
    if not path.is_file():
        raise WeightsNotFound(f"{path}: no such file; it holds the words of ViCLIP's texts")
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
        pairs = [line.split() for line in lines[1 : MAX_MERGES + 1] if line]
        return [(first, second) for first, second in pairs]
    except (OSError, EOFError, zlib.error, ValueError):
        raise CheckpointError(f"{path}: damaged, or not a list of merges") from None


def _byte_units() -> list[str]:
    """The character that stands for each byte in CLIP's vocabulary, in its order: printable ones first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]
