from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from storymem_dist.errors import ConfigError
from storymem_dist.observe.settings import ConsoleSettings, TrackingSettings, WandbSettings

TRACKING = Path(__file__).parents[3] / "conf" / "tracking"


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (ConsoleSettings, {"mode": "fancy"}, "tracking.console.mode='fancy' .* auto, live, plain, off"),
        (ConsoleSettings, {"level": "loud"}, "tracking.console.level='loud' .* quiet, normal, verbose"),
        (ConsoleSettings, {"line_interval_seconds": -1}, "tracking.console.line_interval_seconds=-1"),
        (WandbSettings, {"mode": "sometimes"}, "tracking.wandb.mode='sometimes' .* auto, online, offline, off"),
        (WandbSettings, {"project": "a/b"}, "tracking.wandb.project='a/b'"),
        (WandbSettings, {"project": ""}, "tracking.wandb.project=''"),
        (WandbSettings, {"num_shot_videos": -2}, "tracking.wandb.num_shot_videos=-2 .* between -1 and"),
        (WandbSettings, {"thumbnail_height": 8}, "tracking.wandb.thumbnail_height=8 .* between 16 and"),
        (TrackingSettings, {"system_interval_seconds": -0.5}, "tracking.system_interval_seconds=-0.5"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_path_and_what_is_allowed(cls: Any, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cls(**values)


def test_the_default_group_file_says_what_the_code_says() -> None:
    loaded = OmegaConf.merge(OmegaConf.structured(TrackingSettings), OmegaConf.load(TRACKING / "default.yaml"))
    assert OmegaConf.to_object(loaded) == TrackingSettings()
    keys = OmegaConf.to_container(OmegaConf.load(TRACKING / "default.yaml"))
    assert keys == OmegaConf.to_container(OmegaConf.structured(TrackingSettings)), "every key is in the file"


@pytest.mark.parametrize("path", sorted(TRACKING.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_group_file_is_a_valid_change_of_the_default(path: Path) -> None:
    values = OmegaConf.load(path)
    values.pop("defaults", None)
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrackingSettings), values))
    assert isinstance(settings, TrackingSettings)
