"""A small tokenizer with umT5's special tokens (pad 0, end mark 1, unknown 2), trained on the text below.

It works on bytes, so any language can be encoded; the training text only decides which English fragments are one token.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")

_TRAINING_TEXT = (
    "A wide shot of a quiet harbour at dawn; fishing boats rock on the water, gulls circle above the old lighthouse.",
    "The same young woman in a yellow raincoat walks along the pier, the camera follows from behind in slow motion.",
    "Close-up of her hands opening a small wooden box; warm light falls on an old photograph inside.",
    "The camera pans across a crowded market street, people under umbrellas, neon signs reflected on the wet ground.",
    "Medium shot: the detective looks at the window, rain running down the glass, a train passing in the background.",
    "Cinematic lighting, shallow depth of field, high detail, natural colours, soft shadows, consistent characters.",
    "The robot turns its head towards the child, its eyes glowing blue, while snow begins to fall in the forest.",
    "Low angle shot of a mountain path, the old man and his dog climbing towards the summit as the sun sets.",
    "blurry, overexposed, static, subtitles, low quality, ugly, deformed hands, extra fingers, walking backwards",
)


def write_tiny_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a folder that transformers' ``AutoTokenizer`` loads; the same bytes every time."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    pad, end, unknown = SPECIAL_TOKENS
    names = {"pad_token": pad, "eos_token": end, "unk_token": unknown}
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=1))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
