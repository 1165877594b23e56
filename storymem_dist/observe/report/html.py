"""Small pieces of HTML. All text that comes from a run goes through ``esc``. Knows nothing of runs."""

import html
import re
from collections.abc import Iterable, Mapping, Sequence

from storymem_dist.observe.run.format import DASH


def esc(value: object) -> str:
    """Return ``value`` as text that is safe in HTML, in attributes too."""
    return html.escape(str(value), quote=True)


def anchor(*names: str) -> str:
    """Return an id that no other names get and no fixed id of the page has; also the fragment of its address."""
    parts = [re.sub(r"[^A-Za-z0-9_.-]", lambda found: f"~{ord(found[0]):x}~", name) for name in names]
    return ":".join(parts)


def hole(tag: str, name: str, attributes: str = "") -> str:
    """Return an empty element that the part ``name`` fills; ``attributes`` are HTML."""
    return f'<{tag}{" " * bool(attributes)}{attributes} data-part="{esc(name)}"></{tag}>'


def filled(parts: Mapping[str, str], text: str) -> str:
    """Return ``text`` with the holes of all ``parts`` filled, holes in holes too. No part may be in itself."""

    def fill(found: re.Match[str]) -> str:
        inside = parts.get(html.unescape(found["name"]))
        return found[0] if inside is None else f"{found['start']}{_HOLE.sub(fill, inside)}</{found['tag']}>"

    return _HOLE.sub(fill, text)


_HOLE = re.compile(r'(?P<start><(?P<tag>[a-z]+)(?: [^<>]*)? data-part="(?P<name>[^"<>]*)">)</(?P=tag)>')


def table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numeric: Iterable[int] = (),
    compact: bool = False,
) -> str:
    """Return a table that scrolls sideways where it must. Cells are HTML; the columns in ``numeric`` align right."""
    right = set(numeric)

    def cells(kind: str, values: Sequence[str]) -> str:
        parts = []
        for index, value in enumerate(values):
            name = ' class="num"' if index in right else ""
            if kind == "th":
                parts.append(f'<th scope="col"{name}>{value}</th>')
            elif index == 0:
                parts.append(f'<th scope="row"{name}>{value or DASH}</th>')
            else:
                parts.append(f"<td{name}>{value or DASH}</td>")
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(cells("td", row) for row in rows)
    name = "scroll compact" if compact else "scroll"
    return (
        f'<div class="{name}" role="region" aria-label="{esc(caption)}" tabindex="0"><table>'
        f'<caption class="hidden">{esc(caption)}</caption>'
        f"<thead>{cells('th', heads)}</thead><tbody>{body}</tbody></table></div>"
    )


def details(summary: str, body: str) -> str:
    """Return a collapsed part that a click opens."""
    return f"<details><summary>{esc(summary)}</summary>{body}</details>"


def tile(label: str, value: str, note: str = "") -> str:
    """Return one key figure."""
    small = f'<span class="note">{esc(note)}</span>' if note else ""
    return f'<div class="tile"><dt>{esc(label)}</dt><dd>{esc(value)}{small}</dd></div>'


def chip(text: str, kind: str) -> str:
    """Return a status label; ``kind`` chooses its colour (``good``, ``bad``, ``busy``, ``calm``)."""
    return f'<span class="chip {kind}">{esc(text)}</span>'


def document(*, title: str, style: str, scripts: Iterable[str], body: str, connect: bool = False) -> str:
    """Return a whole page. Its policy allows only what is in the page and files next to it.

    ``connect`` also allows its scripts to ask the server that the page came from.
    """
    policy = (
        "default-src 'none'; img-src 'self' data: file:; media-src 'self' data: file:; "
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    ) + "; connect-src 'self'" * connect
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{esc(title)}</title><style>{style}</style></head>\n<body>\n{body}\n"
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body></html>\n"
    )
