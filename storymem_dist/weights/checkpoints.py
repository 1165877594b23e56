"""Wan2.2-A14B weights in a folder: finds layout and parts, and checks that they are complete and the right ones.

Three layouts: the native one (``high_noise_model/``, ``low_noise_model/``, ``*.pth``), diffusers' (``transformer/`` =
high noise, ``transformer_2/`` = low noise), and folders written by ``storymem-weights prepare``. All cheap checks run
here, before weights are read: files, index, headers against file sizes, model sizes, keys and shapes. Knows nothing
about how tensors get into a model.
"""

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from storymem_dist.errors import CheckpointError, StoryMemError, WeightsNotFound, require_one_of
from storymem_dist.files import file_identity, folder_identity
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import EXPERTS, HIGH_NOISE, I2V_IN_DIM, LOW_NOISE, T2V_IN_DIM
from storymem_dist.story.modes import M2V, T2V
from storymem_dist.weights.key_maps import native_dit_key
from storymem_dist.weights.loading import SafetensorsSource, TensorSource, WeightDelta, check_deltas, check_keys
from storymem_dist.weights.packagings import refuse_file, refuse_folder, refuse_part, refuse_tensors
from storymem_dist.weights.prepared import Float8Source, PreparedManifest, check_files, is_prepared, read_manifest
from storymem_dist.weights.safetensors_file import SafetensorsFile, refuse_other_formats

IN_DIMS = {"t2v": T2V_IN_DIM, "i2v": I2V_IN_DIM}
"""Input channels of the experts, by kind of base model."""

BASE_OF_KIND = {T2V: "t2v", M2V: "i2v"}
"""The base model of each kind of experts."""

REPOS = {"t2v": "Wan-AI/Wan2.2-T2V-A14B", "i2v": "Wan-AI/Wan2.2-I2V-A14B"}
"""Where the published weights of each kind are."""

_STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ZIP_MAGIC = b"PK"
_TI2V_5B_IN_DIM = 48


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFolders:
    """The folders of a whole model: ``open_checkpoint(t2v_dir, "t2v")`` and ``(i2v_dir, "i2v")``, ``storymem_lora``."""

    t2v_dir: Path
    i2v_dir: Path
    lora_dir: Path

    @classmethod
    def inside(cls, root: Path) -> "ModelFolders":
        """The folders under the names of the published repositories, inside one folder."""
        return cls(t2v_dir=root / "Wan2.2-T2V-A14B", i2v_dir=root / "Wan2.2-I2V-A14B", lora_dir=root / "StoryMem")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointLayout:
    """Where a layout keeps its parts, relative to the folder, and how its DiT keys become native ones."""

    name: str
    expert_folders: Mapping[str, str]
    vae: str
    text_encoder: str
    tokenizer: str
    rename: Callable[[str], str]


NATIVE = CheckpointLayout(
    name="native",
    expert_folders={HIGH_NOISE: "high_noise_model", LOW_NOISE: "low_noise_model"},
    vae="Wan2.1_VAE.pth",
    text_encoder="models_t5_umt5-xxl-enc-bf16.pth",
    tokenizer="google/umt5-xxl",
    rename=str,
)
DIFFUSERS = CheckpointLayout(
    name="diffusers",
    expert_folders={HIGH_NOISE: "transformer", LOW_NOISE: "transformer_2"},
    vae="vae",
    text_encoder="text_encoder",
    tokenizer="tokenizer",
    rename=native_dit_key,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WanCheckpoint:
    """A checked folder of weights. ``identity`` changes when any of its files changes (see ``file_identity``)."""

    root: Path
    kind: str
    layout: str
    dit_config: DiTConfig
    vae_path: Path
    text_encoder_path: Path
    tokenizer_path: Path
    identity: str
    sources: Mapping[str, TensorSource]
    prepared: PreparedManifest | None = None

    def expert(self, name: str) -> TensorSource:
        """The weights of ``high_noise`` or ``low_noise``, under native names."""
        return self.sources[name]

    def check_loras(self, loras: Sequence[WeightDelta]) -> None:
        """Raise ``CheckpointError`` unless each LoRA fits these experts' names and widths."""
        check_deltas(dit_shapes(self.dit_config), loras)


def open_checkpoint(path: str | Path, kind: str) -> WanCheckpoint:
    """Find and check the weights of a base model; reads headers and samples only.

    Args:
        path: the folder of a download of ``Wan-AI/Wan2.2-{T2V,I2V}-A14B`` or its ``-Diffusers`` variant, or one
            prepared from either.
        kind: the base model that is needed, ``t2v`` or ``i2v``.

    Raises:
        WeightsNotFound: the folder or a file in it is missing; the message names the command that fetches it.
        CheckpointError: a file is damaged, or the weights are of another model than ``kind``.
    """
    require_one_of("kind", kind, IN_DIMS)
    root = require_folder(path, kind)
    manifest = _check_prepared(root, kind) if is_prepared(root) else None
    layout = _prepared_layout(manifest) if manifest else _detect_layout(root, kind)
    folders = {expert: root / folder for expert, folder in layout.expert_folders.items()}
    config = _common_config(root, folders, kind)
    files = {expert: sharded_files(folder, download_command(root, kind)) for expert, folder in folders.items()}
    sources: dict[str, TensorSource] = {}
    for expert in EXPERTS:
        stored = SafetensorsSource(str(folders[expert]), files[expert], layout.rename)
        sources[expert] = Float8Source(stored) if manifest and manifest.dtype == "float8" else stored
        refuse_tensors(sources[expert], download_command(root, kind))
        _check_dtypes(sources[expert])
        check_keys(dit_shapes(config), sources[expert])
    parts = _check_other_parts(root, layout, kind)
    all_files = [file.path for expert in EXPERTS for file in files[expert]]
    all_files += [folder / "config.json" for folder in folders.values()]
    all_files += [file for part in parts.values() for file in _files_of(part)]
    return WanCheckpoint(
        root=root,
        kind=kind,
        layout=layout.name,
        dit_config=config,
        vae_path=parts["vae"],
        text_encoder_path=parts["text_encoder"],
        tokenizer_path=parts["tokenizer"],
        identity=folder_identity(root, all_files),
        sources=sources,
        prepared=manifest,
    )


def require_folder(path: str | Path, kind: str) -> Path:
    """The folder of a base model. Raises ``WeightsNotFound``, with the command that fetches it, if it is none."""
    root = Path(path)
    refuse_file(root, download_command(root, kind))
    if not root.is_dir():
        raise WeightsNotFound(
            f"{kind.upper()} weights: {root} is not a folder; get them with: {download_command(root, kind)}"
        )
    return root


@lru_cache(maxsize=8)
def dit_shapes(config: DiTConfig) -> Mapping[str, torch.Size]:
    """Names and shapes of all weights of a DiT of these sizes (built without memory)."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in WanDiT(config).named_parameters()}


def download_command(root: Path, kind: str) -> str:
    """The command line that fetches (or completes) the published weights of ``kind`` into ``root``."""
    return f"hf download {REPOS[kind]} --local-dir {root}"


def sharded_files(folder: Path, fetch_command: str) -> list[SafetensorsFile]:
    """The safetensors files of one model: those its index names, or the single file where there is no index.

    Raises:
        WeightsNotFound: a shard is missing (the message has its number), or there are none.
        CheckpointError: a file is damaged, or index and files contradict each other.
    """
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) == 1:
            return [SafetensorsFile(files[0])]
        problem = "there are no .safetensors files" if not files else "there are several shards but no index"
        if not files and any(folder.glob("*.gguf")):
            problem = "there are GGUF files, whose quantized tensors cannot be read here, and no .safetensors files"
        raise WeightsNotFound(f"{folder}: {problem}; complete it with: {fetch_command}")
    weight_map = read_json(indexes[0]).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{indexes[0]}: not an index of safetensors files: it has no weight_map")
    names = sorted(set(weight_map.values()))
    for number, name in enumerate(names, start=1):
        if not (folder / name).is_file():
            raise WeightsNotFound(
                f"shard {number} of {len(names)} is missing: {folder / name}; complete it with: {fetch_command}"
            )
    opened = {name: SafetensorsFile(folder / name) for name in names}
    for key, name in weight_map.items():
        if key not in opened[name]:
            raise CheckpointError(f"{indexes[0]}: lists {key} in {name}, which does not hold it")
    return list(opened.values())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ``WeightsNotFound`` without a file, ``CheckpointError`` for any other content."""
    if not path.is_file():
        raise WeightsNotFound(f"{path}: no such file; the download is incomplete")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


def _check_prepared(root: Path, kind: str) -> PreparedManifest:
    """The manifest of a prepared folder; checks that files are complete and sources, if still there, unchanged."""
    manifest = read_manifest(root)
    if manifest.kind != kind:
        raise CheckpointError(
            f"{root}: prepared from {manifest.kind.upper()} weights; here {kind.upper()} weights are needed"
        )
    check_files(root, manifest)
    source = Path(manifest.source["path"])
    try:
        changed = open_checkpoint(source, kind).identity != manifest.source["identity"]
    except StoryMemError:
        changed = False  # the source was moved or removed: nothing to compare with
    if changed:
        raise CheckpointError(f"{root}: stale: {source} changed since it was prepared; prepare the weights again")
    for lora in (lora for loras in manifest.loras.values() for lora in loras):
        path = Path(lora["path"])
        if path.is_file() and file_identity(path) != lora["file_identity"]:
            raise CheckpointError(f"{root}: stale: {path} changed since it was merged; prepare the weights again")
    return manifest


def _prepared_layout(manifest: PreparedManifest) -> CheckpointLayout:
    return replace(
        NATIVE,
        name="prepared",
        vae=manifest.parts["vae"],
        text_encoder=manifest.parts["text_encoder"],
        tokenizer=manifest.parts["tokenizer"],
    )


def _detect_layout(root: Path, kind: str) -> CheckpointLayout:
    for layout, marker in ((NATIVE, None), (DIFFUSERS, "model_index.json")):
        there = [folder for folder in layout.expert_folders.values() if (root / folder).is_dir()]
        if len(there) == len(layout.expert_folders):
            return layout
        if there or (marker and (root / marker).is_file()):
            for folder in there:
                _refuse_other_models(root / folder / "config.json", kind)
            absent = [folder for folder in layout.expert_folders.values() if folder not in there]
            raise WeightsNotFound(
                f"{root}: an expert is missing: {' and '.join(f'{folder}/' for folder in absent)}; Wan2.2-A14B has two "
                f"(high and low noise); complete it with: {download_command(root, kind)}"
            )
    _refuse_other_models(root / "config.json", kind)
    refuse_folder(root, download_command(root, kind))
    found = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
    raise WeightsNotFound(
        f"{kind.upper()} weights: {root} is not a Wan2.2-A14B folder (it holds: {found}; expected high_noise_model/ "
        f"and low_noise_model/, or transformer/ and transformer_2/); get them with: {download_command(root, kind)}"
    )


def _refuse_other_models(config_path: Path, kind: str) -> None:
    """Raise ``CheckpointError`` naming the model when a configuration is not that of an A14B expert."""
    if not config_path.is_file():
        return
    values = read_json(config_path)
    in_dim = values.get("in_dim", values.get("in_channels"))
    if in_dim is None:
        return
    if in_dim == _TI2V_5B_IN_DIM:
        raise CheckpointError(
            f"{config_path}: this is Wan2.2-TI2V-5B (in_dim 48, one expert, another VAE); StoryMem needs "
            f"{REPOS[kind]} (in_dim {IN_DIMS[kind]}, two experts)"
        )
    if config_path.parent.name not in {*NATIVE.expert_folders.values(), *DIFFUSERS.expert_folders.values()}:
        raise CheckpointError(
            f"{config_path}: a model with one expert (Wan2.1 or a single expert's folder?); StoryMem needs "
            f"{REPOS[kind]} with its two experts"
        )


def _common_config(root: Path, folders: Mapping[str, Path], kind: str) -> DiTConfig:
    configs = {}
    for expert, folder in folders.items():
        path = folder / "config.json"
        _refuse_other_models(path, kind)
        configs[expert] = DiTConfig.from_json(read_json(path), where=str(path))
    config, wanted = configs[HIGH_NOISE], IN_DIMS[kind]
    for expert, found in configs.items():
        if found.in_dim != wanted:
            described = next((name.upper() for name, in_dim in IN_DIMS.items() if in_dim == found.in_dim), "other")
            raise CheckpointError(
                f"{folders[expert]}: these are {described} weights (in_dim {found.in_dim}); here {kind.upper()} "
                f"weights are needed (in_dim {wanted}): {REPOS[kind]}"
            )
    if configs[LOW_NOISE] != config:
        raise CheckpointError(f"{root}: the two experts have different sizes: {configs[LOW_NOISE]} and {config}")
    return config


def _check_dtypes(source: TensorSource) -> None:
    keys = source.keys()
    for key in keys:
        if source.dtype(key) not in _STORED_DTYPES:
            raise CheckpointError(
                f"{source.name}: {key} is stored as {source.dtype(key)}; allowed: "
                f"{', '.join(str(dtype) for dtype in _STORED_DTYPES)}"
            )


def _check_other_parts(root: Path, layout: CheckpointLayout, kind: str) -> dict[str, Path]:
    parts = {"vae": root / layout.vae, "text_encoder": root / layout.text_encoder, "tokenizer": root / layout.tokenizer}
    for name, path in parts.items():
        if not path.exists():
            refuse_part(path, download_command(root, kind))
            raise WeightsNotFound(
                f"{root}: the {name.replace('_', ' ')} is missing: {path}; complete it with: "
                f"{download_command(root, kind)}"
            )
        if path.suffix == ".pth":
            _check_pth(path)
        elif name != "tokenizer":
            sharded_files(path, download_command(root, kind))
    if not any((parts["tokenizer"] / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise WeightsNotFound(
            f"{parts['tokenizer']}: neither tokenizer.json nor spiece.model is there; complete it with: "
            f"{download_command(root, kind)}"
        )
    return parts


def _check_pth(path: Path) -> None:
    """Reject a truncated zip archive (its directory is at its end); older pickles are checked when they are read."""
    refuse_other_formats(path)
    with path.open("rb") as file:
        start = file.read(len(_ZIP_MAGIC))
    if start == _ZIP_MAGIC and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: truncated ({path.stat().st_size} bytes); download it again")
    if start != _ZIP_MAGIC and not start.startswith(b"\x80"):
        raise CheckpointError(f"{path}: not a file that torch.save wrote (it starts with {start!r})")


def _files_of(part: Path) -> list[Path]:
    return [part] if part.is_file() else [path for path in part.rglob("*") if path.is_file()]
