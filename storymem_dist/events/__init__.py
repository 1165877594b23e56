"""What happens during a render, as typed values: the one vocabulary between the code that renders and all that watches.

Rendering code makes an event and hands it to an ``Observer``. It fills in what it knows and nothing else: wall time,
writer, replica and sequence number are stamped by the fan-out (``observe/observers.py``) into a ``StampedEvent``.

``kinds`` holds the events, ``observing`` the protocol that receives them, ``serialization`` their JSON lines. Nothing
here knows of files, threads, torch or back ends.
"""

from storymem_dist.events.kinds import (
    EVENT_TYPES,
    MEMORY_VERDICTS,
    STAGES,
    Event,
    JobFinished,
    JobStarted,
    MemoryDecided,
    ReplicaWaited,
    ShotFailed,
    ShotFinished,
    ShotResumed,
    ShotSkipped,
    ShotStarted,
    StageFinished,
    StageStarted,
    StepFinished,
    StopRequested,
    StoryboardRejected,
    StoryFinished,
    StoryStarted,
    SystemSampled,
    ThroughputSampled,
    WarningIssued,
    WeightsProgress,
    memory_events,
)
from storymem_dist.events.observing import NullObserver, Observer, timed_stage
from storymem_dist.events.serialization import (
    SCHEMA_VERSION,
    StampedEvent,
    event_from_dict,
    event_to_dict,
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
    "MemoryDecided",
    "NullObserver",
    "Observer",
    "ReplicaWaited",
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
    "memory_events",
    "stamped_from_json",
    "stamped_to_json",
    "timed_stage",
]
