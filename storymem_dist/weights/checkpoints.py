"""Wan2.2-A14B weights: finds layout and parts, and checks that they are complete and the right ones.

Four layouts: the native one (``high_noise_model/``, ``low_noise_model/``, ``*.pth``), diffusers' (``transformer/`` =
high noise, ``transformer_2/`` = low noise), single files (a file for each part, as ComfyUI's users have them), and
folders written by ``storymem-weights prepare``. All cheap checks run here, before weights are read: files, index,
headers against file sizes, model sizes, keys and shapes. Knows nothing about how tensors get into a model.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch

from storymem_dist.errors import CheckpointError, StoryMemError, WeightsNotFound, require_one_of
from storymem_dist.files import file_identity, folder_identity
from storymem_dist.models.wan.dit import DiTConfig, WanDiT
from storymem_dist.models.wan.presets import EXPERTS, HIGH_NOISE, I2V_IN_DIM, LOW_NOISE, T2V_IN_DIM
from storymem_dist.story.modes import M2V, T2V
from storymem_dist.weights.loading import SafetensorsSource, TensorSource, WeightDelta, check_deltas, check_keys
from storymem_dist.weights.lora.layouts import looks_like_lora
from storymem_dist.weights.parts import PARTS, files_of, find_parts
from storymem_dist.weights.prepared import Float8Source, PreparedManifest, check_files, is_prepared, read_manifest
from storymem_dist.weights.single_files import (
    CheckpointFiles,
    config_from_shapes,
    find_files,
    require_different,
)
from storymem_dist.weights.tensor_files import OpenedTensors, open_dit, read_json, sharded_files

IN_DIMS = {"t2v": T2V_IN_DIM, "i2v": I2V_IN_DIM}
"""Input channels of the experts, by kind of base model."""

BASE_OF_KIND = {T2V: "t2v", M2V: "i2v"}
"""The base model of each kind of experts."""

REPOS = {"t2v": "Wan-AI/Wan2.2-T2V-A14B", "i2v": "Wan-AI/Wan2.2-I2V-A14B"}
"""Where the published weights of each kind are."""

_STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TI2V_5B_IN_DIM = 48
_5B = "this is Wan2.2-TI2V-5B (in_dim 48, one expert, another VAE)"

SINGLE_FILES = "single files"
"""The ``WanCheckpoint.layout`` of a file for each part."""


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
    """Where a layout keeps its parts, relative to the folder."""

    name: str
    expert_folders: Mapping[str, str]
    vae: str
    text_encoder: str
    tokenizer: str


NATIVE = CheckpointLayout(
    name="native",
    expert_folders={HIGH_NOISE: "high_noise_model", LOW_NOISE: "low_noise_model"},
    vae="Wan2.1_VAE.pth",
    text_encoder="models_t5_umt5-xxl-enc-bf16.pth",
    tokenizer="google/umt5-xxl",
)
DIFFUSERS = CheckpointLayout(
    name="diffusers",
    expert_folders={HIGH_NOISE: "transformer", LOW_NOISE: "transformer_2"},
    vae="vae",
    text_encoder="text_encoder",
    tokenizer="tokenizer",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WanCheckpoint:
    """Checked weights of a base model. ``identity`` changes when any of its files changes (see ``file_identity``).

    ``expert_files`` hold the experts. ``given`` are the paths that were named one by one, ``root`` the folder of all
    others.
    """

    root: Path
    kind: str
    layout: str
    dit_config: DiTConfig
    vae_path: Path
    text_encoder_path: Path
    tokenizer_path: Path
    identity: str
    sources: Mapping[str, TensorSource]
    expert_files: Sequence[Path]
    given: CheckpointFiles = field(default_factory=CheckpointFiles)
    prepared: PreparedManifest | None = None

    def expert(self, name: str) -> TensorSource:
        """The weights of ``high_noise`` or ``low_noise``, under native names."""
        return self.sources[name]

    def check_loras(self, loras: Sequence[WeightDelta]) -> None:
        """Raise ``CheckpointError`` unless each LoRA fits these experts' names and widths."""
        check_deltas(dit_shapes(self.dit_config), loras)


def open_checkpoint(path: str | Path | None, kind: str, files: CheckpointFiles | None = None) -> WanCheckpoint:
    """Find and check the weights of a base model; reads headers and samples only.

    Args:
        path: the folder of a download of ``Wan-AI/Wan2.2-{T2V,I2V}-A14B`` or its ``-Diffusers`` variant, one prepared
            from either, or one with a single file for each part. May be None where ``files`` name the experts.
        kind: the base model that is needed, ``t2v`` or ``i2v``.
        files: paths that replace what the folder holds.

    Raises:
        WeightsNotFound: the folder or a file in it is missing; the message names the command that fetches it.
        CheckpointError: a file is damaged, or the weights are of another model than ``kind``.
        ConfigError: ``files`` names one expert without the other.
    """
    require_one_of("kind", kind, IN_DIMS)
    place = _locate(path, kind, files or CheckpointFiles())
    root, layout, fetch = place.root, place.layout, download_command(place.root, kind)
    opened = {expert: _open_expert(found, place.manifest, fetch) for expert, found in place.experts.items()}
    sources = {expert: tensors.source for expert, tensors in opened.items()}
    for source in sources.values():
        _refuse_loras(source)
    config = _common_config(place, sources, kind)
    for source in sources.values():
        _check_dtypes(source)
        check_keys(dit_shapes(config), source)
    usual = {part: getattr(layout, part) for part in PARTS} if layout else {}
    parts = find_parts(root, usual, place.given, fetch)
    return WanCheckpoint(
        root=root,
        kind=kind,
        layout=layout.name if layout else SINGLE_FILES,
        dit_config=config,
        vae_path=parts["vae"],
        text_encoder_path=parts["text_encoder"],
        tokenizer_path=parts["tokenizer"],
        identity=_identity(place, opened, parts),
        sources=sources,
        expert_files=[path for tensors in opened.values() for path in tensors.paths],
        given=place.given,
        prepared=place.manifest,
    )


def require_folder(path: str | Path, kind: str) -> Path:
    """The folder of a base model. Raises ``WeightsNotFound``, with the command that fetches it, if it is none."""
    root = Path(path)
    if root.is_file():
        raise CheckpointError(
            f"{root}: a single file, and a base model has two experts; give the folder that holds both files, or "
            f"model.{kind}_high_noise=FILE and model.{kind}_low_noise=FILE"
        )
    if not root.is_dir():
        raise WeightsNotFound(
            f"{kind.upper()} weights: {root} is not a folder; get them with: {download_command(root, kind)}"
        )
    if (root / "blobs").is_dir() and (snapshots := sorted((root / "snapshots").glob("*/"))):
        raise WeightsNotFound(
            f"{root}: a folder of Hugging Face's cache; give the folder of a commit in it, such as {snapshots[-1]}"
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a base model is. ``experts``: a folder or file each. ``layout`` is None for single files."""

    root: Path
    layout: CheckpointLayout | None
    experts: Mapping[str, Path]
    given: CheckpointFiles
    manifest: PreparedManifest | None = None

    def config_file(self, expert: str) -> Path | None:
        """The ``config.json`` of an expert; None for files that have none next to them, and tell the sizes as well."""
        path = self.experts[expert]
        if self.layout is not None:
            return path / "config.json" if self.layout.name != NATIVE.name or _has_config(path) else None
        near = (path if path.is_dir() else path.parent, self.root, self.root / NATIVE.expert_folders[expert])
        return next((folder / "config.json" for folder in near if (folder / "config.json").is_file()), None)


def _has_config(folder: Path) -> bool:
    """False where single files of other programs lie in the folder of an expert, without the ``config.json``."""
    return (folder / "config.json").is_file() or any(folder.glob("*.index.json"))


def _locate(path: str | Path | None, kind: str, given: CheckpointFiles) -> _Place:
    experts = given.experts(kind)
    if experts is not None:
        require_different(experts)
        root = Path(path) if path and Path(path).is_dir() else experts[HIGH_NOISE].parent
        return _Place(root=root, layout=None, experts=experts, given=given)
    if not path:
        raise WeightsNotFound(f"{kind.upper()} weights: neither a folder nor the files of both experts are given")
    root = require_folder(path, kind)
    manifest = _check_prepared(root, kind) if is_prepared(root) else None
    layout = _prepared_layout(manifest) if manifest else _detect_layout(root, kind)
    if layout is None:
        return _Place(root=root, layout=None, experts=_single_experts(root, kind), given=given)
    experts = {expert: root / folder for expert, folder in layout.expert_folders.items()}
    return _Place(root=root, layout=layout, experts=experts, given=given, manifest=manifest)


def _single_experts(root: Path, kind: str) -> dict[str, Path]:
    """The files of both experts in a folder without a layout."""
    fetch = download_command(root, kind)
    try:
        experts = find_files(root).experts(kind, IN_DIMS, fetch)
    except StoryMemError:
        _refuse_other_models(root / "config.json", kind)
        raise
    if experts is not None:
        return experts
    _refuse_other_models(root / "config.json", kind)
    found = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
    raise WeightsNotFound(
        f"{kind.upper()} weights: {root} is not a Wan2.2-A14B folder (it holds: {found}; expected high_noise_model/ "
        "and low_noise_model/, or transformer/ and transformer_2/, or a file for each expert with high_noise and "
        f"low_noise in its name); get them with: {fetch}"
    )


def _open_expert(path: Path, manifest: PreparedManifest | None, fetch_command: str) -> OpenedTensors:
    if manifest is None or manifest.dtype != "float8":
        return open_dit(path, fetch_command)
    files = sharded_files(path, fetch_command)
    source = Float8Source(SafetensorsSource(str(path), files))
    return OpenedTensors(source=source, paths=[file.path for file in files])


def _identity(place: _Place, opened: Mapping[str, OpenedTensors], parts: Mapping[str, Path]) -> str:
    """Over the content of all files; in a folder with a layout also over their names in it."""
    by_role = {expert: list(tensors.paths) for expert, tensors in opened.items()}
    by_role |= {part: files_of(path) for part, path in parts.items()}
    for expert in EXPERTS:
        if (config := place.config_file(expert)) is not None:
            by_role[expert].append(config)
    if place.layout is not None and not place.given.given():
        return folder_identity(place.root, [path for paths in by_role.values() for path in paths])
    digest = hashlib.sha256()
    for role, paths in sorted(by_role.items()):
        base = parts.get(role)
        for path in sorted(set(paths)):
            name = path.relative_to(base).as_posix() if base is not None and base.is_dir() else ""
            digest.update(f"{role} {name} {file_identity(path)}\n".encode())
    return digest.hexdigest()


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
        given = {name: Path(found) for name in CheckpointFiles.names() if (found := manifest.source.get(name))}
        changed = open_checkpoint(source, kind, CheckpointFiles(**given)).identity != manifest.source["identity"]
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


def _detect_layout(root: Path, kind: str) -> CheckpointLayout | None:
    """The layout of a folder that has both experts; None if it has no folders of experts."""
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
    return None


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
            f"{config_path}: {_5B}; StoryMem needs {REPOS[kind]} (in_dim {IN_DIMS[kind]}, two experts)"
        )
    if config_path.parent.name not in {*NATIVE.expert_folders.values(), *DIFFUSERS.expert_folders.values()}:
        raise CheckpointError(
            f"{config_path}: a model with one expert (Wan2.1 or a single expert's folder?); StoryMem needs "
            f"{REPOS[kind]} with its two experts"
        )


def _common_config(place: _Place, sources: Mapping[str, TensorSource], kind: str) -> DiTConfig:
    configs = {expert: _config_of(place, expert, source, kind) for expert, source in sources.items()}
    config, wanted = configs[HIGH_NOISE], IN_DIMS[kind]
    for expert, found in configs.items():
        if found.in_dim == _TI2V_5B_IN_DIM:
            raise CheckpointError(f"{place.experts[expert]}: {_5B}; StoryMem needs {REPOS[kind]} (two experts)")
        if found.in_dim != wanted:
            described = next((name.upper() for name, in_dim in IN_DIMS.items() if in_dim == found.in_dim), "other")
            raise CheckpointError(
                f"{place.experts[expert]}: these are {described} weights (in_dim {found.in_dim}); here {kind.upper()} "
                f"weights are needed (in_dim {wanted}): {REPOS[kind]}"
            )
    if configs[LOW_NOISE] != config:
        raise CheckpointError(f"{place.root}: the two experts have different sizes: {configs[LOW_NOISE]} and {config}")
    return config


def _config_of(place: _Place, expert: str, source: TensorSource, kind: str) -> DiTConfig:
    """Sizes of one expert: of its ``config.json``; a single file also tells them itself."""
    path = place.config_file(expert)
    if path is not None and place.layout is not None:
        _refuse_other_models(path, kind)
        return DiTConfig.from_json(read_json(path), where=str(path))
    keys = source.keys()
    shapes = {key: source.shape(key) for key in keys}
    if path is None:
        return config_from_shapes(shapes, source.name)
    config, patch = DiTConfig.from_json(read_json(path), where=str(path)), shapes.get("patch_embedding.weight")
    return replace(config, in_dim=patch[1]) if patch else config  # one file may lie next to those of two kinds


def _refuse_loras(source: TensorSource) -> None:
    keys = source.keys()
    if "patch_embedding.weight" not in keys and any(map(looks_like_lora, keys)):
        raise CheckpointError(
            f"{source.name}: not a transformer, but a LoRA; LoRAs are named in model.loras or in the loras of a shot"
        )


def _check_dtypes(source: TensorSource) -> None:
    keys = source.keys()
    for key in keys:
        if source.dtype(key) not in _STORED_DTYPES:
            raise CheckpointError(
                f"{source.name}: {key} is stored as {source.dtype(key)}; allowed: "
                f"{', '.join(str(dtype) for dtype in _STORED_DTYPES)}"
            )
