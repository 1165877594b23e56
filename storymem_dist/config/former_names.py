"""Former names of presets and settings: they keep working, and no list shows them.

Hydra asks the sources of its search path for each name in turn. This one knows the former names and lists none of them,
so ``--help``, a typo's message and shell completion show what lies in ``conf/`` alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

FORMER_NAMES: Mapping[str, Mapping[str, Any]] = {
    # renamed
    "parallel/fsdp2": {"defaults": ["fsdp_2gpu"]},
    "parallel/fsdp4": {"defaults": ["fsdp_4gpu"]},
    "parallel/fsdp8": {"defaults": ["fsdp_8gpu"]},
    "parallel/fsdp8_cfg2_ulysses4": {"defaults": ["latency_8gpu"]},
    "parallel/fsdp16_across_nodes": {"defaults": ["two_nodes_16gpu"]},
    "parallel/fsdp_offload": {"defaults": ["offload_1gpu"]},
    "parallel/zero3": {"defaults": ["deepspeed_1gpu"]},
    # without a new name: write the values themselves, such as parallel.ring=2
    "parallel/cfg2": {"cfg": 2},
    "parallel/cfg2_ulysses2": {"cfg": 2, "ulysses": 2},
    "parallel/cfg2_ulysses4": {"cfg": 2, "ulysses": 4},
    "parallel/fsdp2_cfg2": {"cfg": 2, "weights": "fsdp"},
    "parallel/fsdp2_offload": {"ulysses": 2, "weights": "fsdp_offload"},
    "parallel/fsdp4_cfg2_ulysses2": {"cfg": 2, "ulysses": 2, "weights": "fsdp"},
    "parallel/ring2": {"ring": 2},
    "parallel/ring3": {"ring": 3},
    "parallel/ulysses2": {"ulysses": 2},
    "parallel/ulysses4": {"ulysses": 4},
    "parallel/ulysses8": {"ulysses": 8},
    "parallel/usp4": {"ring": 2, "ulysses": 2},
}
"""Each former name as Hydra knows it (``GROUP/NAME``), with the contents of its entry."""

FORMER_KEYS: Mapping[str, str] = {"debug.verify_records": "debug.verify_checksums"}
"""Each former name of a setting with its present one."""


def with_present_keys(arguments: Sequence[str]) -> list[str]:
    """Return a command line in which every setting has its present name."""
    present = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        name = key.lstrip("+~")
        present.append(f"{key[: len(key) - len(name)]}{FORMER_KEYS.get(name, name)}{equals}{value}")
    return present


class FormerNamesSource(ConfigSource):
    """Loads ``FORMER_NAMES``; lists nothing."""

    @staticmethod
    def scheme() -> str:
        """The start of this source's address in a search path."""
        return "storymem-former"

    def load_config(self, config_path: str) -> ConfigResult:
        """The entry of a former name."""
        config = OmegaConf.create(dict(FORMER_NAMES[_name(config_path)]))
        return ConfigResult(provider=self.provider, path=self.full_path(), config=config, header={"package": None})

    def is_config(self, config_path: str) -> bool:
        """Whether ``config_path`` is a former name."""
        return _name(config_path) in FORMER_NAMES

    def is_group(self, config_path: str) -> bool:
        """No group is only here."""
        return False

    def available(self) -> bool:
        """Always: nothing lies on a disk."""
        return True

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Nothing."""
        return []


class FormerNamesInSearchPath(SearchPathPlugin):
    """Puts the former names into the search path of every composition."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the source behind ``conf/``."""
        search_path.append("storymem_dist", f"{FormerNamesSource.scheme()}://")


def register_former_names() -> None:
    """Make Hydra know the former names, in this process. May be called again."""
    Plugins.instance().register(FormerNamesSource)
    Plugins.instance().register(FormerNamesInSearchPath)


def _name(config_path: str) -> str:
    return config_path.rstrip("/").removesuffix(".yaml")
