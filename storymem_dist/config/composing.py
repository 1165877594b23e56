"""Between Hydra and settings: what Hydra must know before it composes, and what it composed as plain dataclasses."""

from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf

from storymem_dist.config.former_names import register_former_names
from storymem_dist.config.overrides import COMPOSING_ERRORS, as_error, prepare
from storymem_dist.config.schema import RenderConfig
from storymem_dist.errors import ConfigError, StoryMemError
from storymem_dist.files import expand_home
from storymem_dist.resources import assets_folder, config_folder, packed_weights


def compose_settings(overrides: Sequence[str]) -> RenderConfig:
    """What ``storymem-render OVERRIDES`` would render with.

    Raises:
        ConfigError: an override names no key or group, or its value is not allowed.
    """
    register_schema()
    given = prepare(overrides)
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
            return to_settings(compose("render", overrides=given), overrides)
    except COMPOSING_ERRORS as error:
        raise as_error(error, overrides) from None


def register_schema() -> None:
    """Make known to Hydra what ``conf/`` names but does not hold: schema, launcher, files, former names."""
    register_former_names()
    ConfigStore.instance().store(name="render_schema", node=RenderConfig)
    launcher = {"_target_": "hydra_plugins.storymem_launcher.SweepLauncher"}
    ConfigStore.instance().store(group="hydra/launcher", name="storymem", node=launcher, provider="storymem_dist")
    OmegaConf.register_new_resolver(
        "storymem_examples", lambda part="": str(assets_folder("examples") / part), replace=True
    )
    OmegaConf.register_new_resolver("storymem_home", lambda path: expand_home(str(path), "output"), replace=True)
    OmegaConf.register_new_resolver("storymem_packed", lambda name: str(packed_weights(name)), replace=True)


def to_settings(config: DictConfig | ListConfig, overrides: Sequence[str] = ()) -> RenderConfig:
    """Convert a composed configuration to plain dataclasses; every group validates itself on the way.

    ``overrides``: the command line as it was typed, for messages.

    Raises:
        ConfigError: a value is missing, ill-typed or not allowed; the message names its key.
    """
    try:
        settings = OmegaConf.to_object(config)
    except StoryMemError:
        raise
    except COMPOSING_ERRORS as error:
        raise as_error(error, overrides) from None
    if not isinstance(settings, RenderConfig):
        raise ConfigError(f"the composed configuration is a {type(settings).__name__}, not a RenderConfig")
    return settings


def to_plain(config: DictConfig | ListConfig | RenderConfig) -> dict[str, Any]:
    """The configuration as nested plain values, for records and tracking."""
    container = config if isinstance(config, DictConfig | ListConfig) else OmegaConf.structured(config)
    plain = OmegaConf.to_container(container, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}
