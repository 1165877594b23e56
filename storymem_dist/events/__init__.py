"""The events of a render as typed values, shared by the code that renders and the code that observes.

Rendering code creates an event and passes it to an ``Observer``. The fan-out (``observe/observers.py``) adds wall time,
writer, replica and sequence number in a ``StampedEvent``.

``job_kinds`` and ``kinds`` define the events, ``memory`` makes some of them from records, ``observing`` is the protocol
that receives them, ``serialization`` their JSON lines. Nothing here knows of files, threads, torch or back ends.
"""

from storymem_dist.events.job_kinds import (
    Event,
    JobFinished,
    JobStarted,
    LayoutChosen,
    ReplicaHelped,
    ReplicaWaited,
    RequestApplied,
    StopRequested,
    StoryboardRejected,
    SystemSampled,
    ThroughputSampled,
    WarningIssued,
    WeightsProgress,
)
from storymem_dist.events.kinds import (
    EVENT_TYPES,
    MEMORY_VERDICTS,
    STAGES,
    LorasUsed,
    MemoryDecided,
    ShotFailed,
    ShotFinished,
    ShotResumed,
    ShotSkipped,
    ShotStarted,
    StageFinished,
    StageStarted,
    StepFinished,
    StoryFinished,
    StoryStarted,
)
from storymem_dist.events.memory import memory_events
from storymem_dist.events.observing import NullObserver, Observer, timed_stage
from storymem_dist.events.serialization import (
    SCHEMA_VERSION,
    StampedEvent,
    event_from_dict,
    event_to_dict,
    json_ready,
    stamped_from_json,
    stamped_to_json,
)

__all__ = [
    "EVENT_TYPES",
    "MEMORY_VERDICTS",
    "SCHEMA_VERSION",
    "STAGES",
    "Event",
    "JobFinished",
    "JobStarted",
    "LayoutChosen",
    "LorasUsed",
    "MemoryDecided",
    "NullObserver",
    "Observer",
    "ReplicaHelped",
    "ReplicaWaited",
    "RequestApplied",
    "ShotFailed",
    "ShotFinished",
    "ShotResumed",
    "ShotSkipped",
    "ShotStarted",
    "StageFinished",
    "StageStarted",
    "StampedEvent",
    "StepFinished",
    "StopRequested",
    "StoryFinished",
    "StoryStarted",
    "StoryboardRejected",
    "SystemSampled",
    "ThroughputSampled",
    "WarningIssued",
    "WeightsProgress",
    "event_from_dict",
    "event_to_dict",
    "json_ready",
    "memory_events",
    "stamped_from_json",
    "stamped_to_json",
    "timed_stage",
]
