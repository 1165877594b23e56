"""What the nodes need of ComfyUI: its folders, its device, its memory, its progress bar and its interruption."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import comfy.model_management as management
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.utils import ProgressBar
from PIL import Image

from storymem_dist.errors import ConfigError
from storymem_dist.pipeline import StoryModels, model_names

MODELS = "storymem"  # the folder under models/
LORAS = "StoryMem"  # the folder of both LoRAs in it

folder_paths.add_model_folder_path(MODELS, str(Path(folder_paths.models_dir, MODELS)))


def model_folders() -> dict[str, Path]:
    """Return the folders of base models under ``models/storymem``, by name."""
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(MODELS)):
        for path in sorted(root.iterdir()) if root.is_dir() else ():
            if path.is_dir() and path.name != LORAS and not path.name.startswith("."):
                found.setdefault(path.name, path)
    return found


def model_choices(kind: str) -> list[str]:
    """Return what a widget of the loader offers: folders, those named after ``kind`` first, and the small models."""
    return [*sorted(model_folders(), key=lambda name: (kind not in name.lower(), name)), *model_names()]


def models_arguments(t2v_model: str, i2v_model: str) -> dict[str, Any]:
    """Return the arguments of ``open_models`` for two choices of the loader.

    A small model brings both base models and the LoRAs. A folder that is not there keeps its path, so that the error
    names it and says what to download.
    """
    if t2v_model in model_names():
        return {"t2v_model": t2v_model}
    for key, name in (("t2v_model", t2v_model), ("i2v_model", i2v_model)):
        if not name or name != Path(name).name:
            raise ConfigError(f"{key}={name!r} is not allowed; it names a folder under models/{MODELS}")
    found, home = model_folders(), Path(folder_paths.get_folder_paths(MODELS)[0])
    roots = map(Path, folder_paths.get_folder_paths(MODELS))
    loras = next((root / LORAS for root in roots if (root / LORAS).is_dir()), home / LORAS)
    paths = [name if name in model_names() else found.get(name, home / name) for name in (t2v_model, i2v_model)]
    return {"t2v_model": paths[0], "i2v_model": paths[1], "storymem_lora": loras}


def device_of(choice: str) -> torch.device:
    """Return the device for the loader's ``device``: "auto" is ComfyUI's own choice."""
    own = management.get_torch_device()
    if choice == "cpu":
        return torch.device("cpu")
    if choice == "cuda" and own.type != "cuda":
        raise ConfigError(f"device=cuda was chosen, but this ComfyUI computes on {own.type}; choose auto or cpu")
    return own


class Models:
    """The value ``STORYMEM_MODELS``: models that ComfyUI may unload whenever it needs the memory.

    ``fsdp``: shard the experts over the GPUs of a story that is rendered on several.
    """

    def __init__(self, models: StoryModels, *, fsdp: bool) -> None:
        self.models = models
        self.fsdp = fsdp
        self._weights = _Weights(models)

    def make_room(self, mode: str) -> None:
        """Let ComfyUI unload what stands in the way of a shot of ``mode``, and enter the models into its books."""
        self._weights.note_size(self.models.bytes_needed(mode))
        management.load_models_gpu([self._weights])


class StoryMem(torch.nn.Module):
    """Stands for the models in ComfyUI's books and log; has no weights of its own."""


class _Weights(ModelPatcher):
    """The entry of a ``StoryModels`` in ComfyUI's list of loaded models: one block that is loaded or not.

    The renderer loads by itself, so that loading does nothing here. Unloading drops all weights: for other nodes that
    need the device, and for ``POST /free``.
    """

    def __init__(self, models: StoryModels) -> None:
        super().__init__(StoryMem(), management.get_torch_device(), torch.device("cpu"))
        self._models = models

    def note_size(self, num_bytes: int) -> None:
        if self._models.device.type == self.load_device.type:
            self.size = max(self.size, num_bytes)

    def loaded_size(self) -> int:
        return self.size if self._models.is_loaded else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self._models.is_loaded else self.offload_device

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, **_: Any) -> int:
        return 0

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, **_: Any) -> int:
        return 0  # not in parts: ComfyUI then calls detach

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        if unpatch_all:
            self._models.unload()
        return self.model

    def __del__(self) -> None:
        pass  # the weights go with the models


class Watcher:
    """A node's progress bar, and whether the person has pressed the button that interrupts."""

    def __init__(self) -> None:
        self._bar = ProgressBar(1)
        self._interruption: BaseException | None = None

    def show(self, done: int, total: int, picture: Path | None = None) -> None:
        """Move the bar, and show a picture on the node. Never raises."""
        preview = None
        if picture is not None:
            with suppress(OSError), Image.open(picture) as image:
                preview = ("JPEG", image.convert("RGB"), 512)
        try:
            self._bar.update_absolute(done, max(total, 1), preview)
        except management.InterruptProcessingException as error:  # the bar looks for it, too, and looking forgets it
            self._interruption = error

    def raise_if_interrupted(self) -> None:
        """The ``should_stop`` of a render."""
        if self._interruption is not None:
            raise self._interruption
        management.throw_exception_if_processing_interrupted()


def output_folder(name: str) -> Path:
    """Return the run folder for a name, in ComfyUI's output folder; raises ``ConfigError`` for one outside of it."""
    root = Path(folder_paths.get_output_directory()).resolve()
    try:
        folder = (root / name.strip()).resolve()
    except ValueError as error:  # a NUL byte, or half of a surrogate pair
        raise ConfigError(f"output_name={name!r} is not allowed; {error}") from None
    if folder == root or not folder.is_relative_to(root):
        raise ConfigError(f"output_name={name!r} is not allowed; it names a folder inside ComfyUI's output folder")
    return folder
