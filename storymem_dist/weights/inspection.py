"""Describes a file or folder of weights from headers alone: layout, kind, types, sizes, LoRA ranks and scales.

For ``storymem-weights inspect``: facts in the order in which they are printed. Knows nothing about devices or jobs.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storymem_dist.errors import CheckpointError, StoryMemError, WeightsNotFound
from storymem_dist.models.wan.presets import EXPERTS, HIGH_NOISE
from storymem_dist.weights.checkpoints import (
    DIFFUSERS,
    IN_DIMS,
    NATIVE,
    REPOS,
    SINGLE_FILES,
    WanCheckpoint,
    open_checkpoint,
)
from storymem_dist.weights.eight_bit_source import EightBitSource
from storymem_dist.weights.gguf_file import GgufSource, is_gguf
from storymem_dist.weights.loading import TensorSource
from storymem_dist.weights.lora import STORYMEM_FOLDERS, ScaledLora, open_lora_by_expert
from storymem_dist.weights.lora.container import CONFIG_NAME, backbone_file, find_file
from storymem_dist.weights.lora.file import BOTH, SKIP
from storymem_dist.weights.lora.layouts import looks_like_lora
from storymem_dist.weights.lora.scale import ALPHA_RULE, NONE, RSLORA, scale_of
from storymem_dist.weights.prepared import is_prepared, read_manifest
from storymem_dist.weights.safetensors_file import SafetensorsFile
from storymem_dist.weights.single_files import find_files, look_into
from storymem_dist.weights.state_dict import first_keys
from storymem_dist.weights.tensor_files import dit_names, read_json, vae_names
from storymem_dist.weights.torch_file import is_safetensors, read_state_dict, read_torch

Facts = dict[str, Any]

_DIT_MARK = "patch_embedding.weight"
_VAE_MARK = "encoder.conv1.weight"
_T5_MARKS = ("token_embedding.weight", "shared.weight")


def inspect_weights(path: Path) -> Facts:
    """Facts about a checkpoint folder, a LoRA folder, or a single ``.safetensors`` or ``.pth`` file.

    Raises:
        WeightsNotFound: there is nothing at ``path``.
        CheckpointError: it is damaged, or of a model that this project does not know.
    """
    if not path.exists():
        raise WeightsNotFound(f"{path}: no such file or folder")
    if path.is_file():
        return _inspect_file(path)
    if any(backbone_file(path, expert) for expert in EXPERTS):
        return _inspect_storymem(path, [path])
    if any((path / folder).is_dir() for folder in STORYMEM_FOLDERS.values()) or path.name in STORYMEM_FOLDERS.values():
        return _inspect_storymem(path, [path / folder for folder in STORYMEM_FOLDERS.values()])
    if _is_lora_folder(path):
        return _inspect_file(find_file(path))
    kinds = _kinds_of_single_files(path)
    if len(kinds) > 1:
        facts = {kind.upper(): _inspect_checkpoint(open_checkpoint(path, kind)) for kind in kinds}
        return {"what": f"Wan2.2 base models: {' and '.join(facts)}", "path": str(path), **facts}
    return _inspect_checkpoint(open_checkpoint(path, kind_of(path)))


def kind_of(root: Path) -> str:
    """``t2v`` or ``i2v``, by the configuration of a checkpoint folder or the tensors of its files (or of one file).

    Raises:
        WeightsNotFound: no expert is there.
        CheckpointError: it is of neither kind, or there are experts of both.
    """
    if root.is_file():
        found = look_into(root)
        kinds = [kind for kind, in_dim in IN_DIMS.items() if found is not None and found.in_dim == in_dim]
        if not kinds:
            raise CheckpointError(f"{root}: not a transformer of Wan2.2-T2V-A14B or Wan2.2-I2V-A14B")
        return kinds[0]
    if is_prepared(root):
        return read_manifest(root).kind
    for layout in (NATIVE, DIFFUSERS):
        config = root / layout.expert_folders[HIGH_NOISE] / "config.json"
        if config.is_file():
            values = read_json(config)
            in_dim = values.get("in_dim", values.get("in_channels"))
            for kind, expected in IN_DIMS.items():
                if in_dim == expected:
                    return kind
            raise CheckpointError(
                f"{config}: in_dim {in_dim} is neither T2V ({IN_DIMS['t2v']}) nor I2V ({IN_DIMS['i2v']})"
            )
    kinds = _kinds_of_single_files(root)
    if len(kinds) > 1:
        raise CheckpointError(f"{root}: holds transformers of {' and '.join(map(str.upper, kinds))}; say which: --kind")
    if kinds:
        return kinds[0]
    open_checkpoint(root, "i2v")  # its error names what is there instead, or what is missing
    raise WeightsNotFound(f"{root}: no configuration of a high-noise expert")


def _kinds_of_single_files(root: Path) -> list[str]:
    """The kinds of transformers among the files of a folder that has no layout."""
    folders = (root / name for layout in (NATIVE, DIFFUSERS) for name in layout.expert_folders.values())
    if is_prepared(root) or any(folder.is_dir() for folder in folders):
        return []
    return find_files(root).kinds(IN_DIMS)


def _inspect_checkpoint(checkpoint: WanCheckpoint) -> Facts:
    config = checkpoint.dit_config
    facts: Facts = {
        "what": f"Wan2.2 {checkpoint.kind.upper()} base model, two experts",
        "path": str(checkpoint.root),
        "layout": checkpoint.layout,
        "like": REPOS[checkpoint.kind],
        "in_dim": config.in_dim,
        "sizes": f"dim {config.dim}, {config.num_heads} heads, {config.num_layers} blocks, ffn {config.ffn_dim}",
    }
    for name, source in checkpoint.sources.items():
        facts[name] = _describe_tensors(source)
    if checkpoint.layout == SINGLE_FILES:
        facts |= {f"{name} file": source.name for name, source in checkpoint.sources.items()}
        facts |= {"VAE": str(checkpoint.vae_path), "text encoder": str(checkpoint.text_encoder_path)}
        facts |= {"tokenizer": str(checkpoint.tokenizer_path)}
    if checkpoint.prepared is not None:
        manifest = checkpoint.prepared
        facts["stored as"] = manifest.dtype
        facts["prepared from"] = manifest.source["path"]
        facts["StoryMem LoRA merged"] = manifest.storymem_lora or "none"
        facts["LoRAs merged"] = {
            expert: [
                f"{lora['path']} ({lora['scale_rule']}, strength {lora['strength']}, alpha {lora['alpha'] or 'own'})"
                for lora in loras
            ]
            for expert, loras in manifest.loras.items()
        }
    facts["identity"] = checkpoint.identity
    return facts


def _inspect_storymem(path: Path, folders: Sequence[Path]) -> Facts:
    facts: Facts = {"what": "StoryMem LoRAs", "path": str(path)}
    for folder in folders:
        files = [file for expert in EXPERTS if (file := backbone_file(folder, expert))]
        if not files:
            facts[folder.name] = "not there"
        for file in files:
            facts[f"{folder.name}/{file.name}"] = _describe_lora(file, rule=RSLORA)
    return facts


def _is_lora_folder(path: Path) -> bool:
    """Whether a folder has no layout of a base model, and a LoRA as peft or diffusers saves it."""
    if (path / CONFIG_NAME).is_file():
        return True
    is_model = any(
        (path / folder).is_dir() for layout in (NATIVE, DIFFUSERS) for folder in layout.expert_folders.values()
    )
    try:
        return not is_model and not is_prepared(path) and _has_halves(_tensors_of(find_file(path)))
    except StoryMemError:
        return False


def _has_halves(keys: Iterable[str]) -> bool:
    return any(map(looks_like_lora, keys))


def _tensors_of(path: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Type and shape of every tensor of a file, also of those one level deeper in a ``.pth`` file."""
    if is_gguf(path):
        gguf = GgufSource(path)
        names = gguf.keys()
        return {key: (gguf.dtype(key), gguf.shape(key)) for key in names}
    if is_safetensors(path):
        file = SafetensorsFile(path)
        return {key: (file[key].dtype, file[key].shape) for key in file}
    loaded: list[Any] = [read_torch(path)]
    found: dict[str, tuple[torch.dtype, torch.Size]] = {}
    for _ in range(3):
        loaded = [values for values in loaded if isinstance(values, Mapping)]
        for values in loaded:
            found |= {key: (one.dtype, one.shape) for key, one in values.items() if isinstance(one, Tensor)}
        loaded = [one for values in loaded for one in values.values() if isinstance(one, Mapping)]
    if not found:
        read_state_dict(path)  # its error says what is there instead
    return found


def _inspect_file(path: Path) -> Facts:
    return _describe_file(path, _tensors_of(path)) | {"path": str(path)}


def _describe_file(path: Path, keys: Mapping[str, tuple[torch.dtype, torch.Size]]) -> Facts:
    stored = _describe_types([dtype for dtype, _ in keys.values()], [shape for _, shape in keys.values()])
    rename, strip = dit_names(keys), vae_names(keys)
    native, vae_keys = {rename(key): key for key in keys}, {strip(key): key for key in keys}
    is_whole = {_DIT_MARK, "blocks.0.self_attn.q.weight"} <= native.keys() or any(mark in keys for mark in _T5_MARKS)
    if _has_halves(keys) and not is_whole:  # names of scales of 8-bit weights end like those of adapters
        return {"what": "a LoRA", **_describe_lora(path), "weights": stored}
    if _DIT_MARK in native:
        in_dim = keys[native[_DIT_MARK]][1][1]
        kind = next((kind.upper() for kind, expected in IN_DIMS.items() if expected == in_dim), "neither T2V nor I2V")
        return {"what": "a transformer, or its first shard", "in_dim": f"{in_dim} ({kind})", "weights": stored}
    if _VAE_MARK in vae_keys:
        return {"what": "the Wan2.1 VAE", "base dim": keys[vae_keys[_VAE_MARK]][1][0], "weights": stored}
    if mark := next((mark for mark in _T5_MARKS if mark in keys), None):
        return {"what": "a umT5 text encoder", "vocabulary": keys[mark][1][0], "weights": stored}
    if any(key.startswith("blocks.") for key in native):
        return {"what": "a shard of a transformer", "weights": stored}
    raise CheckpointError(
        f"{path}: tensors of no model this project knows (first keys: {', '.join(list(keys)[:3])}); it knows Wan2.2 "
        "transformers, their LoRAs, the Wan2.1 VAE and the umT5 encoder"
    )


def _describe_lora(path: Path, rule: str | None = None) -> Facts:
    """What a LoRA file holds, for each expert that its keys name. Keys without a place are listed, not refused."""
    parts = {
        expert: _describe_part(ScaledLora(file), rule)
        for expert, file in open_lora_by_expert(path, unmatched=SKIP).items()
    }
    return parts[BOTH] if BOTH in parts else {f"for the expert {expert}": facts for expert, facts in parts.items()}


def _describe_part(lora: ScaledLora, rule: str | None) -> Facts:
    file = lora.file
    facts: Facts = {}
    if modules := file.modules.values():
        said, alphas = lora.describe(), {module.alpha for module in modules}
        largest = max(modules, key=lambda module: module.alpha if module.alpha is not None else module.rank)
        alpha = largest.rank if largest.alpha is None else largest.alpha
        scales = {name: scale_of(name, alpha, largest.rank) for name in (ALPHA_RULE, RSLORA, NONE)}
        shown = scales if rule is None else {rule: scales[rule]}
        targets = Counter(".".join(name.split(".")[2:]) or name for name in file.modules)
        facts = {
            "rank": ", ".join(
                f"{rank} ({count} targets)" for rank, count in Counter(module.rank for module in modules).items()
            ),
            "alpha": "not stored: taken as the rank" if alphas == {None} else ", ".join(sorted(map(str, alphas))),
            "scale found in": ", ".join(file.places) or "nothing",
            "scale by rule": ", ".join(f"{name} {value:.4f}" for name, value in shown.items()),
            "targets": ", ".join(f"{name} x{count}" for name, count in sorted(targets.items())),
            "parameters": f"{sum(m.rank * (m.in_features + m.out_features) for m in modules):,}",
        }
        if rule is None:
            facts["scale with auto"] = f"{said['scale']} (rule {said['rule_used']})"
    if num_biases := sum(module.bias_key is not None for module in modules):
        facts["biases of lora_B"] = num_biases
    if file.patches:
        changed = Counter(
            ".".join(name.split(".")[2:]) if name.startswith("blocks.") else name for name in file.patches
        )
        facts["exact changes"] = ", ".join(f"{name} x{count}" for name, count in sorted(changed.items()))
    if file.unmatched:
        facts["unmatched keys"] = first_keys(file.unmatched)
    return facts


def _describe_tensors(source: TensorSource) -> str:
    keys = source.keys()
    dtype_of = source.stored_dtype if isinstance(source, EightBitSource) else source.dtype
    text = _describe_types([dtype_of(key) for key in keys], [source.shape(key) for key in keys])
    return f"{text}, GGUF ({', '.join(source.quantizations)})" if isinstance(source, GgufSource) else text


def _describe_types(dtypes: list[torch.dtype], shapes: list[torch.Size]) -> str:
    counts: Counter[str] = Counter()
    for dtype, shape in zip(dtypes, shapes, strict=True):
        counts[str(dtype).removeprefix("torch.")] += shape.numel()
    total = sum(counts.values())
    kinds = ", ".join(f"{name} {count / total:.1%}" for name, count in counts.most_common())
    return f"{total:,} parameters in {len(shapes)} tensors ({kinds})"
