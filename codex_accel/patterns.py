"""Regular expressions of bounded length that run in linear time and can say "not yet".

Rule: an answer about a beginning of a text is an answer about the text. A pattern is written in Python's syntax, read
by Python's parser, and run by RE2, whose time grows linearly with the text whatever the pattern. What cannot run there
(look-around, back-references, possessive repeats) or has no longest match is refused. From the same tree a second
expression is made, of all beginnings of matches: as long as it reaches the end of the text that is there, the pattern
may still match, or match longer; when it does not, nothing that follows can change the result.

Patterns see one byte a character: ASCII as it is, and every other character as 0x80 or as the byte that an `Alphabet`
gives it, so that positions in bytes are positions in the text. `\\w`, `\\d` and `\\s` are ASCII.
"""

import functools
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from re import _constants as ops  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

import re2

IGNORE_CASE, MULTILINE, DOTALL = int(re.IGNORECASE), int(re.MULTILINE), int(re.DOTALL)
OTHER = 0x80  # a character that no pattern names
MAX_NAMED = 0xFF - OTHER  # characters beyond ASCII that the patterns of one alphabet may name
ALL = frozenset(range(256))
CATEGORIES = {
    ops.CATEGORY_DIGIT: frozenset(b"0123456789"),
    ops.CATEGORY_SPACE: frozenset(b" \t\n\r\f\v"),
    ops.CATEGORY_WORD: frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"),
}
CATEGORIES |= {
    ops.CATEGORY_NOT_DIGIT: ALL - CATEGORIES[ops.CATEGORY_DIGIT],
    ops.CATEGORY_NOT_SPACE: ALL - CATEGORIES[ops.CATEGORY_SPACE],
    ops.CATEGORY_NOT_WORD: ALL - CATEGORIES[ops.CATEGORY_WORD],
}
PLACES = {
    ops.AT_BEGINNING: (r"\A", r"(?m:^)"),  # without and with (?m)
    ops.AT_BEGINNING_STRING: (r"\A", r"\A"),
    ops.AT_END: (r"\z", r"(?m:$)"),
    ops.AT_END_STRING: (r"\z", r"\z"),
    ops.AT_BOUNDARY: (r"\b", r"\b"),
    ops.AT_NON_BOUNDARY: (r"\B", r"\B"),
}
REFUSED = {
    ops.ASSERT: "look-ahead or look-behind",
    ops.ASSERT_NOT: "look-ahead or look-behind",
    ops.GROUPREF: "a back-reference",
    ops.GROUPREF_EXISTS: "a conditional group",
    ops.ATOMIC_GROUP: "an atomic group",
    ops.POSSESSIVE_REPEAT: "a possessive repeat",
}
_CONTINUATION = bytes(range(0x80, 0xC0))  # of a character in UTF-8: deleting these leaves one byte for each character
_LEAD_TO_OTHER = bytes([*range(0x80), *[OTHER] * 0x80])


class Unfit(ValueError):
    """A pattern that cannot be used; the text says why, for the end of a problem line."""


@dataclass
class Alphabet:
    """The characters beyond ASCII that patterns name, each with a byte of its own."""

    codes: dict[str, int] = field(default_factory=dict)

    def code(self, character: str) -> int:
        """The byte of a character; a new one if it has none. Raises: Unfit when all are taken."""
        if character.isascii():
            return ord(character)
        if character not in self.codes and len(self.codes) == MAX_NAMED:
            raise Unfit(f"more than {MAX_NAMED} different characters beyond ASCII in one policy")
        return self.codes.setdefault(character, OTHER + 1 + len(self.codes))

    def view(self, text: str) -> bytes:
        """`text` as patterns see it, one byte a character."""
        if text.isascii():
            return text.encode("ascii")
        one_each = text.encode("utf-8", "surrogatepass").translate(_LEAD_TO_OTHER, _CONTINUATION)
        if not self.codes:
            return one_each
        changed = bytearray(one_each)
        for found in re.finditer("[" + re.escape("".join(self.codes)) + "]", text):
            changed[found.start()] = self.codes[found.group()]
        return bytes(changed)


@dataclass(frozen=True, eq=False)
class Pattern:
    """A pattern whose matches have 1 to `limit` characters, in Python's syntax; compiled at its first use.

    Raises, from that use: Unfit. `compile_pattern` uses it at once, for patterns that are not ours.
    """

    source: str
    alphabet: Alphabet
    limit: int
    ignore_case: bool = False

    @functools.cached_property
    def _tree(self) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # "possible nested set": it means something else in other dialects
                tree = _parser.parse(self.source, IGNORE_CASE if self.ignore_case else 0)
        except (re.error, OverflowError, RecursionError, Warning) as error:
            raise Unfit(f"not a regular expression ({error})") from None
        shortest, longest = tree.getwidth()
        if longest > self.limit:
            how = "without a limit" if longest >= _parser.MAXREPEAT else f"{longest} characters"
            what = f"can match {how}, and {self.limit} are the most"
            raise Unfit(f"{what}. Give its repeats upper limits, as in {{1,40}}")
        if shortest == 0:
            raise Unfit("can match the empty text. Make some part of it required")
        return tree

    @functools.cached_property
    def max_width(self) -> int:
        """The length of the longest match."""
        return int(self._tree.getwidth()[1])

    @functools.cached_property
    def _written(self) -> str:
        return _Writer(self.alphabet).text(self._tree, self._tree.state.flags, groups=True)

    @functools.cached_property
    def _tested(self) -> Any:  # without groups, which is several times as fast
        return _compiled(self._written, never_capture=True)

    @functools.cached_property
    def whole(self) -> Any:
        """The RE2 expression, with the groups that were written."""
        return _compiled(self._written) if self._tree.state.groups > 1 else self._tested

    @functools.cached_property
    def _beginning(self) -> Any:  # needed where a text is cut, which many uses never do
        beginning = _Writer(self.alphabet).beginning(self._tree, self._tree.state.flags)
        return _compiled(f"(?:{beginning})\\z", never_capture=True)

    def match(self, view: bytes, start: int) -> Any:
        """The match that begins at `start`, or None."""
        return self.whole.match(view, start) if self._tested.match(view, start) else None

    def is_open(self, view: bytes, start: int) -> bool:
        """Whether what follows the end of `view` could make or change the match that begins at `start`."""
        return len(view) - start <= self.max_width and self._beginning.match(view, start) is not None

    def first_open(self, view: bytes, start: int) -> int:
        """The first place from `start` where a match that is still open begins; the length of `view` if none does."""
        found = self._beginning.search(view, max(start, len(view) - self.max_width))
        return found.start() if found else len(view)


def compile_pattern(source: str, *, alphabet: Alphabet, max_width: int, ignore_case: bool = False) -> Pattern:
    """A pattern whose matches have 1 to `max_width` characters, compiled. Raises: Unfit."""
    pattern = Pattern(source, alphabet, max_width, ignore_case)
    assert pattern.whole
    return pattern


def linear(expression: str, *, ignore_case: bool = False) -> Any:
    """An expression in RE2's syntax over bytes, for what is decided about a match."""
    return _compiled(f"(?i:{expression})" if ignore_case else expression)


def any_of(literals: Iterable[tuple[bytes, bool]]) -> Any:
    """An expression that finds any of (bytes, whether in any case); it has no groups."""
    texts = ((literal.hex("x").replace("x", "\\x"), any_case) for literal, any_case in literals)
    return _compiled("|".join(f"(?i:\\x{t})" if any_case else f"\\x{t}" for t, any_case in texts), never_capture=True)


def _compiled(expression: str, *, never_capture: bool = False) -> Any:
    options = re2.Options()
    options.never_capture = never_capture
    options.encoding = re2.Options.Encoding.LATIN1
    options.log_errors = False
    try:
        return re2.compile(expression.encode("latin-1"), options)
    except re2.error as error:
        words = error.args[0].decode("latin-1") if isinstance(error.args[0], bytes) else str(error)
        raise Unfit(f"too large to run in bounded time and memory ({words.split(':')[0]})") from None


class _Writer:
    """Writes the tree of Python's parser as RE2's syntax: all of it, or all of its beginnings."""

    def __init__(self, alphabet: Alphabet):
        self.alphabet = alphabet

    def text(self, tree: Any, flags: int, *, groups: bool) -> str:
        return "".join(self.item(op, argument, flags, groups=groups) for op, argument in tree)

    def item(self, op: Any, argument: Any, flags: int, *, groups: bool) -> str:
        if op is ops.AT:
            return PLACES[argument][bool(flags & MULTILINE)]
        if op is ops.BRANCH:
            return "(?:" + "|".join(self.text(branch, flags, groups=groups) for branch in argument[1]) + ")"
        if op is ops.SUBPATTERN:
            number, added, removed, inner = argument
            inner = self.text(inner, (flags | added) & ~removed, groups=groups)
            return f"({inner})" if groups and number is not None else f"(?:{inner})"
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            lowest, highest, inner = argument
            inner = self.text(inner, flags, groups=groups)
            return f"(?:{inner}){{{lowest},{highest}}}" + ("?" if op is ops.MIN_REPEAT else "")
        return self.one(op, argument, flags)

    def beginning(self, tree: Any, flags: int) -> str:
        """Every beginning of every match of a sequence, the empty one and the whole ones too."""
        rest = ""
        for op, argument in reversed([*tree]):
            if op is ops.AT:
                continue  # what it looks at may not be there yet: it could still hold
            begun, whole = self.begun_item(op, argument, flags), self._unplaced(op, argument, flags)
            rest = f"(?:{begun}|{whole}{rest})" if begun else f"(?:{whole}{rest})?"
        return rest

    def begun_item(self, op: Any, argument: Any, flags: int) -> str:
        """The beginnings of one item; "" where that is only the empty one."""
        if op is ops.BRANCH:
            return "(?:" + "|".join(self.beginning(branch, flags) for branch in argument[1]) + ")"
        if op is ops.SUBPATTERN:
            _, added, removed, inner = argument
            return self.beginning(inner, (flags | added) & ~removed)
        if op in (ops.MAX_REPEAT, ops.MIN_REPEAT):
            _, highest, inner = argument
            if not highest:
                return ""
            whole = self._unplaced(ops.SUBPATTERN, (None, 0, 0, inner), flags)
            return f"{whole}{{0,{highest - 1}}}{self.beginning(inner, flags)}"
        return ""

    def _unplaced(self, op: Any, argument: Any, flags: int) -> str:
        """One whole item without the conditions on places, which more text could make true."""
        return re.sub(r"\\[AzbB]|\(\?m:[$^]\)", "", self.item(op, argument, flags, groups=False))

    def one(self, op: Any, argument: Any, flags: int) -> str:
        """A single character: of a literal, of a set, or any."""
        if op is ops.LITERAL:
            return self.literal(argument, flags)
        if op is ops.NOT_LITERAL:
            return self.set(ALL - self.cases(argument, flags))
        if op is ops.ANY:
            return self.set(ALL if flags & DOTALL else ALL - {ord("\n")})
        if op is not ops.IN:
            raise Unfit(f"has {REFUSED.get(op, str(op).lower())}, which has no bound on its time. Write it without")
        members: set[int] = set()
        for kind, value in argument:
            if kind is ops.LITERAL:
                members |= self.cases(value, flags)
            elif kind is ops.CATEGORY:
                members |= CATEGORIES[value]
            elif kind is ops.RANGE:
                if value[1] - value[0] > 256:
                    raise Unfit(
                        f"has the range {chr(value[0])}-{chr(value[1])} of more than 256 characters. Shorten it"
                    )
                members.update(*(self.cases(character, flags) for character in range(value[0], value[1] + 1)))
        return self.set(ALL - members if argument[0][0] is ops.NEGATE else members)

    def cases(self, character: int, flags: int) -> set[int]:
        spelled = chr(character)
        both = {spelled.lower(), spelled.upper()} if flags & IGNORE_CASE else set()
        return {self.alphabet.code(c) for c in {spelled} | {c for c in both if len(c) == 1}}

    def literal(self, character: int, flags: int) -> str:
        if character < OTHER and (not flags & IGNORE_CASE or not chr(character).isalpha()):
            return f"\\x{character:02x}"
        return self.set(self.cases(character, flags))

    @staticmethod
    def set(members: Iterable[int]) -> str:
        """Bytes as a set of hexadecimal ranges; \\x is the only escape written, so nothing else needs one."""
        ordered = sorted(members)
        if not ordered:
            raise Unfit("has a set of no characters. Put some in it")
        ranges = [[ordered[0], ordered[0]]]
        for code in ordered[1:]:
            if code == ranges[-1][1] + 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
        if len(ordered) == 1:
            return f"\\x{ordered[0]:02x}"
        return "[" + "".join(f"\\x{a:02x}" if a == b else f"\\x{a:02x}-\\x{b:02x}" for a, b in ranges) + "]"
