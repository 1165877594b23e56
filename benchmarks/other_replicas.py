"""All replicas of a simulated job but the measured one, for ``benchmarks.metadata``: what they do to the run folder."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from storymem_dist.artifacts.commit_log import CommitLog
from storymem_dist.dispatch.leases import WORKING
from storymem_dist.dispatch.owners import Owner, owner_json
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.dispatch.scanning import lease_key
from storymem_dist.files import canonical_json

if TYPE_CHECKING:
    from benchmarks.metadata import World


class Others:
    """All replicas but the measured one: what they do to the folder, without counting it."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._log = CommitLog(world.run.commits_folder)
        self._beats = 1
        self._next_beat = world.now
        self._next_story = 0
        self._owners = [
            dataclasses.replace(Owner.this_process("job", n), owner_id=f"other-{n}", boot_id=f"machine {n}")
            for n in range(1, world.job.num_replicas)
        ]
        self._leases = [canonical_json({**owner_json(owner), "num_deaths": 0}) for owner in self._owners]
        self._held: dict[int, tuple[PlannedShot, Path, float]] = {}  # by replica: the shot, and when it is done
        self._heartbeats: list[tuple[Path, bytes]] = []
        for owner in self._owners:
            heartbeat = {"counter": f"{1:012d}", "state": WORKING, **owner_json(owner)}
            self._heartbeats.append((world.run.leases_folder / f"{owner.owner_id}.alive", canonical_json(heartbeat)))
        self._beat()
        for number in range(world.job.num_busy - 1):
            self._take(number, world.now + world.job.shot_seconds * (number + 1) / world.job.num_busy)

    def go_on(self) -> None:
        """Beat, commit what is done, and claim what follows."""
        now = self._world.now
        self._log.read_new()
        if now >= self._next_beat:
            self._beat()
        for number, (shot, lease, done) in list(self._held.items()):
            if now >= done:
                folder = self._world.run.story_folder(shot.story_id) / shot.shot_id / "records"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{shot.fingerprint[:16]}.json").touch()
                self._log.note(lease_key(shot))
                lease.unlink()
                del self._held[number]
                self._take(number, done + self._world.job.shot_seconds, after=shot)

    def take_all(self) -> None:
        """Claim a shot of every story that none of them has."""
        busy = {shot.story_id for shot, _, _ in self._held.values()}
        free = [number for number in range(len(self._owners)) if number not in self._held]
        self._next_story = 0
        while free and self._next_story < len(self._world.part.stories):
            if self._world.part.stories[self._next_story].story_id in busy:
                self._next_story += 1
            else:
                self._take(free.pop(), self._world.now + self._world.job.shot_seconds, after=self._last_committed())

    def _last_committed(self) -> PlannedShot | None:
        """The last shot of the next story that has a record."""
        shots, run = self._shots(self._next_story), self._world.run
        done = [shot for shot in shots if run.shot(shot.story_id, shot.shot_id).is_committed(shot.fingerprint)]
        return done[-1] if done else None

    def _take(self, number: int, done: float, *, after: PlannedShot | None = None) -> None:
        """Claim the next shot of the story, or the first one of the next story that is free."""
        while True:
            if after is not None and after.index + 1 < self._world.job.story_length:
                shot = self._shots(int(after.story_id.rpartition("_")[2]))[after.index + 1]
            elif self._next_story < len(self._world.part.stories):
                shot = self._shots(self._next_story)[0]
                self._next_story += 1
            else:
                return
            lease = self._world.run.leases_folder / f"{lease_key(shot)}.0.lease"
            if not lease.exists():
                lease.write_bytes(self._leases[number])
                self._held[number] = (shot, lease, done)
                return
            after = shot if after is not None else None

    def _shots(self, story: int) -> tuple[PlannedShot, ...]:
        return self._world.plan_once(0, self._world.part, self._world.part.stories[story])

    def _beat(self) -> None:
        """Write another counter into every heartbeat, often enough that none seems dead."""
        self._next_beat = self._world.now + 0.75 * self._world.settings.lease_seconds
        self._beats += 1
        for path, data in self._heartbeats:
            path.write_bytes(data.replace(b"000000000001", b"%012d" % self._beats))
