import pytest

from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("resume", "maybe", r"dispatch\.resume='maybe'.*continue, strict"),
        ("on_busy", "fight", r"dispatch\.on_busy='fight'.*join, wait, refuse"),
        ("checkpoint_every_steps", -1, r"dispatch\.checkpoint_every_steps=-1"),
        ("lease_seconds", 0.5, r"dispatch\.lease_seconds=0\.5.*between 1"),
        ("lease_seconds", float("nan"), r"dispatch\.lease_seconds=nan"),
        ("poll_seconds", -1, r"dispatch\.poll_seconds"),
        ("max_attempts", 0, r"dispatch\.max_attempts=0.*between 1"),
        ("swap_seconds", -1, r"dispatch\.swap_seconds"),
        ("rerender", ["ocean"], r"dispatch\.rerender='ocean'.*STORY:SHOT"),
        ("rerender", ["ocean:"], r"dispatch\.rerender='ocean:'"),
        ("rerender", [":3"], r"dispatch\.rerender=':3'"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_path_and_what_is_allowed(
    setting: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DispatchSettings(**{setting: value})


def test_the_defaults_and_usual_values_are_allowed() -> None:
    assert DispatchSettings(rerender=["ocean:3", "a:b:shot_01"]).on_busy == "join"
