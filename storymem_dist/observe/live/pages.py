"""A page of the report as a server sends it: the same page, and a script that keeps it up to date."""

import base64
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

from storymem_dist.observe.live.hub import Hub, Place
from storymem_dist.observe.live.listing import RUNS, listing_page
from storymem_dist.observe.live.stream import KEEP_ALIVE_SECONDS
from storymem_dist.observe.report.page import INDEX, read_asset, run_page


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A page as HTML. ``policy``: its content security policy, which allows the page's two scripts and no other."""

    text: str
    policy: str


def document_of(hub: Hub, place: Place, *, control: bool) -> Document:
    """Return a page, at most a second old; in the reader's thread. Raises ``KeyError`` where there is none."""
    name, page = place
    newest = hub.look(place)
    values = {
        **newest.news,
        "page": page,
        "base": "" if page == INDEX else "../",
        "control": control and name != RUNS,
        "aliveSeconds": KEEP_ALIVE_SECONDS,
        "style": _asset("live.css"),
    }
    data = json.dumps(values).replace("<", "\\u003c")
    script = f'"use strict";\nconst storymemLive = {data};\n{_asset("live.js")}'
    if name == RUNS:
        text = listing_page(newest.parts, script)
    else:
        run = hub.run(name)
        text = run_page(run.view, run.assets_of(page), page, parts=newest.parts, script=script, connect=True)
    return Document(text=text, policy=_policy(read_asset("script.js"), script))


def _policy(*scripts: str) -> str:
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src 'self' data:; "
        "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
