"""What the buttons of a live page ask: a small JSON object, checked and published like a request of ``storymem-queue``.

Knows nothing of HTTP.
"""

from typing import Any

from storymem_dist.artifacts.requests import Request
from storymem_dist.errors import ConfigError, shown
from storymem_dist.files import parse_json
from storymem_dist.observe.live.sources import LiveRun

MAX_BODY_BYTES = 16 * 1024
"""Largest request: a story id and the ids of a thousand shots."""

ACTIONS = ("pause", "resume", "skip", "unskip", "first", "rerender", "stop")
_KEYS = {
    "pause": set(),
    "resume": set(),
    "skip": {"story_id"},
    "unskip": {"story_id"},
    "first": {"story_id"},
    "rerender": {"story_id", "shots", "only"},
    "stop": {"now"},
}


def parse_request(data: bytes) -> Request:
    """Return the request that a page sent. Raises ``ConfigError`` that says what is wrong with it."""
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ConfigError(f"this is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError("a request is a JSON object with an action")
    action = value.pop("action", None)
    if not isinstance(action, str) or action not in ACTIONS:
        raise ConfigError(f"action={shown(action)} is not allowed; use one of: {', '.join(ACTIONS)}")
    if unknown := sorted(value.keys() - _KEYS[action]):
        raise ConfigError(f"{action} has no {shown(unknown[0])}")
    shots = value.get("shots", [])
    if not isinstance(shots, list) or not all(isinstance(shot, str) for shot in shots):
        raise ConfigError("shots is a list of shot ids")
    return Request(
        action=action,
        via="live page",
        story_id=_typed(value, "story_id", ""),
        shots=tuple(shots),
        only=_typed(value, "only", False),
        now=_typed(value, "now", False),
    )


def publish(run: LiveRun, request: Request) -> dict[str, Any]:
    """Publish a request as ``storymem-queue`` does; return its number (None: it changes nothing) and what it does.

    Raises ``StoryMemError`` for one that can have no effect, and where it cannot be written.
    """
    from storymem_dist.observe.queue.asking import ask  # loads torch: not for a page that only shows

    (answer,) = ask(run.root, [request])
    return {"number": None if answer.published is None else answer.published.number, "text": answer.text}


def _typed(value: dict[str, Any], key: str, default: Any) -> Any:
    found = value.get(key, default)
    if type(found) is not type(default):
        raise ConfigError(
            f"{key}={shown(found)} is not allowed; it is a {'text' if default == '' else 'true or false'}"
        )
    return found
