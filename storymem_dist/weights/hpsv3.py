"""Finds, checks and loads HPSv3: one file of weights, the tokenizer and configuration of its base, and its instruction.

The instruction is a constant of the package hpsv3, which cannot be imported next to this project's libraries. It is
read as a literal from the source of the installed package, so that no text is copied and the version is the user's.
"""

import ast
import importlib.metadata
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLImageProcessorPil

from storymem_dist.errors import CheckpointError, ExtraNotInstalled, WeightsNotFound
from storymem_dist.models.hpsv3 import HEAD, IMAGE_TOKEN, REWARD_TOKEN, HpsV3, HpsV3Network, empty_hpsv3
from storymem_dist.weights.loading import SafetensorsSource, TensorSource, check_keys, read_whole
from storymem_dist.weights.safetensors_file import SafetensorsFile
from storymem_dist.weights.state_dict import assign_state_dict
from storymem_dist.weights.wrapped_source import WrappedSource

REPO, WEIGHTS_NAME = "MizzenAI/HPSv3", "HPSv3.safetensors"
BASE_REPO, BASE_NAME = "Qwen/Qwen2-VL-7B-Instruct", "Qwen2-VL-7B-Instruct"
_CONFIG = "config.json"
_BASE_FILES = (_CONFIG, "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")
_TEMPLATE = "chat_template.json"
_FETCH = "run: storymem-weights download hpsv3 (or use memory.quality=sharpness, which needs no weights)"

_PACKAGE, _INSTALL = "hpsv3", "run: pip install --no-deps hpsv3==1.0.0"
_SOURCE = "hpsv3/dataset/data_collator_qwen.py"
_CONSTANTS = ("INSTRUCTION", "prompt_with_special_token")

_OUTPUT_LAYER = "lm_head."
_TO_NETWORK = (
    (re.compile(r"visual\."), "qwen.visual."),
    (re.compile(r"model\."), "qwen.language_model."),
)
"""Names of transformers 4.45, which the file has, to the network's."""


@dataclass(frozen=True, kw_only=True)
class HpsV3Files:
    """HPSv3 as it lies on the disk: headers, configuration and tokenizer are read and fit each other."""

    weights: Path
    base: Path
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    text: str
    _config: Qwen2VLConfig = field(repr=False)
    _source: TensorSource = field(repr=False)

    def num_bytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of the loaded weights: all but the head in ``dtype``."""
        shapes = {key: self._source.shape(key) for key in self._source.keys()}  # noqa: SIM118  (no dict)
        return sum(shape.numel() * _held_as(key, dtype).itemsize for key, shape in shapes.items())

    def load(self, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> HpsV3:
        """Stream the weights to ``device``, cast to ``dtype`` (the package's is bf16; its head is fp32 in any case).

        Raises ``CheckpointError`` when the file changed since it was opened.
        """
        network = empty_hpsv3(self._config)
        state = {
            key: read_whole(self._source, key, device, _held_as(key, dtype))
            for key in self._source.keys()  # noqa: SIM118
        }
        assign_state_dict(network, state, where=str(self.weights))
        network.make_tables(device, dtype)
        return HpsV3(network.eval().requires_grad_(False), self.tokenizer, self.image_processor, self.text)


def open_hpsv3(checkpoint: str | None) -> HpsV3Files:
    """Find and check HPSv3; reads headers, configuration and tokenizer only.

    ``checkpoint`` is a folder that ``storymem-weights download hpsv3`` made, or a file of weights; None: the hub's
    local cache. The base model's files lie in a folder of its name in the same place or one above, or in that cache.

    Raises:
        ExtraNotInstalled: the package, or its instruction, is not there.
        WeightsNotFound: a file is missing; the message names the command that fetches it.
        CheckpointError: a file is damaged, or of another model.
    """
    instruction = read_instruction()
    weights = _find_weights(checkpoint)
    base = _find_base(weights)
    for name in _BASE_FILES:
        if not (base / name).is_file():
            raise WeightsNotFound(f"memory.quality=hpsv3: {base} has no {name}; {_FETCH}")
    source = _open_source(weights)
    config = _from_base(base, Qwen2VLConfig.from_pretrained)
    tokenizer: PreTrainedTokenizerBase = _from_base(base, AutoTokenizer.from_pretrained)
    tokenizer.add_tokens(REWARD_TOKEN, special_tokens=True)
    config.text_config.vocab_size = len(tokenizer)
    check_keys(_shapes(empty_hpsv3(config)), source)
    return HpsV3Files(
        weights=weights,
        base=base,
        tokenizer=tokenizer,
        image_processor=_from_base(base, Qwen2VLImageProcessorPil.from_pretrained),
        text=_conversation(tokenizer, base, instruction),
        _config=config,
        _source=source,
    )


def read_instruction() -> str:
    """The text that HPSv3 is asked with for an empty prompt. Raises ``ExtraNotInstalled``."""
    try:
        files = importlib.metadata.files(_PACKAGE) or ()
        version = importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ExtraNotInstalled(
            "memory.quality=hpsv3 reads HPSv3's instruction from its package, which is not installed;"
            f" {_INSTALL} (or use memory.quality=sharpness)"
        ) from None
    path = next((Path(str(file.locate())) for file in files if file.as_posix() == _SOURCE), None)
    try:
        instruction, closing = _literals(path.read_text(encoding="utf-8") if path is not None else "")
        text = instruction.format(text_prompt="") + closing
    except (OSError, ValueError, KeyError, IndexError, SyntaxError):
        text = ""
    if text.count(REWARD_TOKEN) != 1:
        raise ExtraNotInstalled(
            f"memory.quality=hpsv3: the installed package {_PACKAGE} {version} does not have HPSv3's instruction"
            f" ({', '.join(_CONSTANTS)} in {_SOURCE}); {_INSTALL}"
        )
    return text


def _literals(source: str) -> list[str]:
    """The values of ``_CONSTANTS`` in a module's source, in this order. Raises ``KeyError`` or ``ValueError``."""
    found = {
        target.id: statement.value
        for statement in ast.parse(source).body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    return [str(ast.literal_eval(found[name])) for name in _CONSTANTS]


def _find_weights(checkpoint: str | None) -> Path:
    if checkpoint is None:
        return _cached(REPO, WEIGHTS_NAME)
    path = Path(checkpoint)
    file = path / WEIGHTS_NAME if path.is_dir() else path
    if not file.is_file():
        raise WeightsNotFound(f"memory.hpsv3_checkpoint={checkpoint}: there is no {file}; {_FETCH}")
    return file


def _find_base(weights: Path) -> Path:
    """The folder of the base model's configuration and tokenizer."""
    for folder in (weights.parent, weights.parent.parent):
        if (folder / BASE_NAME).is_dir():
            return folder / BASE_NAME
    return _cached(BASE_REPO, _CONFIG).parent


def _cached(repo: str, name: str) -> Path:
    try:
        return Path(hf_hub_download(repo, name, local_files_only=True))
    except LocalEntryNotFoundError:
        raise WeightsNotFound(
            f"memory.quality=hpsv3 needs {name} of {repo}, which is not in the hub's local cache; {_FETCH},"
            " and name its folder with memory.hpsv3_checkpoint=weights/HPSv3"
        ) from None


def _open_source(path: Path) -> TensorSource:
    """The weights under the network's names, without the language model's output layer."""
    source = SafetensorsSource(str(path), [SafetensorsFile(path)], _network_key)
    return WrappedSource(source, [key for key in source.keys() if not key.startswith(_OUTPUT_LAYER)])  # noqa: SIM118


def _network_key(stored: str) -> str:
    for prefix, ours in _TO_NETWORK:
        if match := prefix.match(stored):
            return ours + stored[match.end() :]
    return stored


def _shapes(network: HpsV3Network) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in network.state_dict().items()}


def _held_as(key: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if key.startswith(HEAD) else dtype


def _from_base(folder: Path, load: Callable[..., Any]) -> Any:
    try:
        return load(folder, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise a dozen types here, even plain Exception
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder}: cannot be read as a folder of {BASE_REPO} ({first_line})") from None


def _conversation(tokenizer: PreTrainedTokenizerBase, base: Path, instruction: str) -> str:
    """One message of a picture and the instruction, as the base model's template writes it."""
    try:
        path = base / _TEMPLATE
        template = json.loads(path.read_text(encoding="utf-8"))["chat_template"] if path.is_file() else None
        content = [{"type": "image"}, {"type": "text", "text": instruction}]
        messages: Any = [{"role": "user", "content": content}]
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as error:  # a template is a program of its own
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{base}: its chat template cannot be used ({first_line})") from None
    if not isinstance(text, str) or (text.count(IMAGE_TOKEN), text.count(REWARD_TOKEN)) != (1, 1):
        raise CheckpointError(f"{base}: its chat template leaves out the picture or the text; {_FETCH}")
    return text
