"""Says whether weights are there, without loading them."""

from dataclasses import dataclass

from storymem_dist.errors import StoryMemError
from storymem_dist.story.modes import M2V, MI2V, MM2V, NO_CONTINUATION, T2V
from storymem_dist.weights.bundle import open_weights, packed_model
from storymem_dist.weights.settings import ModelSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Availability:
    """True if clips can be rendered; ``missing`` names what is missing and how to get it."""

    missing: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.missing


def is_storymem_available(
    t2v_checkpoint_dir: str | None = "weights/Wan2.2-T2V-A14B",
    i2v_checkpoint_dir: str | None = "weights/Wan2.2-I2V-A14B",
    m2v_lora_path: str | None = "weights/StoryMem",
    packed: str | None = None,
) -> Availability:
    """Check weights without loading them (headers only), for both base models and both StoryMem LoRAs.

    ``packed``: check this packed model instead ("nano", which comes with the package, or a file).
    """
    settings = ModelSettings(
        t2v_checkpoint=t2v_checkpoint_dir, i2v_checkpoint=i2v_checkpoint_dir, storymem_lora=m2v_lora_path
    )
    if packed is not None:
        try:
            folders = packed_model(packed)
        except StoryMemError as error:
            return Availability(missing=(str(error),))
        settings = ModelSettings(
            t2v_checkpoint=str(folders.t2v_dir),
            i2v_checkpoint=str(folders.i2v_dir),
            storymem_lora=str(folders.lora_dir),
        )
    missing = []
    for kind, continuation in ((T2V, NO_CONTINUATION), (M2V, MI2V), (M2V, MM2V)):
        try:
            open_weights(settings, [kind], continuation)
        except StoryMemError as error:
            if str(error) not in missing:
                missing.append(str(error))
    return Availability(missing=tuple(missing))
