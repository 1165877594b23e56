"""Renders a batch: claims ready shots until none is left. Read this first.

Every rank of a replica runs this loop in lock step. What only the leader can know or do (what is on disk, which shot is
next, whether a save worked, "stop now") is a method of its ``Desk`` and goes through ``leader_decides``, which gives
all ranks the same value or the same exception. So this file has no test of ranks and touches no file.

Resuming is the same call again: committed shots are skipped, a shot that was left between two denoising steps goes on
there.
"""

import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial

import torch

from storymem_dist.diffusion.denoise import DenoiseState, DenoiseStopped, StepInfo
from storymem_dist.dispatch.coordinator import Desk
from storymem_dist.dispatch.plan import BatchPart
from storymem_dist.dispatch.protocol import Assignment, End, LeaderDecides, RenderedShot, ShotRenderer, alone
from storymem_dist.dispatch.settings import DispatchSettings
from storymem_dist.dispatch.stop import StopSwitch
from storymem_dist.dispatch.summary import BatchSummary, Replica
from storymem_dist.errors import StoryMemError
from storymem_dist.events import StepFinished, timed_stage
from storymem_dist.hardware import current_device, device_memory


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
    on_crash: Callable[[BaseException], None] = lambda error: None,
) -> BatchSummary:
    """Render all shots of all ``parts`` that are not committed, together with the other replicas and jobs.

    ``check_contents`` compares the contents of all files of a resumed run with their records, not only their sizes.
    ``loaded`` is the kind whose experts the renderer has already. ``on_crash`` hears at once of an error that ends the
    batch, before what is being saved is waited for.
    All ranks return the same summary.

    Raises ``RunFolderError`` and other ``StoryMemError`` when the batch cannot begin, and whatever the renderer raised
    when it is not the fault of one shot; the shot in flight is then claimed again after a restart.
    """
    desk = Desk(
        parts=parts,
        settings=settings,
        replica=replica or Replica(),
        stop=stop or StopSwitch([part.run.stop_file for part in parts]),
        check_contents=check_contents,
    )
    try:
        leader_decides(desk.open)
        while True:
            assignment = leader_decides(partial(desk.next_assignment, loaded))
            if isinstance(assignment, End):
                return leader_decides(partial(desk.finish, assignment))
            kind = assignment.job.kind
            if kind != loaded:
                began = time.monotonic()
                with timed_stage(parts[assignment.job.part].observers, "load"):
                    renderer.prepare(kind)
                elapsed = time.monotonic() - began
                leader_decides(partial(desk.note_prepared, elapsed, swapped=loaded is not None))
                loaded = kind
            _render(assignment, parts[assignment.job.part], renderer, desk, settings, leader_decides)
    except StoryMemError:  # the shot in flight is not to blame
        desk.close()
        raise
    except KeyboardInterrupt:
        desk.close(at_once=True)
        raise
    except BaseException as error:
        on_crash(error)
        desk.close(crashed=True)
        raise


def _render(
    assignment: Assignment,
    part: BatchPart,
    renderer: ShotRenderer,
    desk: Desk,
    settings: DispatchSettings,
    leader_decides: LeaderDecides,
) -> None:
    """Render one shot and hand in the result, or the reason why there is none."""
    try:
        rendered = _attempt(assignment, part, renderer, desk, settings, leader_decides)
    except DenoiseStopped as stopped:
        leader_decides(partial(desk.shot_stopped, stopped.state))
    except StoryMemError as error:
        leader_decides(partial(desk.shot_failed, str(error), type(error).__name__, details=traceback.format_exc()))
    except (torch.OutOfMemoryError, MemoryError) as error:
        if not renderer.retries_in_place:
            desk.note_out_of_memory(assignment, _brief(error))
            raise
        again = not assignment.low_memory
        leader_decides(partial(desk.shot_failed, _brief(error), type(error).__name__, low_memory_next=again))
    else:
        leader_decides(partial(desk.shot_rendered, rendered))


def _attempt(
    assignment: Assignment,
    part: BatchPart,
    renderer: ShotRenderer,
    desk: Desk,
    settings: DispatchSettings,
    leader_decides: LeaderDecides,
) -> RenderedShot:
    job = assignment.job

    def on_step(info: StepInfo) -> None:
        part.observers.notify(
            StepFinished(
                story_id=job.story.story_id,
                shot_id=job.shot.shot_id,
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
        leader_decides(partial(desk.save_checkpoint, state))

    return renderer.render(
        job,
        assignment.history,
        resume=assignment.resume,
        on_step=on_step,
        should_stop=lambda: leader_decides(desk.should_stop),
        on_checkpoint=on_checkpoint,
        checkpoint_every_steps=settings.checkpoint_every_steps,
        low_memory=assignment.low_memory,
    )


def _brief(error: BaseException) -> str:
    """The first line of an allocator's message; the rest is statistics."""
    return str(error).splitlines()[0] if str(error) else "out of memory"
