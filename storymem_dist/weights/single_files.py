"""Finds the parts of a base model among single files, as ComfyUI's users have them: by content and experts' names.

A folder is searched with the folders in it (``diffusion_models``, ``unet``, ``text_encoders``, ``vae``, ...), two
levels deep. The header of a file says whether it is a transformer, and of which kind, a VAE or a text encoder; which of
the two experts a transformer is, only its name says. Reads headers and samples.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path

import torch

from storymem_dist.errors import CheckpointError, ConfigError, WeightsNotFound
from storymem_dist.files import file_identity
from storymem_dist.models.wan.dit import DiTConfig
from storymem_dist.models.wan.presets import EXPERTS, HIGH_NOISE, LOW_NOISE
from storymem_dist.weights.gguf_file import GgufSource, is_gguf
from storymem_dist.weights.safetensors_file import SafetensorsFile
from storymem_dist.weights.tensor_files import VAE_PREFIXES, dit_names, read_json, without_prefix

TRANSFORMER, VAE, TEXT_ENCODER = "transformer", "VAE", "text encoder"
_PART_WORDS = {VAE: ("vae",), TEXT_ENCODER: ("t5", "encoder")}
_SUFFIXES = (".safetensors", ".gguf")
_LEVELS = 3
_MOST_ENTRIES = 20_000
_HEAD_DIM = 128
_VAE_CHANNELS = 16
_EXPERT_IN_NAME = re.compile(r"(?<![a-z])(high|low)(?![a-z])|(high|low)[ _.-]?noise")
_EXPERT_OF_WORD = {"high": HIGH_NOISE, "low": LOW_NOISE}
_OTHER_MODELS = {
    "face_adapter.": "an Animate model",
    "casual_audio_encoder.": "an S2V model",
    "vace_": "a VACE model",
    "img_emb.": "a Wan2.1 model with image embeddings",
}
_VAE_MARKS = (("encoder.conv1.weight", "conv2.weight"), ("encoder.conv_in.weight", "post_quant_conv.weight"))
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_END_OF_TEXT = "</s>"

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFiles:
    """Paths that replace what a folder would hold; None: not given. Experts come in pairs."""

    high_noise: Path | None = None
    low_noise: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None

    def experts(self, kind: str) -> dict[str, Path] | None:
        """The files of both experts. Raises ``ConfigError`` for one alone, ``WeightsNotFound`` for one that is none."""
        given = {expert: path for expert in EXPERTS if (path := getattr(self, expert)) is not None}
        if len(given) == 1:
            (absent,) = set(EXPERTS) - set(given)
            raise ConfigError(
                f"model.{kind}_{next(iter(given))} is set without model.{kind}_{absent}; a base model has two experts"
            )
        for expert, path in given.items():
            if not path.exists():
                raise WeightsNotFound(f"model.{kind}_{expert}={path}: no such file")
        return given or None

    @classmethod
    def names(cls) -> list[str]:
        """The names of the paths."""
        return [one.name for one in fields(cls)]

    def given(self) -> dict[str, Path]:
        """The paths that are given, by name."""
        return {name: path for name in self.names() if (path := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundFile:
    """A file of weights: what it is (one of the three constants), and for transformers their input channels."""

    path: Path
    role: str
    in_dim: int = 0
    other_model: str | None = None
    expert: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundFiles:
    """The files of weights under ``root``. ``errors``: of the files that could not be read, by path."""

    root: Path
    files: Sequence[FoundFile]
    errors: Mapping[Path, CheckpointError]
    tokenizers: Sequence[Path]

    def kinds(self, in_dims: Mapping[str, int]) -> list[str]:
        """The kinds of base models of which there is a transformer."""
        present = {file.in_dim for file in self.files if file.role == TRANSFORMER}
        return [kind for kind, in_dim in in_dims.items() if in_dim in present]

    def experts(self, kind: str, in_dims: Mapping[str, int], fetch_command: str) -> dict[str, Path] | None:
        """The files of both experts of ``kind``; None if there is no transformer at all.

        Raises ``CheckpointError`` if it is not clear which files they are, ``WeightsNotFound`` if one is missing.
        """
        transformers = [file for file in self.files if file.role == TRANSFORMER]
        if not transformers:
            self._raise_unreadable()
            return None
        fitting = [file for file in transformers if file.in_dim == in_dims[kind] and not file.other_model]
        if not fitting:
            self._raise_unreadable()
            raise CheckpointError(
                f"{self.root}: no {kind.upper()} transformer (in_dim {in_dims[kind]}); there are: "
                f"{', '.join(_described(file, in_dims) for file in transformers[:4])}; get one with: {fetch_command}"
            )
        by_expert = {name: _once(file.path for file in fitting if file.expert == name) for name in EXPERTS}
        settings = " and ".join(f"model.{kind}_{name}=FILE" for name in EXPERTS)
        for name, paths in by_expert.items():
            if len(paths) > 1:
                raise CheckpointError(
                    f"{self.root}: {len(paths)} files could be the {_words(name)} expert of {kind.upper()}: "
                    f"{self._names(paths)}; say which with {settings}"
                )
            if not paths:
                self._raise_unreadable()
                unnamed = [file.path for file in fitting if file.expert is None]
                if unnamed:
                    raise CheckpointError(
                        f"{self.root}: whether {self._names(unnamed)} is the high-noise or the low-noise expert, only "
                        f"its name could say (high_noise, low_noise); say which with {settings}"
                    )
                other = next(iter(path for paths in by_expert.values() for path in paths))
                raise WeightsNotFound(
                    f"{self.root}: the {_words(name)} expert of {kind.upper()} is missing ({other.name} is the other "
                    f"one); put its file there, or say where the files are with {settings}"
                )
        experts = {name: paths[0] for name, paths in by_expert.items()}
        require_different(experts)
        return experts

    def part(self, role: str, setting: str) -> Path | None:
        """The file of a VAE or text encoder; None if there is none. Raises ``CheckpointError`` if there are several."""
        paths = _once(file.path for file in self.files if file.role == role)
        if len(paths) > 1:
            raise CheckpointError(
                f"{self.root}: {len(paths)} files could be the {role}: {self._names(paths)}; say which with "
                f"{setting}=FILE"
            )
        if not paths:
            self._raise_unreadable(_PART_WORDS[role])
        return paths[0] if paths else None

    def tokenizer(self) -> Path | None:
        """The folder of umT5's tokenizer; other models have theirs in such folders too.

        Raises ``CheckpointError`` if several could be it.
        """
        fitting = [path for path in _once(self.tokenizers) if _may_be_umt5(path)]
        named = [path for path in fitting if "umt5" in path.relative_to(self.root).as_posix().lower()]
        folders = named or fitting
        if len(folders) > 1:
            raise CheckpointError(
                f"{self.root}: {len(folders)} folders could be the tokenizer: {self._names(folders)}; say which with "
                "model.tokenizer=FOLDER"
            )
        return folders[0] if folders else None

    def _names(self, paths: Sequence[Path]) -> str:
        names = [path.relative_to(self.root).as_posix() for path in paths]
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    def _raise_unreadable(self, words: Sequence[str] = ()) -> None:
        """Raise the error of a file that may be the missing one, by its name (without ``words``: an expert's)."""
        for path, error in self.errors.items():
            is_named = any(word in path.name.lower() for word in words) if words else expert_in_path(self.root, path)
            if is_named and "lora" not in path.relative_to(self.root).as_posix().lower():
                raise error


def require_different(experts: Mapping[str, Path]) -> None:
    """Raise ``CheckpointError`` if the files of both experts hold the same."""
    high, low = experts[HIGH_NOISE], experts[LOW_NOISE]
    if high.is_file() and low.is_file() and file_identity(high) == file_identity(low):
        raise CheckpointError(
            f"{high} and {low}: both experts are the same file; Wan2.2-A14B has a high-noise and a low-noise one"
        )


def find_files(root: Path) -> FoundFiles:
    """Look into every file of weights under ``root``."""
    files: list[FoundFile] = []
    errors: dict[Path, CheckpointError] = {}
    tokenizers: list[Path] = []
    for path in _walk(root):
        if path.name in _TOKENIZER_FILES:
            tokenizers.append(path.parent)
        elif path.suffix in _SUFFIXES and ".safetensors.index" not in path.name:
            try:
                if (found := look_into(path, expert_in_path(root, path))) is not None:
                    files.append(found)
            except CheckpointError as error:
                errors[path] = error
        elif path.suffix == ".pth" and (role := _pth_role(path)):
            files.append(FoundFile(path=path, role=role))
    return FoundFiles(root=root, files=files, errors=errors, tokenizers=tokenizers)


def look_into(path: Path, expert: str | None = None) -> FoundFile | None:
    """What a safetensors or GGUF file holds; None: nothing of this model. Raises ``CheckpointError``."""
    shapes = shapes_in(path)
    if is_gguf(path) and any(key.startswith("enc.blk.") for key in shapes):
        raise CheckpointError(
            f"{path}: a text encoder as GGUF; GGUF is read for transformers only; use a .safetensors file of umT5, "
            "such as umt5_xxl_fp8_e4m3fn_scaled.safetensors"
        )
    strip = dit_names(shapes)
    native = {strip(key): shape for key, shape in shapes.items()}
    patch = native.get("patch_embedding.weight")
    if patch is not None and "blocks.0.self_attn.q.weight" in native and len(patch) == 5:
        other = next(
            (what for prefix, what in _OTHER_MODELS.items() if any(key.startswith(prefix) for key in native)), None
        )
        return FoundFile(path=path, role=TRANSFORMER, in_dim=patch[1], other_model=other, expert=expert)
    strip = without_prefix(shapes, VAE_PREFIXES)
    bare = {strip(key): shape for key, shape in shapes.items()}
    for first, key in _VAE_MARKS:
        if first in bare and key in bare and bare[key][0] == _VAE_CHANNELS and len(bare[key]) == 5:
            return FoundFile(path=path, role=VAE)
    # umT5 has position biases in every block, T5 only in the first
    if any(key in shapes for key in ("blocks.1.pos_embedding.embedding.weight", _SECOND_BIAS)):
        return FoundFile(path=path, role=TEXT_ENCODER)
    return None


_SECOND_BIAS = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"


def shapes_in(path: Path) -> Shapes:
    """Names and shapes of all tensors of a safetensors or GGUF file. Raises ``CheckpointError``."""
    if is_gguf(path):
        gguf = GgufSource(path)
        keys = gguf.keys()
        return {key: gguf.shape(key) for key in keys}
    file = SafetensorsFile(path)
    return {key: file[key].shape for key in file}


def config_from_shapes(shapes: Shapes, where: str) -> DiTConfig:
    """Sizes of a transformer from its weights, under native names; heads are 128 wide, as in all models of Wan.

    Raises ``CheckpointError`` if a weight is missing, or the width is not a multiple of 128.
    """
    try:
        dim, in_dim, *patch = shapes["patch_embedding.weight"]
        sizes = {
            "dim": dim,
            "in_dim": in_dim,
            "out_dim": shapes["head.head.weight"][0] // prod(patch),
            "patch_size": patch,
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
            "freq_dim": shapes["time_embedding.0.weight"][1],
            "text_dim": shapes["text_embedding.0.weight"][1],
            "num_layers": 1 + max(int(key.split(".")[1]) for key in shapes if re.match(r"blocks\.\d+\.", key)),
            "num_heads": max(1, dim // _HEAD_DIM),
        }
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{where}: not a whole Wan transformer: {error} is missing or misshapen") from None
    if dim % _HEAD_DIM:
        raise CheckpointError(
            f"{where}: how many attention heads the model has cannot be told from a file alone (its width {dim} is not "
            f"a multiple of {_HEAD_DIM}, Wan's width of a head); put the model's config.json next to the file"
        )
    return DiTConfig.from_json(sizes, where)


def expert_in_path(root: Path, path: Path) -> str | None:
    """The expert that a file's name speaks of, or else that of the folder in which it lies."""
    for text in (path.stem, *(part.name for part in path.relative_to(root).parents if part.name)):
        words = {high or low for high, low in _EXPERT_IN_NAME.findall(text.lower())}
        if len(words) == 1:
            return _EXPERT_OF_WORD[words.pop()]
    return None


def _walk(root: Path) -> Iterator[Path]:
    """Files under ``root``, sorted, at most ``_LEVELS`` deep; hidden folders are left out."""
    folders, seen = [(root, 1)], 0
    while folders:
        folder, level = folders.pop(0)
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            continue
        seen += len(entries)
        if seen > _MOST_ENTRIES:
            raise CheckpointError(f"{root}: more than {_MOST_ENTRIES:,} files; give a folder nearer to the weights")
        for entry in entries:
            if entry.is_dir():
                if level < _LEVELS and not entry.name.startswith("."):
                    folders.append((Path(entry.path), level + 1))
            else:
                yield Path(entry.path)


def _pth_role(path: Path) -> str | None:
    """What a ``.pth`` file is by its published name; looking into it would unpickle it."""
    return {"Wan2.1_VAE": VAE, "models_t5_umt5-xxl-enc-bf16": TEXT_ENCODER}.get(path.stem)


def _once(paths: Iterable[Path]) -> list[Path]:
    """Each file once, though a linked folder shows it twice."""
    return list({path.resolve(): path for path in paths}.values())


def is_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer, of whatever model."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _may_be_umt5(folder: Path) -> bool:
    """False for a tokenizer whose configuration ends texts in another way than umT5's."""
    path = folder / "tokenizer_config.json"
    try:
        end = read_json(path).get("eos_token") if path.is_file() else None
    except CheckpointError:
        return True  # loading it says what is wrong
    return (end.get("content") if isinstance(end, dict) else end) in (None, _END_OF_TEXT)


def _described(file: FoundFile, in_dims: Mapping[str, int]) -> str:
    kind = next((kind.upper() for kind, in_dim in in_dims.items() if in_dim == file.in_dim), "another model")
    return f"{file.path.name} (in_dim {file.in_dim}: {file.other_model or kind})"


def _words(expert: str) -> str:
    return expert.replace("_", "-")
