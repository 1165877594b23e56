"""StoryMem's LoRA, and those that people train like it: one file for each expert in a folder."""

from pathlib import Path

from storymem_dist.errors import CheckpointError, WeightsNotFound, require_one_of
from storymem_dist.models.wan.presets import EXPERTS
from storymem_dist.story.modes import CONTINUATIONS, MI2V, MM2V
from storymem_dist.weights.lora.container import backbone_file
from storymem_dist.weights.lora.file import open_backbone
from storymem_dist.weights.lora.merge import ScaledLora
from storymem_dist.weights.lora.scale import AUTO, NONE, RSLORA

STORYMEM_FOLDERS = {MI2V: "Wan2.2-MI2V-A14B", MM2V: "Wan2.2-MM2V-A14B"}
STORYMEM_REPO = "Kevin-thu/StoryMem"

_LAYOUTS = (
    "It is either a folder with backbone_high_noise.safetensors and backbone_low_noise.safetensors, or one with "
    f"{' or '.join(f'{name}/' for name in STORYMEM_FOLDERS.values())} that holds these two"
)


def storymem_lora(path: str | Path, continuation: str, *, scale_rule: str = RSLORA) -> dict[str, ScaledLora]:
    """The StoryMem LoRA of both experts for a continuation mode; its scale is rsLoRA's unless ``scale_rule`` differs.

    ``path`` is the folder with StoryMem's two LoRA folders, or one folder of any name with ``backbone_high_noise`` and
    ``backbone_low_noise``. ``none`` uses the MI2V LoRA.

    Raises:
        WeightsNotFound: a folder or file is missing; the message names both ways to lay a folder out.
        CheckpointError: ``path`` is the folder of the other mode, a file is wrong, or it asks for another rule.
    """
    require_one_of("sampler.continuation", continuation, CONTINUATIONS)
    root, wanted = Path(path), STORYMEM_FOLDERS[MM2V if continuation == MM2V else MI2V]
    name = root.resolve().name
    if name in STORYMEM_FOLDERS.values() and name != wanted:
        raise CheckpointError(f"StoryMem LoRA {root}: this is {name}, but continuation={continuation} needs {wanted}")
    folder = root if name == wanted or any(backbone_file(root, expert) for expert in EXPERTS) else root / wanted
    return {expert: _open(_required_file(folder, expert, wanted), expert, scale_rule) for expert in EXPERTS}


def find_storymem_folder(path: str | Path) -> Path:
    """The folder of StoryMem's LoRAs, or of one like them. Raises ``WeightsNotFound`` if there is none."""
    if not Path(path).is_dir():
        raise WeightsNotFound(
            f"StoryMem LoRA {path}: not a folder. {_LAYOUTS}; get StoryMem's own with: "
            f"hf download {STORYMEM_REPO} --local-dir {path}"
        )
    return Path(path)


def _required_file(folder: Path, expert: str, wanted: str) -> Path:
    if found := backbone_file(folder, expert):
        return found
    root = folder.parent if folder.name == wanted else folder
    raise WeightsNotFound(
        f"StoryMem LoRA {folder / f'backbone_{expert}.safetensors'}: no such file. {_LAYOUTS}; get StoryMem's own "
        f'with: hf download {STORYMEM_REPO} --include "{wanted}/*" --local-dir {root}'
    )


def _open(path: Path, expert: str, scale_rule: str) -> ScaledLora:
    file = open_backbone(path, expert)
    said = {module.rule for module in file.modules.values()} - {None}
    if scale_rule not in (AUTO, NONE) and said and said != {scale_rule}:
        raise CheckpointError(
            f"{path}: {' and '.join(file.places)} ask for the scale rule {' and '.join(map(str, said))}, but "
            f"model.storymem_scale_rule is {scale_rule}; model.storymem_scale_rule=auto does what the file says"
        )
    return ScaledLora(file, scale_rule=scale_rule)
