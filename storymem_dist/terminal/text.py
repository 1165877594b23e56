"""Shows characters that a terminal would obey, hide or refuse as escapes, such as ``\\x1b`` or ``\\u202e``."""

import re

_UNPRINTABLE = (
    "\x00-\x1f\x7f-\x9f"  # control characters: C0, DEL, C1
    "\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"  # without a width
    "\u200b-\u200f\u2028-\u202e\u2060-\u206f"  # zero width, line ends, changes of direction
    "\u3164\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb"
    "\ud800-\udfff"  # bytes of a file name that are not UTF-8
    "\ufdd0-\ufdef\ufffe\uffff\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_JOINED = (  # what zero-width joiners stand between: letters of Persian, Hindi and others, and emoji
    "\u0600-\u061b\u061d-\u115e\u1161-\u17b3\u17b6-\u180a\u1810-\u1fff\u2190-\u2bff\ufe0f\U0001f000-\U0001faff"
)
_NO_JOINER = f"(?!(?<=[{_JOINED}])[\u200c\u200d][{_JOINED}])"
_IN_A_LINE = re.compile(f"{_NO_JOINER}[{_UNPRINTABLE}]")
_IN_A_TEXT = re.compile(f"{_NO_JOINER}(?![\n\t])[{_UNPRINTABLE}]")


def printable(text: object) -> str:
    """Return ``str(text)`` as one line: every character without a picture of its own becomes its escape.

    Zero-width joiners stay between characters that they join; elsewhere they would only make two names look the same.
    """
    return _IN_A_LINE.sub(_escaped, str(text))


def printable_lines(text: str) -> str:
    """Return ``text`` with the same escapes, except that line breaks (``\\n``) and tabs stay."""
    return _IN_A_TEXT.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
