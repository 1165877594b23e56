"""Renders a batch: claims ready shots until none is left.

Every rank of a replica runs this loop in lock step. What only the leader can know or do (what is on disk, which shot is
next, whether a save worked, whether to stop) is a method of its ``Coordinator``, called through ``leader_decides``:
all ranks get the same value or the same exception. So this module checks no rank numbers and opens no file. Only two
methods are called on each rank: ``close``, which does nothing where the coordinator is not open, and
``note_out_of_memory``.

A *kind* names the pair of experts that a shot needs: t2v or m2v. A *part*
is the stories with one set of settings: a job has one part, a joined sweep one for each point.

To resume, make the same call again: it skips committed shots and continues a stopped shot at its last saved step.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from storymem_dist.diffusion.denoise import DenoiseState, DenoiseStopped, StepInfo
from storymem_dist.dispatch.coordinator import Coordinator
from storymem_dist.dispatch.plan import BatchPart
from storymem_dist.dispatch.protocol import (
    Assignment,
    Called,
    End,
    LeaderDecides,
    RenderedShot,
    ShotRenderer,
    ShotStopped,
    alone,
)
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.dispatch.summary import BatchSummary, Replica
from storymem_dist.errors import StoryMemError
from storymem_dist.events import ReplicaHelped, StepFinished, timed_stage
from storymem_dist.hardware import current_device, device_memory, machine_fault
from storymem_dist.render.crew import Crew, Crews
from storymem_dist.story.modes import GIVEN


def render_batch(
    *,
    parts: Sequence[BatchPart],
    renderer: ShotRenderer,
    settings: DispatchSettings,
    replica: Replica | None = None,
    stop: StopSwitch | None = None,
    leader_decides: LeaderDecides = alone,
    check_contents: bool = False,
    loaded: str | None = None,
    crews: Crews | None = None,
    on_crash: Callable[[BaseException], None] = lambda error: None,
) -> BatchSummary:
    """Render all shots of all ``parts`` that are not committed, together with the other replicas and jobs.

    ``check_contents`` compares the contents of all files of a resumed run with their records, not only their sizes.
    ``loaded`` is the kind of experts that the renderer has already loaded. ``crews`` lets this replica render shots
    together with idle ones. ``on_crash`` is called with an unexpected error that ends the batch, before the wait for a
    shot that is being saved. All ranks return the same summary.

    Raises ``RunFolderError`` and other ``StoryMemError`` when the batch cannot begin, ``MachineError`` when the machine
    fails (no shot is then marked as failed), and any error of the renderer that is not the fault of one shot; a restart
    then claims the shot in flight again.
    """
    coordinator = Coordinator(
        parts=parts,
        settings=settings,
        replica=replica or Replica(),
        stop=stop or StopSwitch([part.run.stop_file for part in parts]),
        check_contents=check_contents,
        team_rules=None if crews is None else crews.rules,
    )
    alone = Crew(parts=parts, renderer=renderer, leader_decides=leader_decides)
    try:
        leader_decides(coordinator.open)
        lora_key = ""
        while True:
            found = leader_decides(partial(coordinator.next_assignment, loaded, lora_key))
            if isinstance(found, End):
                return leader_decides(partial(coordinator.finish, found))
            began = time.monotonic()
            with nullcontext(alone) if found.merge is None or crews is None else crews.crew(found.merge) as crew:
                assignment = _of_leader(found, crew)
                job, kind = assignment.job, assignment.job.kind
                if isinstance(found, Called):
                    leader_decides(partial(coordinator.note_helping, job))
                if kind not in (loaded, GIVEN) or found.merge is not None:  # a crew loads together what some lack
                    began_loading = time.monotonic()
                    with timed_stage(parts[job.part].observers, "load"):
                        crew.renderer.prepare(kind)
                    if kind not in (loaded, GIVEN):
                        elapsed = time.monotonic() - began_loading
                        leader_decides(partial(coordinator.note_prepared, elapsed, swapped=loaded is not None))
                        loaded = kind
                lora_key = lora_key if kind == GIVEN else job.lora_key
                _render_shot(assignment, crew, coordinator, settings)
            if isinstance(found, Called):
                leader_decides(partial(coordinator.note_helping, None))
                parts[job.part].observers.notify(
                    ReplicaHelped(
                        story_id=job.story_id,
                        shot_id=job.shot_id,
                        leader=found.merge.leader,
                        elapsed_seconds=time.monotonic() - began,
                    )
                )
    except StoryMemError:  # from the coordinator or from loading experts; an error of a shot stays in _render_shot
        coordinator.close()
        raise
    except KeyboardInterrupt:
        coordinator.close(at_once=True)
        raise
    except BaseException as error:
        if fault := machine_fault(error):
            coordinator.close()
            raise fault from error
        on_crash(error)
        coordinator.close(crashed=True)
        raise


def _of_leader(found: Assignment | Called, crew: Crew) -> Assignment:
    """The assignment of the replica that leads the crew."""
    if found.merge is None:
        assert isinstance(found, Assignment), "only other replicas call"
        return found
    of_leader = crew.leader_decides(lambda: found)
    assert isinstance(of_leader, Assignment), "the leader was not called"
    return of_leader


def _render_shot(assignment: Assignment, crew: Crew, coordinator: Coordinator, settings: DispatchSettings) -> None:
    """Render one shot and pass the result, or why there is none, to the coordinator of the replica that leads."""
    renderer, leader_decides = crew.renderer, crew.leader_decides
    try:
        rendered = _attempt(assignment, crew, coordinator, settings)
    except DenoiseStopped as stopped:
        leader_decides(partial(coordinator.shot_stopped, stopped.state))
    except ShotStopped:
        leader_decides(partial(coordinator.shot_stopped, None))
    except StoryMemError as error:
        if fault := machine_fault(error):
            raise fault from error
        leader_decides(
            partial(coordinator.shot_failed, str(error), type(error).__name__, details=traceback.format_exc())
        )
    except (torch.OutOfMemoryError, MemoryError) as error:
        if not renderer.retries_in_place:
            coordinator.note_out_of_memory(assignment, _brief(error))
            raise
        again = not assignment.low_memory
        leader_decides(partial(coordinator.shot_failed, _brief(error), type(error).__name__, low_memory_next=again))
    else:
        leader_decides(partial(coordinator.shot_rendered, rendered))


def _attempt(assignment: Assignment, crew: Crew, coordinator: Coordinator, settings: DispatchSettings) -> RenderedShot:
    job, leader_decides = assignment.job, crew.leader_decides
    part = crew.parts[job.part]

    def on_step(info: StepInfo) -> None:
        part.observers.notify(
            StepFinished(
                story_id=job.story_id,
                shot_id=job.shot_id,
                step=info.step,
                num_steps=info.num_steps,
                expert=info.expert,
                elapsed_seconds=info.elapsed_seconds,
                timestep=info.timestep,
                gpu_memory_gib=device_memory(current_device()).held_gib,
                reused=info.reused,
            )
        )

    def on_checkpoint(state: DenoiseState) -> None:
        leader_decides(partial(coordinator.save_checkpoint, state))

    return crew.renderer.render(
        job,
        assignment.history,
        resume=assignment.resume,
        on_step=on_step,
        should_stop=lambda: leader_decides(coordinator.should_stop),
        on_checkpoint=on_checkpoint,
        checkpoint_every_steps=settings.checkpoint_every_steps,
        low_memory=assignment.low_memory,
    )


def _brief(error: BaseException) -> str:
    """The first line of an allocator's message; the rest is statistics."""
    return str(error).splitlines()[0] if str(error) else "out of memory"
