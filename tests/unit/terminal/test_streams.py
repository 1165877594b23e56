"""Text of any origin on streams of any kind: what is written, and that writing never raises."""

import io
import os
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.live import Live
from rich.table import Table
from rich.text import Text

from storymem_dist.terminal import streams
from storymem_dist.terminal.rich_console import SafeConsole, escape_streams
from storymem_dist.terminal.streams import SafeStream, print_error, print_line, print_on
from storymem_dist.terminal.text import printable, printable_lines


@given(st.text(st.characters(), max_size=50))
def test_what_is_printable_has_no_character_that_acts(text: str) -> None:
    shown = printable(text)
    assert not [one for one in shown if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp")]
    assert not set(shown) & set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200b\u200e\u200f\ufeff\xad")
    assert printable(shown) == shown
    assert printable_lines(text).replace("\n", "\\n").replace("\t", "\\t") == shown


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "café",
        "日本語",
        "❤️ tail",
        "a b",
        "C:\\x",
        "עברית",
        "ไทย",
        "é",
        "کتاب‌خانه",
        "क्‍ष",
        "👩🏽‍🚀",
        "❤️‍🔥",
        "🐈‍⬛",
    ],
)
def test_words_of_people_stay_as_they_are(text: str) -> None:
    assert printable(text) == text


@pytest.mark.parametrize("text", ["a\u200db", "\u200cک", "ک\u200c", "ک\u200c\u200cک", "क\u200d\u061cक", "日\u200d本"])
def test_joiners_that_join_nothing_are_shown(text: str) -> None:
    assert not set(printable(text)) & set("\u200c\u200d")


class Broken(io.StringIO):
    """A stream whose every use fails."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize(
    "error", [OSError(28, "full"), BrokenPipeError(32, "gone"), ValueError("closed file"), OSError(5, "no terminal")]
)
def test_a_stream_that_fails_is_nobodys_problem(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(error))
    monkeypatch.setattr(sys, "stderr", None)
    print_line("x")
    print_error("x")
    print_on(Broken(error), "x")


def test_an_encoding_without_the_character_shows_its_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    print_line("é")
    assert ascii_only.buffer.getvalue() == b"\\xe9\n"


def test_text_after_a_full_disk_is_written_again(tmp_path: Path) -> None:
    """A log on a disk that was full for a moment goes on; nothing that was lost blocks what follows."""
    full, file = os.open("/dev/full", os.O_WRONLY), os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    place = os.dup(full)
    stream = SafeStream(streams._Descriptor(place), "utf-8", "backslashreplace", "\n", line_buffering=True)  # type: ignore[arg-type]
    stream.write("lost\n")
    os.dup2(file, place)
    stream.write("kept\n")
    stream.close()
    assert (tmp_path / "log").read_bytes() == b"kept\n"
    for descriptor in (full, file, place):
        os.close(descriptor)


def console_on_a_terminal() -> tuple[SafeConsole, io.StringIO]:
    written = io.StringIO()
    return SafeConsole(written, force_terminal=True, width=60, color_system="standard"), written


def test_a_table_keeps_the_consoles_colours_and_shows_those_of_a_name() -> None:
    console, written = console_on_a_terminal()
    table = Table(box=None)
    table.add_row(Text(printable("a\x1b[31mb\u202e"), style="green"), Text("forgotten\x1b[31m"))
    console.print(table)
    assert "\x1b[32ma\\x1b[31mb\\u202e" in written.getvalue()
    assert "\x1b[31m" not in written.getvalue() and "forgotten\\x1b" in written.getvalue()


def test_a_live_view_shows_what_others_print_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    console, written = console_on_a_terminal()
    before = io.StringIO()
    monkeypatch.setattr(sys, "stderr", before)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    live = Live(console=console, auto_refresh=False, redirect_stdout=True, redirect_stderr=True)
    live.start()
    escape_streams()
    print_error("name\x1b[2J\rnext")
    live.stop()
    assert sys.stderr is before
    assert "name\\x1b[2J\\rnext" in written.getvalue() and "\x1b[2J" not in written.getvalue()
