"""Who renders a shot: the ranks of one replica, or those of several that were merged for it. Types only."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from storymem_dist.dispatch.gathering import Merge
from storymem_dist.dispatch.plan import BatchPart
from storymem_dist.dispatch.protocol import LeaderDecides, ShotRenderer
from storymem_dist.dispatch.tail import TeamRules


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The ranks that render a shot together, as one of them sees them. ``parts`` have the observers of this rank."""

    parts: Sequence[BatchPart]
    renderer: ShotRenderer
    leader_decides: LeaderDecides


class Crews(Protocol):
    """Makes this rank a member of crews of several replicas (``render.merged``)."""

    def rules(self) -> TeamRules:
        """What the coordinator of this replica needs to decide on teams. On its leader only."""
        ...

    def crew(self, merge: Merge) -> AbstractContextManager[Crew]:
        """Be a member of the crew of ``merge`` while the context is open. Collective over its ranks."""
        ...
