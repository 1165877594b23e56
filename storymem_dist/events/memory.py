"""Turns the memory part of a shot's record into events."""

from collections.abc import Mapping
from typing import Any

from storymem_dist.events.kinds import MemoryDecided


def memory_events(story_id: str, shot_id: str, shot_index: int, memory: Mapping[str, Any]) -> tuple[MemoryDecided, ...]:
    """Return the decisions in the ``memory`` part of a shot's record (``recalled`` and ``decisions``), as events.

    ``recalled`` lists the decisions about keyframes of the bank, ``decisions`` those about frames of the new clip, with
    the field names of ``memory.bank.RecallDecision`` and ``memory.keyframes.FrameDecision``.
    """
    recalled = [
        MemoryDecided(
            story_id=story_id,
            shot_id=shot_id,
            verdict="evicted" if decision["verdict"] == "evicted" else "recalled",
            source_shot_index=decision["shot_index"],
            source_frame_index=decision["frame_index"],
            slot=decision["slot"],
            position=decision.get("position"),
            why=decision.get("why", ""),
        )
        for decision in memory.get("recalled", ())
    ]
    chosen = [
        MemoryDecided(
            story_id=story_id,
            shot_id=shot_id,
            verdict=decision["verdict"],
            source_shot_index=shot_index,
            source_frame_index=decision["frame_index"],
            slot=decision.get("slot"),
            similarity=decision.get("similarity"),
            bank_similarity=decision.get("bank_similarity"),
            against=decision.get("against"),
            quality=decision.get("quality"),
            why=decision.get("why", ""),
        )
        for decision in memory.get("decisions", ())
    ]
    return (*recalled, *chosen)
