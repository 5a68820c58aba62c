"""Masks secrets in text: whole, or as it comes.

Rule: `mask(text)` is `feed(text) + flush()`, and every way of cutting the text gives the same output. A decision is a
function of the text around it, taken only when no continuation could change it. What is undecided is held back, at most
`WINDOW` characters of it; a secret that goes on beyond its match is masked at once and swallowed to its end, however
long. Findings tell type and place, never the secret.
"""

import bisect
import copy
import functools
import heapq
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from codex_accel import plausibility
from codex_accel.policy import MAX_WIDTH, Policy, Rule, default_policy
from codex_accel.secret_families import CLEAR_NAMES, STRONG_NAMES

WINDOW = 2 * MAX_WIDTH  # characters that may be held back: a name before a value, and a token in that value
CONTEXT = 48  # characters before the place of decision that rules may look at
PIECE = 1 << 18  # characters that are looked at together; any number gives the same output
REPLACEMENT = "[SECRET]"
SECRET_NAME = re.compile(
    rf"(?i)(?:(?:{'|'.join((*STRONG_NAMES, *CLEAR_NAMES))}|(?<![a-z])(?:pass|auth)|secret|credential)s?|token)"
    r"(?:[_ -]?(?:access|api|key|base|value|string|[0-9]{1,3})){0,3}$"
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One masked place: the family's or rule's id, where in the input, and what stands there instead."""

    type: str
    start: int
    end: int  # exclusive
    replacement: str = field(default="", compare=False)  # of what a rule blocks: nothing


@dataclass(frozen=True)
class Masked:
    """A masked text; `blocked` is the id of the rule that ended it, if one did."""

    text: str
    findings: tuple[Finding, ...] = ()
    blocked: str | None = None


@dataclass(frozen=True, slots=True)
class _Match:
    rule: Rule
    type: str
    spans: tuple[tuple[int, int], ...]  # in the view, in order; what is masked


OPEN = object()  # an answer that more text could change


def mask(text: str, *, policy: Policy | None = None) -> Masked:
    """`text` with every secret replaced, by the built-in policy or another.

    >>> mask("export DB_PASSWORD=hunter2-hunter3").text
    'export DB_PASSWORD=[SECRET]'
    """
    policy = policy or default_policy()
    if not policy.searched and (not policy.anchors or not policy.anchors.search(policy.alphabet.view(text))):
        return Masked(text)
    stream = StreamMasker(policy)
    last = max(0, len(text) - 1) // PIECE * PIECE
    masked = stream.feed(text[:last]) + stream.flush(text[last:])
    return Masked(masked, tuple(stream.findings), stream.blocked)


class StreamMasker:
    """Masks a text that comes in pieces: what `feed` and `flush` return, put together, is what `mask` returns."""

    def __init__(self, policy: Policy | None = None):
        self.policy = policy or default_policy()
        self.findings: list[Finding] = []
        self.blocked: str | None = None  # the rule that ended the stream
        self._text, self._view = "", b""  # what is not decided, after at most CONTEXT characters that are
        self._at = 0  # where in them the undecided begins
        self._passed = 0  # characters of the input before them
        self._swallowing: tuple[Rule, str, int, str] | None = None  # rule, type, start in the input, replacement

    @property
    def num_held(self) -> int:
        """Characters that came and are neither sent nor masked yet; at most WINDOW."""
        return 0 if self._swallowing else len(self._text) - self._at

    def copy(self) -> "StreamMasker":
        """Another that goes on from here."""
        made = copy.copy(self)
        made.findings = list(self.findings)
        return made

    @property
    def is_idle(self) -> bool:
        """Whether everything that came is decided: no secret goes on, and none may have begun."""
        return self._swallowing is None and self._at == len(self._text)

    def feed(self, chunk: str) -> str:
        """What can be sent now that `chunk` is here."""
        pieces = [chunk[start : start + PIECE] for start in range(0, len(chunk), PIECE)]
        return "".join(self._advance(piece, final=False) for piece in pieces)

    def flush(self, chunk: str = "") -> str:
        """The rest, at the end of the text; `flush(chunk)` is short for `feed(chunk) + flush()` and saves a look."""
        return self._advance(chunk, final=True)

    def _advance(self, chunk: str, *, final: bool) -> str:
        if self.blocked:
            return ""
        self._text += chunk
        self._view += self.policy.alphabet.view(chunk)
        sent: list[str] = []
        self._swallow(final)
        if not self._swallowing:
            self._scan(sent, final)
        drop = max(0, self._at - CONTEXT)
        self._text, self._view = self._text[drop:], self._view[drop:]
        self._at, self._passed = self._at - drop, self._passed + drop
        if final or self.blocked:
            self._text, self._view, self._at = "", b"", 0
        return "".join(sent)

    # --- finding -----------------------------------------------------------------------------------------------------

    def _scan(self, sent: list[str], final: bool) -> None:
        """Send and mask up to the first place that is undecided."""
        undecided = len(self._view) if final else self._first_open()
        anchored = self._anchored()
        for start, _, rule in heapq.merge(anchored, *map(self._searched, self.policy.searched)):
            if start < self._at:
                continue  # inside of what was masked
            if start >= undecided:
                break
            found = self._at_place(start, rule, anchored, undecided, final)
            if found is OPEN:
                undecided = start
                break
            if isinstance(found, _Match):
                self._apply(found, sent)
                self._swallow(final)
                if self.blocked or self._swallowing:
                    return
        if self._at < undecided:
            sent.append(self._text[self._at : undecided])
            self._at = undecided

    def _first_open(self) -> int:
        """The first place near the end of what is there where a match may begin whose anchor is not there yet."""
        place = self.policy.first_begun(self._view, self._at)
        for rule in (*self.policy.shifted, *self.policy.searched):
            found = rule.head.first_open(self._view, self._at)
            while found < place and not self._may_begin(rule, found):
                found = rule.head.first_open(self._view, found + 1)
            place = min(place, found)
        return place

    def _anchored(self) -> list[tuple[int, int, Rule]]:
        """(start, order, rule) of every place where a rule may begin by its anchor, in order."""
        places: list[tuple[int, int, Rule]] = []
        view, anchors = self._view, self.policy.anchors
        found = anchors.search(view, self._at) if anchors else None
        while found:
            at = found.start()
            written = view[at : at + self.policy.longest_anchor]
            lowered = written.lower()
            for rule in self.policy.by_letter[lowered[0]]:
                if (lowered if rule.ignore_case else written).startswith(rule.anchors):
                    places.append((at - rule.offset, rule.order, rule))
            found = anchors.search(view, at + 1)
        return sorted(places, key=lambda place: place[:2])

    def _searched(self, rule: Rule) -> Iterator[tuple[int, int, Rule]]:
        """The places where a rule without anchors matches, found as they are asked for."""
        found = rule.head.whole.search(self._view, self._at)
        while found:
            yield found.start(), rule.order, rule
            found = rule.head.whole.search(self._view, max(found.start() + 1, self._at))

    def _at_place(
        self, start: int, rule: Rule, anchored: list[tuple[int, int, Rule]], undecided: int, final: bool
    ) -> Any:
        """What holds at a place: a match, None, or OPEN.

        Where a rule masks only a part, as the value of a name, a rule that finds more there goes first: those of a
        policy file decide, and a family gives its type.
        """
        found = self._evaluate(rule, start, final)
        if not isinstance(found, _Match) or found.spans[0][0] == start:
            return found
        secret = found.spans[0][0]
        if undecided <= secret and not final:
            return OPEN
        inside = anchored[bisect.bisect_left(anchored, start + 1, key=lambda place: place[0]) :]
        inside = [*itertools.takewhile(lambda place: place[0] <= secret, inside)]
        inside += [(secret, other.order, other) for other in self.policy.searched]
        for place, order, other in sorted(inside, key=lambda item: item[1]):
            if order >= rule.order:
                break
            better = self._evaluate(other, place, final)
            if better is OPEN:
                return OPEN
            if isinstance(better, _Match) and better.spans[0][0] <= secret:
                return better if other.is_own else _Match(rule, other.id, found.spans)
        return found

    def _may_begin(self, rule: Rule, start: int) -> bool:
        """Whether what stands before `start` allows a match there."""
        if rule.before is None:
            return True
        if start and self._view[start - 1] in rule.before_alone:
            return True
        return rule.before.search(self._view[max(0, start - CONTEXT) : start]) is not None

    def _evaluate(self, rule: Rule, start: int, final: bool) -> Any:
        """What one rule says at one place: a match, None, or OPEN."""
        view = self._view
        if start < self._at or not self._may_begin(rule, start):
            return None
        found = rule.head.match(view, start)
        if not final and rule.head.is_open(view, start):
            return OPEN
        if not found or (found.end() < len(view) and view[found.end()] in rule.after):
            return None
        groups = range(1, rule.head.whole.groups + 1)
        spans = [found.span(group) for group in groups if found.start(group) >= 0] or [found.span()]
        if rule.check:
            begin, end = spans[-1]
            kept = rule.check(found.group(), view[begin:end])
            if not kept:
                return None
            spans[-1] = (begin, begin + kept)
        return _Match(rule, rule.id, tuple(spans))

    # --- masking -----------------------------------------------------------------------------------------------------

    def _apply(self, match: _Match, sent: list[str]) -> None:
        """Send what stands before and between the masked places, and a mask for each of them."""
        rule = match.rule
        if rule.action == "allow":
            sent.append(self._text[self._at : match.spans[-1][1]])
            self._at = match.spans[-1][1]
            return
        shown = rule.replacement
        if shown is None:
            shown = f"[SECRET:{match.type}]" if self.policy.show_type else REPLACEMENT
        for number, (start, end) in enumerate(match.spans, 1):
            sent.append(self._text[self._at : start])
            self._at = end
            if rule.action == "block":
                self.blocked = rule.id
                self.findings.append(Finding(match.type, self._passed + start, self._passed + end))
                return
            sent.append(shown)
            if rule.swallows and number == len(match.spans):
                self._swallowing = (rule, match.type, self._passed + start, shown)
            else:
                self.findings.append(Finding(match.type, self._passed + start, self._passed + end, shown))

    def _swallow(self, final: bool) -> None:
        """Go on to the end of the secret that is being swallowed, as far as it is there."""
        if self._swallowing:
            rule, type_, start, shown = self._swallowing
            self._at, is_over = _end_of_secret(self._view, self._at, rule, final)
            if is_over:
                self._swallowing = None
                self.findings.append(Finding(type_, start, self._passed + self._at, shown))


def _end_of_secret(view: bytes, at: int, rule: Rule, final: bool) -> tuple[int, bool]:
    """How far a secret goes on from `at`, and whether that is its end."""
    while True:
        if rule.run and (found := rule.run.match(view, at)):
            at = found.end()
        if at >= len(view):
            return at, final
        for pattern in (rule.stop, rule.last, rule.bridge):
            if pattern is None:
                continue
            if not final and pattern.is_open(view, at):
                return at, False
            if found := pattern.match(view, at):
                at = at if pattern is rule.stop else found.end()
                if pattern is rule.bridge:
                    break
                return at, True
        else:
            return at, True


# --- structures ------------------------------------------------------------------------------------------------------


def has_secret_name(name: str) -> bool:
    """Whether the name of a setting or an environment variable says that its value is secret.

    >>> [has_secret_name(name) for name in ("WANDB_API_KEY", "db.password", "num_tokens", "tokenizer")]
    [True, True, False, False]
    """
    return SECRET_NAME.search(name) is not None


def mask_json(value: Any, *, policy: Policy | None = None) -> Any:
    """A copy of nested mappings, lists and texts with every secret replaced, in keys too; other values as they are.

    A text below a key such as `password` is looked at as the value of that name.
    """
    return _masked_value(value, "", policy or default_policy())


def _masked_value(value: Any, name: str, policy: Policy) -> Any:
    if isinstance(value, str):
        if name and value and _is_value_of(name, value):
            return REPLACEMENT
        return mask(value, policy=policy).text
    if isinstance(value, Mapping):
        keys = {key: _masked_key(key, policy) if isinstance(key, str) else (key, False) for key in value}
        return {keys[key][0]: _masked_value(item, key if keys[key][1] else "", policy) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked_value(item, name, policy) for item in value]
    return value


@functools.lru_cache(maxsize=4096)  # the keys of log lines come again and again
def _masked_key(key: str, policy: Policy) -> tuple[str, bool]:
    return mask(key, policy=policy).text, has_secret_name(key)


def _is_value_of(name: str, value: str) -> bool:
    shown = value.encode("utf-8", "replace")
    return plausibility.quoted_value(name.encode("utf-8", "replace") + b"=" + shown, shown) > 0
