"""The result of a check: one line of the doctor's page. Knows no checks."""

from dataclasses import dataclass

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """``problem`` stops a render, ``warning`` slows it down or may stop it; ``fix`` is the remedy for either."""

    area: str
    name: str
    state: str
    value: str
    fix: str = ""


def ok(area: str, name: str, value: object) -> Finding:
    """Return a finding that needs no action."""
    return Finding(area=area, name=name, state=OK, value=str(value))


def warning(area: str, name: str, value: object, fix: str) -> Finding:
    """Return a finding about something that works, but slowly or not always."""
    return Finding(area=area, name=name, state=WARNING, value=str(value), fix=fix)


def problem(area: str, name: str, value: object, fix: str) -> Finding:
    """Return a finding that makes a render fail."""
    return Finding(area=area, name=name, state=PROBLEM, value=str(value), fix=fix)
