"""The part of the report that shows which layout a plan chose, and why. Knows events and HTML."""

import time
from collections.abc import Sequence

import storymem_dist.events as ev
from storymem_dist.observe.report.html import details, esc, table
from storymem_dist.observe.run import format as fmt


def chosen(choices: Sequence[tuple[float, ev.LayoutChosen]]) -> str:
    """Return the layouts that were chosen, newest first; empty where none was."""
    return "".join(_one(when, event) for when, event in sorted(choices, key=lambda one: -one[0]))


def _one(when: float, event: ev.LayoutChosen) -> str:
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
    words = f"{event.layout}, weights {event.weights}, experts {event.experts}"
    words += ", compiled" if event.compiled else ""
    why = "".join(f"<li>{esc(reason)}</li>" for reason in event.reasons)
    rows = [
        ("Per step", esc(fmt.step_time(event.seconds_per_step))),
        ("Per shot", esc(fmt.duration(event.seconds_per_shot))),
        ("All shots", esc(fmt.duration(event.total_seconds))),
        *((f"Memory: {esc(part.replace('_', ' '))}", esc(fmt.gib(gib))) for part, gib in event.memory_gib.items()),
    ]
    others = "".join(f"<li>{esc(line)}</li>" for line in event.considered)
    return (
        f"<h3>Layout chosen at {esc(moment)}</h3><p>{esc(words)}</p>"
        + (f"<ul>{why}</ul>" if why else "")
        + table("Predicted", ("predicted", "value"), rows, compact=True)
        + (details("Other layouts", f"<ul>{others}</ul>") if others else "")
    )
