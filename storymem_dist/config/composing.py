"""Between Hydra and settings: what Hydra must know before it composes, and what it composed as plain dataclasses."""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer

from storymem_dist.config.former_names import register_former_names
from storymem_dist.config.overrides import COMPOSING_ERRORS, as_error, prepare
from storymem_dist.config.schema import RenderConfig
from storymem_dist.errors import ConfigError, StoryMemError
from storymem_dist.files import expand_home
from storymem_dist.resources import assets_folder, config_folder, packed_weights

_COMPOSING = threading.RLock()


def compose_settings(overrides: Sequence[str]) -> RenderConfig:
    """What ``storymem-render OVERRIDES`` would render with.

    Raises:
        ConfigError: an override names no key or group, or its value is not allowed.
    """
    return compose_both(overrides)[0]


def compose_both(overrides: Sequence[str]) -> tuple[RenderConfig, dict[str, Any]]:
    """The same as settings and as plain values. Hydra and OmegaConf are afterwards as they were, in any thread.

    Raises ``ConfigError`` as ``compose_settings``.
    """
    with hydra_left_alone():
        register_schema()
        given = prepare(overrides)
        try:
            with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
                config = compose("render", overrides=given)
                return to_settings(config, overrides), to_plain(config)
        except COMPOSING_ERRORS as error:
            raise as_error(error, overrides) from None


@contextmanager
def hydra_left_alone() -> Iterator[None]:
    """Give the body a copy of what Hydra and OmegaConf keep for the whole process, and put the original back.

    Another program in this process may use Hydra itself, and have initialized it.
    """
    with _COMPOSING:
        instances, resolvers = Singleton._instances, BaseContainer._resolvers
        kept = {kind: one for kind, one in instances.items() if kind not in (GlobalHydra, HydraConfig)}
        Singleton._instances = copy.deepcopy(kept)
        BaseContainer._resolvers = dict(resolvers)
        try:
            yield
        finally:
            Singleton._instances, BaseContainer._resolvers = instances, resolvers


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
