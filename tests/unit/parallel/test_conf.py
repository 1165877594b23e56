"""Every entry of ``conf/parallel`` is a layout that can be started."""

from pathlib import Path

import pytest
import yaml

from storymem_dist.parallel.layout import check_heads, plan_layout
from storymem_dist.parallel.settings import ParallelSettings

ENTRIES = sorted((Path(__file__).parents[3] / "conf" / "parallel").glob("*.yaml"))


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda path: path.stem)
def test_an_entry_sets_known_fields_and_fits_the_ranks_it_is_named_for(entry: Path) -> None:
    text = entry.read_text()
    settings = ParallelSettings(**yaml.safe_load(text))
    check_heads(settings, 40)
    plan_layout(settings, world_size=settings.ranks_per_replica)
    assert text.startswith("# "), "an entry begins by saying what it is for"


def test_the_entries_that_the_documentation_names_exist() -> None:
    names = {entry.stem for entry in ENTRIES}
    assert {"single", "replicas", "ulysses2", "cfg2", "ring2", "usp4", "fsdp2", "zero3"} <= names
