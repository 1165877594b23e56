"""The two models that judge clips: ViCLIP (clips and texts), and CLIP ViT-L/14 with LAION's aesthetic head.

Each is found by its folder, named by its content, and loaded when it is first used. Knows nothing about runs.

Shapes: F frames, H height, W width, E values of a feature.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from storymem_dist.errors import CheckpointError, StoryMemError, WeightsNotFound, shortened
from storymem_dist.evaluation.cache import joint
from storymem_dist.evaluation.frames import clip_pixels
from storymem_dist.evaluation.settings import EvaluationSettings
from storymem_dist.files import file_identity
from storymem_dist.models.viclip import ViClip
from storymem_dist.weights.torch_file import read_state_dict
from storymem_dist.weights.viclip import VOCABULARY_FILE, ClipTokens, load_viclip, viclip_file

FRAME_BATCH = 32
"""Frames in a forward of CLIP ViT-L/14: as many as VBench takes, and 1.3 GB of activations at most."""

AESTHETIC_SCALE = 10.0
"""LAION's predictor was trained on ratings from 1 to 10; the paper's .6133 is such a rating over 10."""

HEAD_FILE = "sa_0_4_vit_l_14_linear.pth"

VICLIP, AESTHETIC = "viclip", "aesthetic"
NAMES = (VICLIP, AESTHETIC)


class Models:
    """What judges clips.

    ``missing``: a sentence for each model that cannot be used, by its name in ``NAMES``. ``identities``: a hash of the
    files of each of the others, wherever they lie. ``num_loaded`` counts what was loaded.
    """

    def __init__(self, settings: EvaluationSettings, device: torch.device) -> None:
        self._settings = settings
        self._device = device
        self._viclip: tuple[ViClip, ClipTokens] | None = None
        self._aesthetic: AestheticModel | None = None
        self._tokens: ClipTokens | None = None
        self.missing: dict[str, str] = {}
        self.identities: dict[str, str] = {}
        self.num_loaded = 0
        for name, files in ((VICLIP, self._viclip_files), (AESTHETIC, self._aesthetic_files)):
            try:
                self.identities[name] = joint([file_identity(path) for path in files()])
            except (StoryMemError, OSError) as error:
                self._leave_out(name, error)

    def _viclip_files(self) -> list[Path]:
        folder = Path(self._settings.viclip)
        words = folder / VOCABULARY_FILE
        found = [viclip_file(folder), words]
        if not words.is_file():
            raise WeightsNotFound(f"{words}: no such file")
        return found

    def _aesthetic_files(self) -> list[Path]:
        clip, head = Path(self._settings.clip_l), Path(self._settings.aesthetic) / HEAD_FILE
        weights = sorted([*clip.glob("*.safetensors"), *clip.glob("pytorch_model*.bin")]) if clip.is_dir() else []
        if not weights or not (clip / "config.json").is_file():
            raise WeightsNotFound(f"{clip}: there is no CLIP ViT-L/14 (config.json and a .safetensors file)")
        if not head.is_file():
            raise WeightsNotFound(f"{head}: no such file; it is LAION's linear head")
        return [clip / "config.json", *weights, head]

    def _leave_out(self, name: str, error: Exception) -> None:
        keys = {VICLIP: "viclip", AESTHETIC: "clip_l and evaluation.aesthetic"}
        fetch = {VICLIP: "viclip", AESTHETIC: "clip_l aesthetic"}
        what = {VICLIP: "prompt following and consistency are", AESTHETIC: "aesthetic quality is"}
        self.identities.pop(name, None)
        self.missing[name] = (
            f"{what[name]} left out: {shortened(error, 300)}; get it with: storymem-weights download {fetch[name]} (or "
            f"name its folder: evaluation.{keys[name]})"
        )

    @property
    def usable(self) -> tuple[str, ...]:
        """Names of the models that were found and have not failed to load."""
        return tuple(name for name in NAMES if name in self.identities)

    def load(self, name: str) -> bool:
        """Load a model unless that is done; whether it can be used. One that cannot is named in ``missing``."""
        if name not in self.identities:
            return False
        try:
            if name == VICLIP and self._viclip is None:
                self._viclip = load_viclip(Path(self._settings.viclip), self._device)
                self.num_loaded += 1
            if name == AESTHETIC and self._aesthetic is None:
                paths = Path(self._settings.clip_l), Path(self._settings.aesthetic) / HEAD_FILE
                self._aesthetic = AestheticModel.load(*paths, self._device)
                self.num_loaded += 1
        except (StoryMemError, OSError) as error:
            self._leave_out(name, error)
            return False
        return True

    @torch.no_grad()
    def clip_feature(self, frames_FCHW: Tensor) -> Tensor:
        """Unit vector ``float32 [E]`` of 8 frames ``uint8 [8, 3, H, W]``; ViCLIP must be loaded."""
        assert self._viclip is not None
        pixels = clip_pixels(frames_FCHW.to(self._device), in_8_bits=True)
        return self._viclip[0].encode_clips(pixels[None])[0].cpu()

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors ``float32 [B, E]``; ViCLIP must be loaded."""
        assert self._viclip is not None
        model, tokens = self._viclip
        return model.encode_texts(tokens(texts).to(self._device)).cpu()

    def is_cut(self, text: str) -> bool:
        """Whether ViCLIP reads only the beginning of ``text``; it must be loaded."""
        assert self._viclip is not None
        tokens = self._viclip[1]
        return tokens.length(text) > tokens.context

    def aesthetic_scores(self, frames_FCHW: Tensor) -> Tensor:
        """Score of each frame, ``float32 [F]``; the model must be loaded."""
        assert self._aesthetic is not None
        return self._aesthetic.score(frames_FCHW)


class AestheticModel:
    """LAION's linear head on the unit vectors of CLIP ViT-L/14's images, over ``AESTHETIC_SCALE``; fp32."""

    def __init__(self, image_model: Any, head: nn.Linear, device: torch.device) -> None:
        """``image_model`` is transformers' ``CLIPVisionModelWithProjection``."""
        self._image_model = image_model.to(device=device, dtype=torch.float32).eval()
        self._head = head.to(device)
        self._device = device

    @classmethod
    def load(cls, clip: Path, head_file: Path, device: torch.device) -> "AestheticModel":
        """Load both; never downloads. Raises ``CheckpointError`` for what is damaged or of another model."""
        from transformers import CLIPVisionModelWithProjection
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            loaded: Any = CLIPVisionModelWithProjection.from_pretrained(
                clip, local_files_only=True, output_loading_info=True
            )
            image_model, report = loaded
        except Exception as error:  # the loaders raise their own types: SafetensorError, UnpicklingError, RuntimeError
            raise CheckpointError(f"{clip} cannot be loaded as CLIP ({' '.join(str(error).split())[:200]})") from None
        missing = sorted(report["missing_keys"])
        if missing:  # transformers fills these with random numbers
            raise CheckpointError(
                f"{clip} is not a complete CLIP: {len(missing)} weights are missing, first {', '.join(missing[:3])}"
            )
        state, size = read_state_dict(head_file), image_model.config.projection_dim
        found = {key: tuple(value.shape) for key, value in state.items()}
        if found != {"weight": (1, size), "bias": (1,)}:
            raise CheckpointError(
                f"{head_file}: a linear layer from {size} values to one is expected, it holds {found}"
            )
        head = nn.Linear(size, 1)
        head.load_state_dict({key: value.float() for key, value in state.items()})
        return cls(image_model, head, device)

    @torch.no_grad()
    def score(self, frames_FCHW: Tensor) -> Tensor:
        """Scores ``float32 [F]`` of ``uint8 [F, 3, H, W]``, about 0 to 1; higher is better."""
        scores = []
        for batch in frames_FCHW.split(FRAME_BATCH):
            pixels = clip_pixels(batch.to(self._device), in_8_bits=False)
            features = F.normalize(self._image_model(pixel_values=pixels).image_embeds.float(), dim=-1)
            scores.append(self._head(features)[:, 0] / AESTHETIC_SCALE)
        return torch.cat(scores).cpu()
