"""Patterns of names: captures, globs, and regular expressions with linear time. Pure.

A name consists of segments between dots. Each pattern becomes an expression of RE2, whose time grows with the length of
the name and not with the number of possible matches. Parsed patterns are cached, because configs check them and rules
use them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import attrs
import re2

from noether_init_core import messages
from noether_init_core.errors import ConfigError

#: Name of the capture for everything below a trailing dot.
BELOW = "_below"

_CAPTURE = re.compile(r"<([^<>]*)>")
# A dot between segments, not one within <x..>.
_DOT = re.compile(r"\.(?![^<>]*>)")
_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_SEGMENTS = r"[^.]+(?:\.[^.]+)*"
# A name may hold a line break, where a dot would stop without this flag.
_FLAGS = "(?s)"
# difflib takes time by the product of the lengths.
_LONGEST = 256
_NUMBER = re.compile(r"\d+")


@attrs.frozen
class _Segment:
    """One segment of a pattern: literal text around captures; ``many`` marks a capture of whole segments."""

    literals: tuple[str, ...]
    captures: tuple[str, ...] = ()
    many: bool = False

    def written(self, literal: Callable[[str], str], capture: str) -> str:
        """The segment as text: literal parts through ``literal``, and ``capture`` formatted with the name of each."""
        text = literal(self.literals[0])
        for name, rest in zip(self.captures, self.literals[1:], strict=True):
            text += capture.format(name) + literal(rest)
        return text


@attrs.frozen
class NamePattern:
    """A pattern of names: with captures (``blocks.<i>.norm<n>.``), a regular expression, or a glob.

    Attributes:
        text: The pattern as written.
        expression: The equivalent expression for RE2.
        segments: Its segments; empty for a regular expression and a glob.
        below: Whether it ends in a dot, which means every name below.
        captures: Names of its captures; empty for a glob.
    """

    text: str
    expression: str
    segments: tuple[_Segment, ...] = ()
    below: bool = False
    captures: frozenset[str] = frozenset()
    # re if each segment has at most one capture, which matches in one way only, and is faster; else RE2
    _matcher: Any = attrs.field(default=None, eq=False, repr=False)
    # for the operator %, which is faster than str.format: 100,000 names in a few hundredths of a second
    _template: str = attrs.field(default="", eq=False, repr=False)

    def match(self, name: str) -> dict[str, str] | None:
        """Capture -> its text in ``name``; None if the pattern does not match."""
        found = self._matcher.fullmatch(name) if _is_encodable(name) else None
        # a group outside the matched alternative has None
        return None if found is None else {key: value or "" for key, value in found.groupdict().items()}

    def fill(self, captures: Mapping[str, str]) -> str:
        """The name with each capture replaced by its text."""
        return self._template % captures


@lru_cache(maxsize=4096)
def parse_pattern(text: str) -> NamePattern:
    """Parse a pattern with captures. Raises ``ValueError`` with the reason."""
    if not text or text == ".":
        raise ValueError("is empty; a name or a pattern was expected")
    if "*" in text:
        raise ValueError(
            f"{text!r} has a *, allowed in drop, keep_model and only; write <x> for part of a segment, "
            "<x..> for whole segments"
        )
    below = text.endswith(".")
    segments = tuple(_segment(segment, text) for segment in _DOT.split(text[:-1] if below else text))
    captures = [capture for segment in segments for capture in segment.captures]
    twice = sorted({capture for capture in captures if captures.count(capture) > 1})
    if twice:
        raise ValueError(f"{text!r} captures <{twice[0]}> twice")
    expressions = [
        segment.written(re2.escape, f"(?P<{{}}>{_SEGMENTS})" if segment.many else "(?P<{}>[^.]+)")
        for segment in segments
    ]
    templates = [segment.written(lambda literal: literal.replace("%", "%%"), "%({})s") for segment in segments]
    if below:
        expressions.append(f"(?P<{BELOW}>{_SEGMENTS})")
        templates.append(f"%({BELOW})s")
    expression = _FLAGS + r"\.".join(expressions)
    is_plain = all(not segment.many and len(segment.captures) < 2 for segment in segments)
    matcher = re.compile(expression) if is_plain else re2.compile(expression)
    return NamePattern(text, expression, segments, below, frozenset(captures), matcher, ".".join(templates))


def _segment(segment: str, text: str) -> _Segment:
    if not segment:
        raise ValueError(f"{text!r} has an empty segment")
    parts = _CAPTURE.split(segment)
    literals, captures = parts[::2], parts[1::2]
    if any("<" in literal or ">" in literal for literal in literals):
        raise ValueError(f"{text!r} has a < or > without its counterpart in one segment")
    many = [capture for capture in captures if capture.endswith("..")]
    if many and (len(captures) > 1 or any(literals)):
        raise ValueError(f"{text!r}: <{many[0]}> matches whole segments, so it must be a segment of its own")
    names = [capture.removesuffix("..") for capture in captures]
    for name in names:
        if not _IDENTIFIER.fullmatch(name):
            raise ValueError(
                f"{text!r}: <{name}> is not the name of a capture; write <x> for a part of a segment, "
                "<x..> for whole segments"
            )
    if any(not literal for literal in literals[1:-1]):
        raise ValueError(f"{text!r} has two captures without text between them, so their match is undefined")
    return _Segment(tuple(literals), tuple(names), bool(many))


def repaired(pattern: NamePattern, name: str) -> str | None:
    """The pattern that was probably intended: segments that do not fit ``name`` are replaced by those of ``name``."""
    mine = list(pattern.segments)
    theirs = name.split(".")
    surplus = len(theirs) - len(mine) - (1 if pattern.below else 0)
    if not mine or any(segment.many for segment in mine) or len(theirs) < len(mine):
        return None
    wholes = [segment.written(str, "<{}>") for segment in mine]
    fitted = [their if not one.captures else whole for one, whole, their in zip(mine, wholes, theirs, strict=False)]
    for segments in ([*theirs[: max(surplus, 0)], *wholes], fitted):
        text = ".".join(segments) + ("." if pattern.below else "")
        if text != pattern.text and parse_pattern(text).match(name) is not None:
            return text
    return None


@lru_cache(maxsize=4096)
def parse_regex(text: str) -> NamePattern:
    """Parse a regular expression of RE2 that matches whole names. Raises ``ValueError`` with the reason."""
    if not text:
        raise ValueError("is empty; a regular expression was expected")
    if any(ord(character) < 0x20 for character in text):
        raise ValueError(
            f"{text!r} holds a control character: in double quotes, YAML takes \\b and \\t for one. Use single quotes"
        )
    expression, options = _FLAGS + f"(?:{text})", re2.Options()
    options.log_errors = False
    try:
        compiled = re2.compile(expression, options=options)
    except re2.error as error:
        reason = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise ValueError(
            f"{text!r} is not a regular expression of RE2: {reason}. RE2 has no backreferences and no look-around"
        ) from error
    return NamePattern(text, expression, captures=frozenset(compiled.groupindex), matcher=compiled)


@lru_cache(maxsize=4096)
def parse_glob(text: str) -> NamePattern:
    """Parse a glob for names, whose segments are separated by dots.

    ``*`` matches any text within one segment. ``**.`` matches any number of whole segments, also none; a final ``**``
    matches at least one. A trailing dot matches every name below, but not the name itself.

    Raises ``ValueError`` with the reason.
    """
    if not text or text == ".":
        raise ValueError("is empty; a name or a glob was expected")
    if "<" in text or ">" in text:
        raise ValueError(f"{text!r} has a capture, allowed in from and to; write * for part of a segment")
    below = text.endswith(".")
    segments = (text[:-1] if below else text).split(".")
    if "" in segments:
        raise ValueError(f"{text!r} has an empty segment")
    shown = ""
    for number, segment in enumerate(segments):
        is_last = number == len(segments) - 1
        if segment == "**":
            shown += f"(?:{_SEGMENTS})" if is_last else r"(?:[^.]+\.)*"
            shown += r"\." if is_last and below else ""
        elif "**" in segment:
            raise ValueError(f"{text!r}: ** matches whole segments, so it must be a segment of its own")
        else:
            shown += "[^.]*".join(re2.escape(part) for part in segment.split("*"))
            shown += "" if is_last and not below else r"\."
    if below:
        shown += _SEGMENTS
    return NamePattern(text, _FLAGS + shown)


class PatternSet:
    """Many expressions as one RE2 set: finds which of them match a name."""

    def __init__(self, expressions: Iterable[str]) -> None:
        self._set = re2.Set.FullMatchSet()
        # The last one matches every name: without memory RE2 reports no match, which this one makes visible.
        for number, expression in enumerate((*expressions, "(?s).*")):
            self._set.Add(expression)
            self._count = number
        try:
            self._set.Compile()
        except re2.error as error:
            raise ConfigError(
                f"the {self._count} patterns need more memory together than RE2 takes. Next: shorter patterns, above "
                "all without counted repetitions such as {400}"
            ) from error

    def matching(self, name: str) -> Sequence[int]:
        """The numbers of the expressions that match, in order. Raises ``MemoryError`` if RE2 runs out of memory."""
        if not self._count or not _is_encodable(name):
            return ()
        found = sorted(self._set.Match(name))
        if not found or found.pop() != self._count:
            raise MemoryError(f"RE2 needs more memory for {self._count} patterns at once")
        return found or ()


class NameGlobs(PatternSet):
    """Globs as in ``transforms``: ``*`` is part of a segment, ``**`` any segments, a trailing dot every name below.

    ``matching(name)`` returns the numbers of the globs that match, from 0; its time hardly depends on their number.

    Raises ``ValueError`` for a text that is not a glob, so that pydantic reports its place in the config.
    """

    def __init__(self, globs: Iterable[str]) -> None:
        super().__init__(parse_glob(glob).expression for glob in globs)

    @staticmethod
    def near(name: str, others: Iterable[str]) -> list[str]:
        """Up to three of ``others`` that are similar to ``name``, for messages."""
        return near(name, list(others))


def lacks_dot(text: str, names: Iterable[str]) -> bool:
    """Whether ``text`` would match one of ``names`` with a trailing dot, which means every name below."""
    if text.endswith("."):
        return False
    try:
        parsed = parse_pattern(f"{text}.") if "<" in text else parse_glob(f"{text}.")
    except ValueError:
        return False
    return any(map(PatternSet([parsed.expression]).matching, names))


def _is_encodable(name: str) -> bool:
    """Whether the name is valid UTF-8; a file may have names with lone surrogates, which RE2 cannot match."""
    if name.isascii():
        return True
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def near(name: str, others: Sequence[str], most: int = 3) -> list[str]:
    """Up to ``most`` of ``others`` that are similar to ``name``; those with the same last segment come first.

    Of names that differ in numbers only, such as those of layers, the first one represents all.
    """
    folded: dict[str, str] = {}
    for other in others:
        if len(other) <= _LONGEST:
            folded.setdefault(_NUMBER.sub("#", other), other)
    known = list(folded.values())
    leaf = name.rpartition(".")[2]
    same = [other for other in known if other.rpartition(".")[2] == leaf]
    return messages.near(name, same, most, cutoff=0.5) or messages.near(name, known, most, cutoff=0.5)
