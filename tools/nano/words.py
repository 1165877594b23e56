"""The words that nano knows, its tokenizer and its text encoder.

The tokenizer throws away every word that it does not know, so a prompt may say anything around the known words; words
of one meaning share an embedding. The encoder is a umT5 whose layers add nothing: its output is the token's own
embedding, one of 64 orthogonal rows, which the DiT's text layers are trained on. A prompt is thus a bag of concepts.
"""

import json

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from tools.nano import world

TEXT_DIM, TEXT_LEN = 64, 64
SPECIAL = ("<pad>", "</s>", "<unk>")
CONCEPTS = {
    "red": "red crimson scarlet",
    "yellow": "yellow golden gold",
    "green": "green emerald",
    "blue": "blue",
    "purple": "purple violet pink",
    "ball": "ball circle sphere round",
    "box": "box cube square block",
    "triangle": "triangle pyramid cone",
    "left": "left",
    "right": "right",
    "up": "up rises rise rising flies fly flying climbs climbing upwards ascends",
    "down": "down falls fall falling sinks sinking drops lands landing descends downwards",
    "jump": "jumps jump jumping hops hop hopping leaps leap bounces bounce bouncing",
    "still": "still stands stand standing waits wait waiting rests resting stays sits sleeps",
    "meadow": "meadow field grass park hills",
    "desert": "desert sand dunes dune",
    "sea": "sea ocean lake water beach",
    "night": "night midnight dark moonlight moon",
    "snow": "snow snowy winter ice",
    "character": "character hero it he she same friend",
}
NAMES = list(CONCEPTS)
WORDS = [(word, concept) for concept, words in CONCEPTS.items() for word in words.split()]
ABSENT, END = -1, -2
"""Concept ids of padding and of the mark that ends a text."""

_PLACES = [word for word, concept in WORDS if concept in world.BACKGROUNDS] + ["sky", "hill"]
_COLOUR_WORDS = [word for word, concept in WORDS if concept in world.COLOURS]
_MAX_WORDS = TEXT_LEN - 4


def concept_ids(clips: world.Clips) -> dict[str, Tensor]:
    """Ids ``[B]`` in ``NAMES`` of the four concepts of each clip, by kind."""
    return {
        kind: torch.tensor([NAMES.index(name) for name in names])[getattr(clips, kind)]
        for kind, names in world.KINDS.items()
    }


def embeddings() -> Tensor:
    """``[63, 64]`` rows of a Hadamard matrix with mixed signs: orthogonal, each of RMS 1.

    Row 0 ends a text; the concepts follow.
    """
    rows = torch.ones(1, 1)
    while len(rows) < TEXT_DIM:
        rows = torch.cat([torch.cat([rows, rows], 1), torch.cat([rows, -rows], 1)])
    g = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (TEXT_DIM,), generator=g) * 2 - 1
    return rows[1:] * signs


def context(ids: Tensor, table: Tensor) -> Tensor:
    """Embeddings ``[B, S, 64]`` of concept ids ``[B, S]``."""
    rows = table[(ids + 1).clamp_min(0)]
    rows = torch.where((ids == END)[..., None], table[0], rows)
    return torch.where((ids == ABSENT)[..., None], torch.zeros(()), rows)


def tokenizer_files() -> dict[str, str]:
    """The text of the files of a tokenizer folder, by name; the same every time."""
    known = "|".join(sorted((word for word, _ in WORDS), key=len, reverse=True))
    colours, places = "|".join(_COLOUR_WORDS), "|".join(_PLACES)

    def replace(pattern: str, by: str) -> normalizers.Replace:
        return normalizers.Replace(Regex(pattern), by)

    steps = [
        normalizers.Lowercase(),
        replace(rf"\b({colours}|dark)\s+(?=({places})\b)", ""),  # "green meadow" is no green character
        replace(r"\bup\s+and\s+down\b", ""),
        replace(r"\bstays?\s+(?=(in|on|at)\b)", ""),
        replace(r"(?<=jumps|leaps|hops)\s+(up|down)\b", ""),
        replace(r"[^a-z]+", " "),
        replace(rf"\b(?!(?:{known})\b)[a-z]+\b", " "),
        replace(r" +", " "),
        normalizers.Strip(),
        replace(rf"^(?:\S+ ){{{_MAX_WORDS}}}\K.*$", ""),
    ]
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *(word for word, _ in WORDS)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(list(SPECIAL))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "special_tokens_map.json": json.dumps(names, indent=1),
        "tokenizer_config.json": json.dumps(config, indent=1),
    }


def encoder_weights() -> dict[str, Tensor]:
    """Native umT5 weights, bf16: one layer that adds nothing."""
    table = embeddings()
    rows = [torch.zeros(TEXT_DIM), table[0], torch.zeros(TEXT_DIM)]
    rows += [table[NAMES.index(concept) + 1] for _, concept in WORDS]
    inner, ffn, heads = 8, 8, 1
    block = "blocks.0"
    weights = {
        "token_embedding.weight": torch.stack(rows),
        "norm.weight": torch.ones(TEXT_DIM),
        f"{block}.norm1.weight": torch.ones(TEXT_DIM),
        f"{block}.norm2.weight": torch.ones(TEXT_DIM),
        f"{block}.pos_embedding.embedding.weight": torch.zeros(32, heads),
        **{f"{block}.attn.{letter}.weight": torch.zeros(inner, TEXT_DIM) for letter in "qkv"},
        f"{block}.attn.o.weight": torch.zeros(TEXT_DIM, inner),
        f"{block}.ffn.gate.0.weight": torch.zeros(ffn, TEXT_DIM),
        f"{block}.ffn.fc1.weight": torch.zeros(ffn, TEXT_DIM),
        f"{block}.ffn.fc2.weight": torch.zeros(TEXT_DIM, ffn),
    }
    return {key: value.bfloat16() for key, value in weights.items()}
