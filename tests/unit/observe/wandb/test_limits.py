"""W&B's limits are checked before a render starts, and are those of the installed package."""

import pytest

from storymem_dist.config.composing import compose_settings
from storymem_dist.errors import ConfigError
from storymem_dist.observe.settings import WandbSettings
from storymem_dist.observe.wandb.limits import (
    KEY_LENGTH,
    NAME_LENGTH,
    TAG_LENGTH,
    check_with_package,
    fitting,
    key_part,
)
from storymem_dist.observe.wandb.process import check_settings


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("project", "p" * 129, r"project='pp.* is not allowed; it must have 1 to 128 characters .*\(it has 129\)"),
        ("project", "a:b", r"project='a:b' is not allowed; it must be a name without / \\ # \? % :"),
        ("project", " a", "project=.* blanks at its ends"),
        ("entity", "team/project", "entity='team/project' is not allowed"),
        ("entity", "", r"entity='' .* 1 to 128 characters .*\(it has 0\)"),
        ("group", "g" * 129, r"group=.* \(it has 129\)"),
        ("name", "n" * 129, r"name=.* \(it has 129\)"),
        ("name", "a\x1b[2Jb", r"name='a\\x1b\[2Jb' .* without control characters"),
        ("tags", ["fine", ""], r"tags='' is not allowed; each tag must have 1 to 64 characters \(it has 0\)"),
        ("tags", ["t" * 65], r"tags='tt.* each tag must have 1 to 64 characters \(it has 65\)"),
        ("tags", "night", r"tags='night' is not allowed; it must be a list, such as \[night,first\]"),
        ("tags", [5], "tags=5 is not allowed; each tag must be text"),
        ("tags", ["\udcff"], "tags="),
        ("notes", "\udcff", "notes=.* text in UTF-8"),
    ],
)
def test_a_name_that_wandb_refuses_is_refused_with_the_limit_and_what_was_given(
    setting: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"tracking.wandb.{message}"):
        WandbSettings(**{setting: value})


def test_names_at_the_limits_are_accepted_by_the_installed_package() -> None:
    settings = WandbSettings(
        project="p" * NAME_LENGTH,
        entity="e" * NAME_LENGTH,
        group="g" * NAME_LENGTH,
        name="ü“ 名" * 32,
        notes="two\nlines",
        tags=["t" * TAG_LENGTH, "x"],
    )
    check_with_package(settings.names(), {})


@pytest.mark.parametrize(
    ("setting", "value"), [("project", "p" * (NAME_LENGTH + 1)), ("project", "a/b"), ("tags", ["t" * (TAG_LENGTH + 1)])]
)
def test_our_limits_are_those_of_the_installed_package(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"tracking.wandb.{setting}=.* is not accepted by the installed wandb: "):
        check_with_package({setting: value}, {})


@pytest.mark.parametrize(
    ("variable", "value", "shown"),
    [
        ("WANDB_MODE", "onlin", "WANDB_MODE='onlin' .* 'online', 'offline'"),
        ("WANDB_BASE_URL", "my server", "WANDB_BASE_URL='my server' .* URL"),
        ("WANDB_TAGS", "t" * 65, "WANDB_TAGS='tt.* 65 characters"),
        ("WANDB_API_KEY", " 1234 ", "WANDB_API_KEY is not accepted"),
    ],
)
def test_a_wrong_variable_of_wandb_is_found_before_the_start(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, shown: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=shown) as caught:
        check_settings(WandbSettings(mode="offline"))
    assert "1234" not in str(caught.value)
    check_settings(WandbSettings(mode="off"))


def test_a_wrong_setting_is_found_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.wandb\.tags='tt"):
        compose_settings([f"tracking.wandb.tags=[{'t' * 65}]"])


@pytest.mark.parametrize("name", ["sweep", "s" * 200, "a\x1bb", "", "  ", "\udcff", "名" * 129])
def test_names_of_ours_are_made_to_fit(name: str) -> None:
    made = fitting(name)
    WandbSettings(group=made, name=made)
    assert made == name or made != fitting(name + "x")


@pytest.mark.parametrize("name", ["owl", "s" * 200, "../../x", "a/b", "..", "", "\udcff", "名" * 40, "a b"])
def test_parts_of_keys_are_names_of_files(name: str) -> None:
    made = key_part(name)
    assert 0 < len(made.encode()) <= KEY_LENGTH and "/" not in made and not made.startswith(".")
    assert (made == name) == (name == "owl")
