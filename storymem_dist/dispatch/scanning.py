"""What one replica sees of the run folders: which shots are committed, leased or failed, by whichever process.

A ``FolderView`` keeps the graph of all shots up to date. It lists leases, failures and the notes of the commit log at
most once per ``poll_seconds``, more rarely where many replicas do so (``pace``), and looks at everything else by name.
Between two scans it may be outdated, so ``queue`` looks again at each shot that it claims.

What each replica could find out by itself, replicas of a large job share: at the start each looks up the records of its
own stories, and learns of the others from the log; and each checks the holders of a few leases.

Knows nothing of how a shot is chosen.
"""

import hashlib
import time
import zlib
from collections.abc import Callable, Iterable, Sequence

from storymem_dist.artifacts.commit_log import CommitLog
from storymem_dist.artifacts.run_folder import FailureRecord, RunFolder
from storymem_dist.dispatch.graph import ShotGraph, ShotKey, shot_key
from storymem_dist.dispatch.leases import LeaseFolder
from storymem_dist.dispatch.pace import Pace
from storymem_dist.dispatch.plan import PlannedShot
from storymem_dist.dispatch.protocol import ShotJob
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.story_graph import ShotStatus, StoryGraph

NAMES_PER_LISTING = 1000  # that one operation returns, roughly

_LOOKS_AT_START = 100_000  # at records, by all replicas together; above this number they share them
_WATCHERS = 4  # replicas, on average, that check whether the holder of one lease is dead
_WATCH_LEASE_TIMES = 20  # until other replicas watch it
_LEAST_WAITING = 0.05  # share of the replicas that may wait unseen
_OPERATIONS_PER_CHECK = 2  # the lease, and the heartbeat of its holder


class FolderView:
    """The run folders of a batch as one replica last saw them; ``graph`` has the states of all shots.

    ``failures``: failure marks by shot. ``own``: shots that this replica holds. ``generations``: the leases of all
    owners, by shot, as last scanned. ``leased_since``: when this replica first saw each lease of another (seconds on
    ``clock``). ``pace`` knows how many replicas share the work. The other arguments are those of ``ShotQueue``.
    """

    def __init__(
        self,
        *,
        graph: ShotGraph,
        runs: Sequence[RunFolder],
        leases: Sequence[LeaseFolder],
        settings: DispatchSettings,
        job_id: str,
        num_replicas: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.graph = graph
        self.failures: dict[ShotKey, FailureRecord] = {}
        self.own: set[ShotKey] = set()
        self.generations: dict[ShotKey, int] = {}
        self.leased_since: dict[ShotKey, float] = {}
        self.num_scans = 0
        self.pace = Pace(num_replicas)
        self.logs = [CommitLog(run.commits_folder) for run in runs]
        self._runs = runs
        self.leases = leases
        self._settings = settings
        self._job_id = job_id
        self._num_replicas = num_replicas
        self._clock = clock
        self._next_scan = self._next_check = -float("inf")
        self._next_roll_call: float | None = None
        self._waits = False
        self._own_stories: set[int] | None = None  # numbers of those that it looks up; None: all
        self._complete_before: set[int] = set()
        self._failure_names: list[set[str]] = [set() for _ in runs]
        self._to_try_again: list[set[str]] = [set() for _ in runs]  # names of failures found at the start

    @property
    def num_sharing(self) -> int:
        """Replicas that share the work, as far as known."""
        return max(self._num_replicas, sum(leases.num_alive for leases in self.leases))

    # -- looking -------------------------------------------------------------------------------------------------------

    def read_committed(self, own: Sequence[StoryGraph] | None = None) -> None:
        """Find the committed shots, and the failures that ``retry_failed`` clears. Called once, before any scan.

        In a large job, finds those of ``own`` stories, which no other replica of the job has among its own, and notes
        them for the others; what it knows of the rest is what was noted.
        """
        if self._settings.retry_failed:
            self._to_try_again = [run.failure_names() for run in self._runs]
        noted = self._read_logs()
        num_looks = self._num_replicas * sum(len(story.shots) for story in self.graph.stories)
        if own is None or num_looks <= _LOOKS_AT_START:
            self._look_up(self.graph.stories)
            return
        self._look_up(own)
        self._own_stories = {story.number for story in own}
        for story in own:
            for shot, state in zip(story.shots, story.states, strict=True):
                if state is ShotStatus.COMMITTED:
                    self.note_committed(shot)
        of_others = [key for key in noted if (entry := self.graph.find(key)) and not self._is_own(entry[0])]
        self.set_committed(of_others)
        self._complete_before = {story.number for story in self.graph.stories if story.is_complete}

    @property
    def shares_looks(self) -> bool:
        """Whether this replica learns of most commits from the log: a look at every record would be too much."""
        return self._own_stories is not None

    def is_noted(self, shot: PlannedShot) -> bool:
        """Whether the commit of ``shot`` was noted before the last scan."""
        return self.logs[shot.part].was_noted(lease_key(shot))

    def video_is_known(self, story: StoryGraph) -> bool:
        """Whether other replicas of a large job see to the video of a complete story, or have noted it as made."""
        if self._own_stories is None or self._is_own(story):
            return False
        return story.number in self._complete_before or self.logs[story.part].was_noted(video_key(story))

    def find_committed(self) -> None:
        """Find the shots that any process has committed; in a large job, those that were noted."""
        if self.shares_looks:
            self.set_committed(self._read_logs())
        else:
            self._look_up(self.graph.stories)

    def note_committed(self, shot: PlannedShot) -> None:
        """Note for other replicas that ``shot`` is committed. Thread-safe. Never raises."""
        self.logs[shot.part].note(lease_key(shot))

    def scan(self, *, force: bool = False) -> bool:
        """Update the view of leases, failures and commits if it is time; return whether it was."""
        now = self._clock()
        if now < self._next_scan and not force:
            return False
        self.num_scans += 1
        found: dict[ShotKey, int] = {}
        num_names = 0
        for part_index, folder in enumerate(self.leases):
            keys = folder.scan()
            num_names += folder.num_alive + len(keys)
            for name, generation in keys.items():
                if (parsed := parse_lease_key(name)) is not None:
                    found[(part_index, *parsed)] = generation
        self.pace.num_replicas = self.num_sharing
        for part_index in range(len(self._runs)):
            num_names += self._follow_failures(part_index)
        noted = self._read_logs()  # after the leases: a commit is noted before its lease is released
        self.set_committed(noted)
        gone = self.generations.keys() - found.keys()
        self.generations = found
        for key in gone:
            self.leased_since.pop(key, None)
            if key not in noted:
                self._look_again(key)
        for key in found:
            entry = self.graph.find(key)
            if entry is not None and key not in self.own:
                story, position = entry
                self.leased_since.setdefault(key, now)
                if story.states[position] is ShotStatus.WAITING:
                    self.graph.set_state(story.shots[position], ShotStatus.LEASED)
        num_operations = 4 * len(self._runs) + num_names / NAMES_PER_LISTING
        self._next_scan = now + self.pace.seconds(
            self._settings.poll_seconds, num_operations, num_looking=self._num_waiting
        )
        if now >= self._next_check or force:
            self._look_for_the_dead(now)
        if self._next_roll_call is None:
            self._next_roll_call = now + self._settings.lease_seconds
        elif now >= self._next_roll_call and self.leases[0].owner.replica == 0:
            self._next_roll_call = float("inf")  # once: by then, those of a job that was killed have stood still
            for folder in self.leases:
                folder.mark_dead_owners()
        return True

    def hold(self, key: ShotKey) -> None:
        """Note that this replica holds a shot: it does not wait."""
        self.own.add(key)
        self._waits = False

    def find_commit(self, shot: PlannedShot) -> bool:
        """Whether another process has committed ``shot``; if so, find the committed shots that need it, too."""
        run, found = self._runs[shot.part], False
        left, seen = [shot], {shot.index}
        while left:
            one = left.pop()
            if run.shot(one.story_id, one.shot_id).is_committed(one.fingerprint):
                self.graph.set_state(one, ShotStatus.COMMITTED)
                self.note_committed(one)
                new = [later for later in self.graph.followers(one) if later.index not in seen]
                left += new
                seen.update(later.index for later in new)
                found = True
        return found

    def has_failed(self, shot: PlannedShot) -> bool:
        """Whether ``shot`` has a final failure mark. Raises ``OSError`` when it cannot be read."""
        run = self._runs[shot.part]
        failure = run.read_failure(shot.story_id, shot.shot_id, shot.fingerprint)
        if failure is None:
            self.failures.pop(shot_key(shot), None)
            return False
        name = run.failure_name(shot.story_id, shot.shot_id, shot.fingerprint)
        again = self._to_try_again[shot.part]
        if failure.is_final and name in again and failure.job_id != self._job_id:
            again.remove(name)  # once, or jobs with this setting would retry it in turns for ever
            run.remove_failure(shot.story_id, shot.shot_id, shot.fingerprint)
            self.failures.pop(shot_key(shot), None)
            return False
        self.failures[shot_key(shot)] = failure
        if failure.is_final:
            self.graph.set_state(shot, ShotStatus.FAILED)
        return failure.is_final

    # -- inside --------------------------------------------------------------------------------------------------------

    def _read_logs(self) -> set[ShotKey]:
        """The shots whose commit others have noted since the last call."""
        keys = ((index, parse_lease_key(name)) for index, log in enumerate(self.logs) for name in log.read_new())
        return {(index, *key) for index, key in keys if key is not None}

    def _is_own(self, story: StoryGraph) -> bool:
        return self._own_stories is None or story.number in self._own_stories

    def set_committed(self, keys: Iterable[ShotKey]) -> None:
        """Set the state of shots that others have committed."""
        for key in keys:
            if key not in self.own and (entry := self.graph.find(key)) is not None:
                self.graph.set_state(entry[0].shots[entry[1]], ShotStatus.COMMITTED)

    def _look_up(self, stories: Sequence[StoryGraph]) -> None:
        """Look up the records of those shots that are not known to be committed."""
        for story in stories:
            run = self._runs[story.part]
            if run.story_folder(story.story_id).exists():
                for shot in story.shots:
                    is_known = self.graph.state(shot) is ShotStatus.COMMITTED
                    if not is_known and run.shot(story.story_id, shot.shot_id).is_committed(shot.fingerprint):
                        self.graph.set_state(shot, ShotStatus.COMMITTED)

    def _look_again(self, key: ShotKey) -> None:
        """Update the shot of a lease that is gone: it is committed, has failed, or is free again."""
        entry = self.graph.find(key)
        if entry is None or key in self.own:
            return
        story, position = entry
        shot = story.shots[position]
        if story.states[position] is ShotStatus.LEASED and not self.find_commit(shot) and not self.has_failed(shot):
            self.graph.set_state(shot, ShotStatus.WAITING)

    def _follow_failures(self, part_index: int) -> int:
        """Update the shots whose failure marks came or went since the last scan; return how many marks there are."""
        names = self._runs[part_index].failure_names()
        for name in names ^ self._failure_names[part_index]:
            key = parse_lease_key(name.removesuffix(".json"))
            entry = self.graph.find((part_index, *key)) if key else None
            if entry is None:
                continue
            story, position = entry
            shot, state = story.shots[position], story.states[position]
            if state is ShotStatus.WAITING and name in names:
                self.has_failed(shot)
            elif state is ShotStatus.FAILED and name not in names:
                self.graph.set_state(shot, ShotStatus.WAITING)
        self._failure_names[part_index] = names
        return len(names)

    @property
    def _num_waiting(self) -> float:
        """Replicas that wait for a shot, estimated. Of many, more than seem to: each save holds a lease, too."""
        sharing = self.pace.num_replicas
        return max(1.0, sharing - len(self.generations), _LEAST_WAITING * sharing)

    def _look_for_the_dead(self, now: float) -> None:
        """Make shots with dead holders ready again, and mark dead owners. Each replica checks its share of them.

        Those that wait look often and share the checks among them; the others look once for each shot.
        """
        num_looking = self._num_waiting if self._waits else self.pace.num_replicas
        self._waits = True
        num_operations = 0
        for shot in self.graph.leased():
            key, name = shot_key(shot), lease_key(shot)
            if key in self.own or not self._watches(name, num_looking, now):
                continue
            num_operations += _OPERATIONS_PER_CHECK
            generation = self.generations.get(key)
            if generation is None:
                self._look_again(key)
            elif self.leases[shot.part].holder_is_dead(name, generation):
                self.graph.set_state(shot, ShotStatus.WAITING)
        for leases in self.leases:
            watched = [name for name in leases.alive_names if self._watches(name, num_looking, now)]
            num_operations += _OPERATIONS_PER_CHECK * len(watched)
            leases.mark_dead_owners(watched)
        self._next_check = now + self.pace.seconds(self._settings.poll_seconds, num_operations, num_looking=num_looking)

    def _watches(self, name: str, num_looking: float, now: float) -> bool:
        """Whether this replica is one of those that check ``name``; others check it some time later."""
        period = int(now / (_WATCH_LEASE_TIMES * self._settings.lease_seconds))
        chance = zlib.crc32(f"{name} {period} {self.leases[0].owner.owner_id}".encode()) / 2**32
        return chance * num_looking < _WATCHERS


def lease_key(shot: PlannedShot | ShotJob) -> str:
    """Name of a shot's lease in its part's folder."""
    return f"{shot.story_id}.{shot.shot_id}.{shot.fingerprint[:16]}"


def video_key(story: StoryGraph) -> str:
    """Name under which the video of a complete story is noted: it depends on all its shots."""
    digest = hashlib.sha256("".join(shot.fingerprint for shot in story.shots).encode()).hexdigest()
    return f"{story.story_id}.story.{digest[:16]}"


def parse_lease_key(name: str) -> tuple[str, str, str] | None:
    """Split a lease's name into story, shot and fingerprint digits; None when it is not the name of a shot's lease."""
    parts = name.rsplit(".", 2)
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else None
