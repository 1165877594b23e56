"""Settings of scoring: the ``evaluation`` group. None of them changes a pixel."""

from dataclasses import dataclass

from storymem_dist.errors import require_one_of

MODES = ("off", "on_finish")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(kw_only=True, slots=True)
class EvaluationSettings:
    """When a run is scored, and with which weights.

    ``mode``: ``on_finish`` scores the run folder when its last replica has ended; ``off`` leaves that to
    ``storymem-score``. ``viclip``, ``clip_l`` and ``aesthetic`` are folders of ``storymem-weights download viclip
    clip_l aesthetic``; where one is missing, what it measures is left out and said. ``device`` is where they compute;
    ``auto``: a GPU where there is one.
    """

    mode: str = "off"
    viclip: str = "weights/ViCLIP-L-14-hf"
    clip_l: str = "weights/clip-vit-large-patch14"
    aesthetic: str = "weights/aesthetic-predictor"
    device: str = "auto"

    def __post_init__(self) -> None:
        require_one_of("evaluation.mode", self.mode, MODES)
        require_one_of("evaluation.device", self.device, DEVICES)
