"""Every number and text of every setting has limits: whatever is given, the answer is one sentence, at once."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from operator import attrgetter
from types import NoneType
from typing import Any, get_args, get_type_hints

import pytest

from storymem_dist.config.composing import compose_settings
from storymem_dist.config.overrides import prepare
from storymem_dist.config.schema import RenderConfig
from storymem_dist.errors import ConfigError
from storymem_dist.weights.lora import LoraSettings

HUGE = 10**5000
MAY_BE_NEGATIVE = {
    "sampler.seed",  # drawn
    "model.generate_seed",
    "tracking.wandb.num_shot_videos",  # -1: all
    "tracking.wandb.num_story_videos",
    "tracking.wandb.num_memory_images",
    "memory.quality_threshold",  # in the units of the chosen score
    "model.loras.strength",
}


@dataclass(frozen=True)
class Number:
    name: str
    group: type
    key: str
    kind: type

    def refuses(self, value: Any) -> str:
        """The message with which the setting refuses ``value``."""
        given: dict[str, Any] = {"path": "a"} if self.group is LoraSettings else {}
        started = time.monotonic()
        with pytest.raises(ConfigError) as caught:
            self.group(**given | {self.key: value})
        assert time.monotonic() - started < 1.0
        return str(caught.value)


def numbers(group: type, prefix: str = "") -> Iterator[Number]:
    for key, hint in get_type_hints(group).items():
        kinds = set(get_args(hint) or (hint,)) - {NoneType}
        if is_dataclass(hint):
            yield from numbers(hint, f"{prefix}{key}.")  # type: ignore[arg-type]
        elif kinds & {int, float} and get_args(hint) != (float,):  # lists of numbers: see below
            yield Number(f"{prefix}{key}", group, key, float if float in kinds else int)


NUMBERS = [*numbers(RenderConfig), *numbers(LoraSettings, "model.loras.")]


def test_all_groups_are_walked() -> None:
    names = {number.name for number in NUMBERS}
    assert {"sampler.fps", "launch.slurm.nodes", "tracking.wandb.max_video_mib", "model.loras.alpha"} <= names
    assert len(names) > 50


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_absurd_numbers_are_refused_by_name(number: Number) -> None:
    values = [10**20, -(10**20), HUGE, -HUGE, math.nan, math.inf, -math.inf, "many", True]
    if number.name not in MAY_BE_NEGATIVE:
        values.append(-1)
    for value in values:
        message = number.refuses(value)
        assert number.key in message and len(message) < 600


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
def test_thousands_of_digits_on_the_command_line_are_refused(number: Number) -> None:
    if number.group is LoraSettings:
        text = f"model.loras=[{{path: a, {number.key}: {'9' * 5000}}}]"
    else:
        text = f"{number.name}={'9' * 5000}"
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        compose_settings([text])
    assert time.monotonic() - started < 5.0  # composing is a part of it
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [math.nan, math.inf, HUGE, -1.0], ids=["nan", "inf", "huge", "negative"])
def test_a_list_of_numbers_is_limited_too(value: float) -> None:
    from storymem_dist.diffusion.settings import SamplerSettings

    for sigmas in ([value], [1.0, value], [value, 0.5]):
        with pytest.raises(ConfigError, match=r"sampler\.sigmas"):
            SamplerSettings(solver="euler", num_inference_steps=len(sigmas), sigmas=sigmas)


@pytest.mark.parametrize(
    "shot", ["ocean:" + "1" * 5000, "x" * 5000 + ":1", "ocean:" + "²" * 5000, "1" * 5000, "ocean:1234567890123"]
)
def test_a_shot_to_render_again_is_a_short_name(shot: str) -> None:
    with pytest.raises(ConfigError, match=r"dispatch\.rerender"):
        compose_settings([f"dispatch.rerender=['{shot}']"])


def texts(value: Any, prefix: str = "") -> Iterator[str]:
    for one in fields(value):
        given = getattr(value, one.name)
        if is_dataclass(given):
            yield from texts(given, f"{prefix}{one.name}.")
        elif get_type_hints(type(value))[one.name] in (str, str | None):
            yield f"{prefix}{one.name}"


TEXTS = list(texts(RenderConfig()))
BAD_TEXTS = {"long": "a" * 200_000, "null": "a\0b", "not UTF-8": "a\udcffb"}


@pytest.mark.parametrize("text", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_texts_are_limited(text: str) -> None:
    """Whatever sets them. A setting that allows few values refuses these in its own words."""
    for name in TEXTS:
        owner, _, key = name.rpartition(".")
        settings = RenderConfig()
        group = attrgetter(owner)(settings) if owner else settings
        with pytest.raises(ConfigError) as caught:
            setattr(group, key, text)
            group.__post_init__()
            settings.__post_init__()
        assert name in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "name", ["output", "sampler.negative_prompt", "launch.slurm.account", "tracking.wandb.project"]
)
@pytest.mark.parametrize("text", BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_texts_on_the_command_line_are_limited(name: str, text: str) -> None:
    assert name in TEXTS
    with pytest.raises(ConfigError) as caught:
        compose_settings([f"{name}={text}"])
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "value",
    ["[" * 5000, "{a:" * 3000, "(" * 8000, "a," * 9000, "${" * 5000, "int(" * 2000, "'" * 9000, "[" * 30 + "]" * 30],
    ids=lambda value: value[:4],
)
@pytest.mark.parametrize("key", ["output", "sampler.fps", "sampler.negative_prompt", "stories", "model.loras", "+new"])
def test_no_shape_of_an_override_hangs_or_breaks_the_parser(key: str, value: str) -> None:
    started = time.monotonic()
    try:
        prepare([f"{key}={value}"])
    except ConfigError as error:
        assert len(str(error)) < 1500
    assert time.monotonic() - started < 10.0  # seconds; mostly far below one
