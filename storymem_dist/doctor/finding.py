"""What a check found: one line of the doctor's page."""

from dataclasses import dataclass

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """``problem`` stops a render, ``warning`` slows it down or may stop it; ``fix`` says what to do about either."""

    area: str
    name: str
    state: str
    value: str
    fix: str = ""


def ok(area: str, name: str, value: object) -> Finding:
    """Nothing to do."""
    return Finding(area=area, name=name, state=OK, value=str(value))


def warning(area: str, name: str, value: object, fix: str) -> Finding:
    """Works, but not as well as it could, or not always."""
    return Finding(area=area, name=name, state=WARNING, value=str(value), fix=fix)


def problem(area: str, name: str, value: object, fix: str) -> Finding:
    """Rendering would fail."""
    return Finding(area=area, name=name, state=PROBLEM, value=str(value), fix=fix)
