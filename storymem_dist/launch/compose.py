"""A configuration without a job: the settings that given overrides stand for."""

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from storymem_dist.config import RenderConfig, config_folder, register_schema, to_settings
from storymem_dist.errors import ConfigError


def compose_settings(overrides: Sequence[str]) -> RenderConfig:
    """What ``storymem-render OVERRIDES`` would render with.

    Raises:
        ConfigError: an override names no key or group, or its value is not allowed.
    """
    register_schema()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_folder())):
            return to_settings(compose("render", overrides=list(overrides)))
    except HydraException as error:
        cause = error.__cause__ or error
        raise ConfigError(f"{' '.join(overrides)}: {str(cause).strip().splitlines()[0]}") from None
