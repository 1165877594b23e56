"""Models and settings by name, as overrides of the command line. Loads nothing."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from storymem_dist.errors import ConfigError
from storymem_dist.resources import config_folder

if TYPE_CHECKING:
    from storymem_dist.config.points import Point

NEEDS_FOLDERS = "wan22_a14b"
"""The entry of ``conf/model`` whose weights are folders of the user."""

_ARGUMENTS = {
    "output": "the run folder is an argument of its own",
    "stories": "the story is an argument of its own",
    "launch": "gpus says in how many processes a story is rendered",
    "hydra": "Hydra does not run here",
    "parallel.device": "the models have a device",
    "dispatch.rerender": "rerender is an argument of its own",
}
_NOT_ARGUMENTS = ("stories.long_prompts",)


def model_names() -> tuple[str, ...]:
    """The models that need no folders of the user: ``nano`` and ``tiny``."""
    return tuple(sorted(path.stem for path in (config_folder() / "model").glob("*.yaml") if path.stem != NEEDS_FOLDERS))


@lru_cache(maxsize=16)
def compose(overrides: tuple[str, ...]) -> "Point":
    """What ``storymem-render`` would render with these overrides; not to be changed. Raises ``ConfigError``."""
    from storymem_dist.config.points import compose_point  # Hydra takes a while to import

    return compose_point(overrides)


def own_overrides(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides of a caller. Raises ``ConfigError`` for what arguments say, which would have no effect."""
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides!r} is not allowed; give a list, such as [{overrides!r}]")
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].partition("@")[0].strip()
        if key.startswith("-"):
            raise ConfigError(f"{override}: settings are written KEY=VALUE, such as sampler.num_inference_steps=20")
        argument = next((_ARGUMENTS[one] for one in (key, key.partition(".")[0]) if one in _ARGUMENTS), None)
        if argument is not None and key not in _NOT_ARGUMENTS:
            raise ConfigError(f"{override}: {key} cannot be set here; {argument}")
    return tuple(overrides)


def joined(*parts: Iterable[str]) -> tuple[str, ...]:
    """Overrides one after the other; where two choose an entry of one group, the later one counts."""
    every = [override for part in parts for override in part]
    group = [override.partition("=")[0] for override in every]
    return tuple(
        override
        for position, override in enumerate(every)
        if "." in group[position] or group[position] not in group[position + 1 :]
    )


def model_overrides(
    t2v_model: str | Path | None, i2v_model: str | Path | None, storymem_lora: str | Path | None
) -> tuple[str, list[str]]:
    """A name for people, and the overrides that choose these models."""
    given = {"t2v_model": t2v_model, "i2v_model": i2v_model, "storymem_lora": storymem_lora}
    texts = {key: None if path is None else str(path) for key, path in given.items()}
    names = {text for text in texts.values() if text in model_names()}
    if names:
        [name, *others] = sorted(names)
        wrong = [f"{key}={text}" for key, text in texts.items() if text not in (None, name)]
        if others or wrong:
            raise ConfigError(
                f"{', '.join(wrong)} does not go with the model {name}, which has its own of each; choose {name} for "
                "all, or folders for all"
            )
        return name, [f"model={name}"]
    if not texts["t2v_model"] and not texts["i2v_model"]:
        raise ConfigError(f"no model is given; choose {' or '.join(model_names())}, or a folder of Wan2.2-T2V-A14B")
    keys = ("model.t2v_checkpoint", "model.i2v_checkpoint", "model.storymem_lora")
    chosen = [f"{key}={quoted_value(text)}" for key, text in zip(keys, texts.values(), strict=True)]
    return Path(texts["i2v_model"] or texts["t2v_model"] or "").name, [f"model={NEEDS_FOLDERS}", *chosen]


def quoted_value(text: str | None) -> str:
    """A text as the value of an override, to be read as it is."""
    from storymem_dist.config.overrides import quoted

    return "null" if text is None else quoted(text)
