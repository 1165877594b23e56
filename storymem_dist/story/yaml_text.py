"""Parses YAML in time that grows with the length of the text, and refuses what would change a prompt silently.

Builds plain data from the events of the YAML parser, one after the other: no aliases, no recursion, no conversion of
long numbers, and every value has its line. In a prompt, all that YAML reads as something else than text is refused.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from storymem_dist.story.json_text import MAX_DIGITS
from storymem_dist.story.problems import Lined, OddValue, Unreadable, describe, plain_key, short
from storymem_dist.story.schema import PROMPT_TEXT_KEYS

MAX_DEPTH = 32
"""Nesting allowed in YAML."""

# libyaml is about thirty times faster than the Python parser.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CONSTRUCTOR = yaml.constructor.SafeConstructor()
_TAG = "tag:yaml.org,2002:"
_QUOTES = "put the prompt in quotes"
_IF_PROMPT = f"if this is a prompt, {_QUOTES}"
_COMMENT = re.compile(r"[ \t]+#[^\r\n]*+")
_TEXTS = ("style", "story_name", "story_overview")
_NUMBERS = ("scene_num", "seed", "duration", "num_frames", "num_inference_steps")
_SHOT_TEXT_KEYS = (*PROMPT_TEXT_KEYS, "negative_prompt")


@dataclass(slots=True)
class YamlDocuments:
    """The documents of a YAML text as plain data, and what its author should know."""

    documents: list[object] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Open:
    """A mapping or list that is not complete. ``key`` is the mapping's key whose value comes next.

    ``holds_shots`` is a list of ``shots``, ``is_shot`` an object in one, or the story's ``defaults``.
    """

    value: Lined | list[object]
    line: int
    name: str = ""
    holds_prompts: bool = False
    is_prompt: bool = False
    holds_shots: bool = False
    is_shot: bool = False
    key: str | None = None

    @property
    def next_name(self) -> str:
        """The key that the next value belongs to: of this mapping, or of the one that holds this list."""
        return (self.key or "") if isinstance(self.value, dict) else self.name


def parse_yaml(text: str) -> YamlDocuments:
    """Return the documents of ``text``. Raises ``Unreadable`` with the line and a cure."""
    builder = _Builder(text)
    try:
        for event in yaml.parse(text, Loader=_Loader):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        raise Unreadable(f"not valid YAML, {_marked(text, error)}") from None
    except yaml.reader.ReaderError as error:
        raise Unreadable(f"not valid YAML, {_character(text, error)}") from None
    return builder.found


class _Builder:
    """Builds documents from parser events. ``open`` are the collections around the next value, outermost first."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.found = YamlDocuments()
        self.open: list[_Open] = []

    def take(self, event: yaml.Event) -> None:
        """Take the next event."""
        match event:
            case yaml.AliasEvent():
                raise Unreadable(
                    f"{_line(event)}YAML aliases (*{short(event.anchor)}) are not allowed; write the value out, or"
                    f" {_IF_PROMPT}"
                )
            case yaml.ScalarEvent():
                self._scalar(event)
            case yaml.CollectionStartEvent():
                self._begin(event)
            case yaml.CollectionEndEvent():
                self._end(self.open.pop())

    def _begin(self, event: yaml.CollectionStartEvent) -> None:
        is_mapping = isinstance(event, yaml.MappingStartEvent)
        if len(self.open) >= MAX_DEPTH:
            raise Unreadable(f"{_line(event)}nested too deeply; a storyboard nests 4 levels")
        self._expect_value(event)
        _check_tag(event, ("map",) if is_mapping else ("seq",))
        name = self._next_name()
        in_prompt = self._in_prompt()
        if in_prompt and (self.open[-1].is_shot or (not is_mapping and self.open[-1].holds_prompts)):
            raise Unreadable(f"{_line(event)}the prompt is {'an object' if is_mapping else 'a list'}; {_QUOTES}")
        self.open.append(
            _Open(
                value=Lined() if is_mapping else [],
                line=_line_number(event),
                name=name,
                holds_prompts=not is_mapping and not in_prompt and _is_prompts(name),
                is_prompt=is_mapping and in_prompt,
                holds_shots=not is_mapping and name == "shots",
                is_shot=is_mapping and self._begins_shot(name),
            )
        )

    def _end(self, closed: _Open) -> None:
        value = closed.value
        if closed.is_prompt and isinstance(value, dict) and not any(key in value for key in PROMPT_TEXT_KEYS):
            raise Unreadable(f"line {closed.line}: the prompt is {describe(value)}; {_QUOTES}")
        self._add(value)

    def _scalar(self, event: yaml.ScalarEvent) -> None:
        within = self.open[-1] if self.open else None
        if within is not None and isinstance(within.value, dict) and within.key is None:
            if event.value in within.value:
                raise Unreadable(
                    f"{_line(event)}the key {short(event.value)!r} is written twice in one mapping; keep one of them"
                )
            within.key = event.value
            within.value.lines[event.value] = _line_number(event)
            return
        is_prompt = self._in_prompt() or (isinstance(within, _Open) and _is_prompts(within.key or ""))
        if is_prompt and event.anchor is not None:
            raise Unreadable(f"{_line(event)}YAML takes &{short(event.anchor)} out of the prompt; {_QUOTES}")
        if is_prompt and event.tag is not None and event.tag != _TAG + "str":
            raise Unreadable(f"{_line(event)}YAML takes {short(event.tag)} out of the prompt; {_QUOTES}")
        value = _value(event)
        if is_prompt and not isinstance(value, str) and not (self._next_name() == "negative_prompt" and value is None):
            raise Unreadable(f"{_line(event)}the prompt is {describe(value)}; {_QUOTES}")
        is_prompt = is_prompt or (within is not None and within.holds_shots and isinstance(value, str))
        is_object = within is not None and (within.is_prompt or within.is_shot)
        is_rest = is_object and value is None and within is not None and " " in (within.key or "")
        if is_rest and within and any(key in within.value for key in PROMPT_TEXT_KEYS):  # "{prompt: A man, in fog}"
            raise Unreadable(f"{_line(event)}YAML takes {short(within.key)!r} out of the prompt; {_QUOTES}")
        if event.style in (None, "") and (comment := _COMMENT.match(self.text, _end(event).index)):
            self._comment(event, short(comment[0].strip()), is_prompt, is_text=isinstance(value, str))
        if self._next_name() in _NUMBERS and isinstance(value, int) and event.value.lstrip("+-0") != str(abs(value)):
            self._number(event, value)
        self._add(value)

    def _comment(self, event: yaml.ScalarEvent, comment: str, is_prompt: bool, *, is_text: bool) -> None:
        line = _end(event).line + 1
        if is_prompt:
            raise Unreadable(
                f"line {line}: YAML takes {comment!r} for a comment, not for a part of the prompt; {_QUOTES}"
            )
        if (is_text or self._next_name() in _TEXTS) and comment[1:2] not in ("", " ", "\t", "#"):
            self.found.notes.append(
                f"line {line}: YAML takes {comment!r} for a comment; put the text of {self._next_name()} in quotes"
            )

    def _number(self, event: yaml.ScalarEvent, value: int) -> None:
        if value and not isinstance(value, bool):
            self.found.notes.append(f"{_line(event)}YAML reads {short(event.value)!r} as the number {value}")

    def _expect_value(self, event: yaml.Event) -> None:
        if self.open and isinstance(self.open[-1].value, dict) and self.open[-1].key is None:
            raise Unreadable(f"{_line(event)}a key is a list or an object; write text before the colon; {_IF_PROMPT}")

    def _in_prompt(self) -> bool:
        """Whether the next value is a prompt, or the text of a prompt that is written as an object."""
        if not self.open:
            return False
        within = self.open[-1]
        is_text = within.is_shot and within.key in _SHOT_TEXT_KEYS
        return within.holds_prompts or is_text or (within.is_prompt and within.key in PROMPT_TEXT_KEYS)

    def _begins_shot(self, name: str) -> bool:
        """Whether a mapping that begins under the key ``name`` is a shot, or what a story says for all of them."""
        return bool(self.open) and (
            self.open[-1].holds_shots or (name == "defaults" and not self.open[-1].holds_prompts)
        )

    def _next_name(self) -> str:
        return self.open[-1].next_name if self.open else ""

    def _add(self, value: object) -> None:
        if not self.open:
            self.found.documents.append(value)
            return
        within = self.open[-1]
        if isinstance(within.value, list):
            within.value.append(value)
        else:
            assert within.key is not None, "the parser sends a key before each value"
            within.value[within.key] = value
            within.key = None


def _is_prompts(key: str) -> bool:
    return plain_key(key) == "videoprompts"


def _value(event: yaml.ScalarEvent) -> object:
    """What a scalar means: text, a number, a truth value, None, or an ``OddValue``."""
    _check_tag(event, ("str", "int", "float", "bool", "null", "timestamp"))
    text: str = event.value
    if event.tag is not None and event.tag != "!":
        kind = event.tag.removeprefix(_TAG)
    else:
        kind = _kind(text) if event.implicit[0] and event.tag is None else "str"
    if kind in ("str", "merge", "value"):
        return text
    if kind == "null":
        return None
    if kind == "timestamp":
        return OddValue(f"the date {short(text)!r}")
    if len(text) > MAX_DIGITS:
        return OddValue(f"a number of {len(text)} characters")
    try:
        return getattr(_CONSTRUCTOR, f"construct_yaml_{kind}")(yaml.ScalarNode(_TAG + kind, text))
    except (ValueError, KeyError, IndexError, OverflowError):  # a tag that its text contradicts, such as "!!int x"
        raise Unreadable(f"{_line(event)}{short(text)!r} is no {kind}; {_IF_PROMPT}") from None


def _kind(text: str) -> str:
    """The kind that YAML gives to text without quotes."""
    for tag, pattern in _candidates(text[:1]):
        if pattern.match(text):
            return tag.removeprefix(_TAG)
    return "str"


def _candidates(first: str) -> Iterator[tuple[str, re.Pattern[str]]]:
    resolvers = _Loader.yaml_implicit_resolvers
    yield from resolvers.get(first, ())
    yield from resolvers.get(None, ())


def _check_tag(event: yaml.ScalarEvent | yaml.CollectionStartEvent, allowed: tuple[str, ...]) -> None:
    tag = event.tag
    if tag is not None and tag != "!" and tag.removeprefix(_TAG) not in allowed:
        raise Unreadable(f"{_line(event)}the tag {short(tag)!r} is not allowed; remove it, or {_IF_PROMPT}")


def _marked(text: str, error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    problem = short(" ".join(str(error.problem or error.context).split()))
    is_tab = mark is not None and text[mark.index : mark.index + 1] == "\t"
    cure = f"indent with spaces, or {_IF_PROMPT}" if is_tab else _IF_PROMPT
    if "escape" in problem:
        cure = "between double quotes, write \\\\ for a backslash, and characters themselves instead of codes"
    return f"{where}{problem}; {cure}"


def _character(text: str, error: yaml.reader.ReaderError) -> str:
    code = error.character if isinstance(error.character, int) else ord(str(error.character)[:1] or "\0")
    line = text.count("\n", 0, error.position) + 1
    return f"line {line}: the control character U+{code:04X}; remove it"


def _line(event: yaml.Event) -> str:
    return f"line {_line_number(event)}: "


def _line_number(event: yaml.Event) -> int:
    assert event.start_mark is not None, "the parser marks each event"
    return event.start_mark.line + 1


def _end(event: yaml.Event) -> Any:
    return event.end_mark
