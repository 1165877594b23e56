"""Where a run folder keeps what it has one of per story: next to each other, or in 256 folders if there are thousands.

A folder of many entries is slow to list and to change on a network file system. The first job in a run folder decides,
by its number of stories, and the format in the marker says which it is: so a version that knows no such folders refuses
to work there. The folder of a story follows from its name; nothing has to be listed to find it.
"""

import zlib

from storymem_dist.artifacts.records import RUN_FORMAT

SHARDED_RUN_FORMAT = f"{RUN_FORMAT}-sharded"
RUN_FORMATS = (RUN_FORMAT, SHARDED_RUN_FORMAT)
"""Formats of run folders that this version works on."""

MOST_STORIES = 4096
"""Stories that a run folder keeps in one folder."""

_NUM_SHARDS = 256


def format_for(num_stories: int) -> int | str:
    """Return the format of a new run folder for a job of that many stories."""
    return SHARDED_RUN_FORMAT if num_stories > MOST_STORIES else RUN_FORMAT


def shard_of(name: str) -> str:
    """Return the folder, two hex digits, in which a sharded run folder keeps ``name``."""
    return f"{zlib.crc32(name.encode()) % _NUM_SHARDS:02x}"
