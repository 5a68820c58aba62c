"""What is masked, and how: the families of secrets, and the rules of a policy file before them.

Rule: a policy that loads can run. A rule is compiled, measured and bounded when it is read; one that cannot be used is
refused with its id, and no rule needs more text than `MAX_WIDTH` characters to decide.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from codex_accel import plausibility
from codex_accel.config import Section, did_you_mean, shown_value
from codex_accel.errors import UserError
from codex_accel.patterns import Alphabet, Pattern, Unfit, any_of, compile_pattern
from codex_accel.secret_families import PERSONAL, SECRETS, Family
from codex_accel.yaml_reader import KeyPath, dotted, read_yaml

MAX_WIDTH = 512  # characters that a rule may need to see to decide
TOKEN_BYTES = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")
Action = Literal["allow", "redact", "block"]
Text = Annotated[str, pydantic.Field(min_length=1)]


class RuleKeys(Section):
    """One rule of a policy file."""

    id: Annotated[str, pydantic.Field(pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = pydantic.Field(
        description="Name of the rule in findings and problems: letters, digits, '.', '_' and '-'"
    )
    action: Action = pydantic.Field(description="allow: never masked; redact: masked; block: the text ends there")
    literals: list[Text] = pydantic.Field([], description="Texts to find as they stand")
    pattern: Text | None = pydantic.Field(
        None, description="Regular expression in Python's syntax, of bounded length; groups are what is masked"
    )
    ignore_case: bool = pydantic.Field(False, description="Capitals and small letters are the same")
    replacement: str | None = pydantic.Field(None, description="Written in place of what is found; null: [SECRET]")


class PolicyKeys(Section):
    """A policy file."""

    schema_version: Literal[1] = pydantic.Field(1, description="Version of the format of this file")
    version: Text = pydantic.Field(description="Version of these rules, recorded where they are used")
    secrets: bool = pydantic.Field(True, description="Look for the families of secrets")
    personal_data: list[str] = pydantic.Field([], description="Families of personal data to look for, by name, or all")
    off: list[str] = pydantic.Field([], description="Families that are not looked for")
    show_type: bool = pydantic.Field(False, description="Write [SECRET:type] instead of [SECRET]")
    rules: list[RuleKeys] = pydantic.Field([], description="Rules, tried in this order and before the families")


@dataclass(frozen=True, eq=False)
class Rule:
    """A family or a rule of a file, compiled; the fields are those of `secret_families.Family`."""

    id: str
    head: Pattern
    order: int = 0  # of two at one place, the lower goes first
    action: Action = "redact"
    replacement: str | None = None
    is_own: bool = False  # of a policy file
    anchors: tuple[bytes, ...] = ()
    ignore_case: bool = False
    offset: int = 0
    before: re.Pattern[bytes] | None = None
    after: frozenset[int] = frozenset()
    run: re.Pattern[bytes] | None = None
    bridge: Pattern | None = None
    stop: Pattern | None = None
    last: Pattern | None = None
    check: Callable[[bytes, bytes], int] | None = None

    @functools.cached_property
    def before_alone(self) -> frozenset[int]:
        """The bytes that are enough before a match, whatever stands before them."""
        return frozenset(code for code in range(256) if self.before and self.before.search(bytes([code])))

    @property
    def swallows(self) -> bool:
        """Whether what is masked can go on beyond the match."""
        return self.run is not None or self.bridge is not None


@dataclass(frozen=True, eq=False)
class Policy:
    """Compiled rules; `version` and `digest` say which, for manifests."""

    rules: tuple[Rule, ...]
    alphabet: Alphabet
    version: str
    digest: str  # SHA-256 of the file, of nothing for the built-in policy
    show_type: bool = False
    has_secrets: bool = True  # whether the families of secrets are looked for
    anchors: Any = field(init=False)  # finds where a rule may begin; None if no rule has an anchor
    longest_anchor: int = field(init=False)
    by_letter: dict[int, list[Rule]] = field(init=False)  # by an anchor's first byte, small letters
    begun: tuple[frozenset[bytes], frozenset[bytes]] = field(init=False)  # beginnings of anchors; of those in any case
    searched: tuple[Rule, ...] = field(init=False)  # without anchors
    shifted: tuple[Rule, ...] = field(init=False)  # that begin before their anchor

    def __post_init__(self) -> None:
        by_letter: dict[int, list[Rule]] = {}
        for rule in self.rules:
            for letter in dict.fromkeys(anchor[:1].lower()[0] for anchor in rule.anchors):
                by_letter.setdefault(letter, []).append(rule)
        object.__setattr__(self, "by_letter", by_letter)
        begun = tuple(
            frozenset(
                anchor[:length]
                for rule in self.rules
                for anchor in rule.anchors
                for length in range(1, len(anchor))
                if rule.ignore_case == folded
            )
            for folded in (False, True)
        )
        object.__setattr__(self, "begun", begun)
        object.__setattr__(self, "searched", tuple(rule for rule in self.rules if not rule.anchors))
        object.__setattr__(self, "shifted", tuple(rule for rule in self.rules if rule.offset))
        literals = dict.fromkeys((anchor, rule.ignore_case) for rule in self.rules for anchor in rule.anchors)
        object.__setattr__(self, "anchors", any_of(literals) if literals else None)
        object.__setattr__(self, "longest_anchor", max((len(anchor) for anchor, _ in literals), default=0))

    @functools.cached_property
    def without_blocks(self) -> "Policy":
        """The same with rules that mask where these block."""
        rules = (dataclasses.replace(rule, action="redact") if rule.action == "block" else rule for rule in self.rules)
        return Policy(tuple(rules), self.alphabet, self.version, self.digest, self.show_type, self.has_secrets)

    def first_begun(self, view: bytes, start: int) -> int:
        """The first place from `start` where an anchor begins that goes on beyond `view`; else the length of it."""
        exact, folded = self.begun
        for place in range(max(start, len(view) - self.longest_anchor + 1), len(view)):
            if view[place:] in exact or view[place:].lower() in folded:
                return place
        return len(view)


# --- families --------------------------------------------------------------------------------------------------------


@functools.cache
def _of_family(family: Family) -> Rule:
    alphabet = Alphabet()  # families are ASCII

    def pattern(source: str, *, ignore_case: bool = False) -> Pattern | None:
        if not source:
            return None
        return Pattern(source, alphabet, MAX_WIDTH, ignore_case)  # of which most are never needed

    head = pattern(family.pattern, ignore_case=family.ignore_case)
    assert head
    return Rule(
        family.id,
        head,
        anchors=tuple(text.encode("ascii") for text in family.anchors),
        ignore_case=family.ignore_case,
        offset=family.offset,
        before=re.compile(f"(?:{family.before})\\Z".encode("latin-1"), re.DOTALL) if family.before else None,
        after=frozenset(_members(family.after)),
        run=re.compile(f"[{family.run}]*".encode("latin-1")) if family.run else None,
        bridge=pattern(family.bridge),
        stop=pattern(family.stop),
        last=pattern(family.last),
        check=plausibility.CHECKS[family.check] if family.check else None,
    )


def _members(characters: str) -> list[int]:
    found = re.compile(f"[{characters}]".encode("latin-1")) if characters else None
    return [code for code in range(256) if found and found.match(bytes([code]))]


def _in_order(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    return tuple(dataclasses.replace(rule, order=order) for order, rule in enumerate(rules))


@functools.cache
def default_policy(*, show_type: bool = False) -> Policy:
    """All families of secrets, no personal data, no further rules."""
    rules = _in_order(map(_of_family, SECRETS))
    return Policy(rules, Alphabet(), "built-in", hashlib.sha256(b"").hexdigest(), show_type)


# --- files -----------------------------------------------------------------------------------------------------------


def load(path: Path) -> Policy:
    """The policy of a YAML file.

    Raises: UserError with all problems, each with its line and, for a broken rule, its id.
    """
    values, origins, problems = read_yaml(path)
    try:
        keys = PolicyKeys.model_validate(values)
    except pydantic.ValidationError as error:
        lines = [_line(item, values, origins, path) for item in error.errors(include_url=False)]
        raise UserError(*problems, *dict.fromkeys(lines)) from None
    alphabet = Alphabet()
    own: list[Rule] = []
    seen: set[str] = set()
    taken = {family.id for family in (*SECRETS, *PERSONAL)}
    for index, rule in enumerate(keys.rules):
        where = f"{origins.get(('rules', index), path)}: rule '{rule.id}'"
        if rule.id in seen or rule.id in taken:
            what = "an earlier rule" if rule.id in seen else "a built-in family"
            problems.append(f"{where}: has the id of {what}. Give it another.")
        seen.add(rule.id)
        try:
            own += _of_file(rule, alphabet)
        except Unfit as error:
            problems.append(f"{where}: {error}.")
    families, mistakes = _chosen(keys, origins, path)
    problems += mistakes
    if problems:
        raise UserError(*problems)
    rules = _in_order([*own, *map(_of_family, families)])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Policy(rules, alphabet, keys.version, digest, keys.show_type, keys.secrets)


def _of_file(rule: RuleKeys, alphabet: Alphabet) -> list[Rule]:
    """The rule of its literals and the rule of its pattern. Raises: Unfit."""
    if not rule.literals and rule.pattern is None:
        raise Unfit("finds nothing. Give it literals or a pattern")
    if rule.replacement is not None and rule.action != "redact":
        raise Unfit(f"has a replacement, which the action {rule.action} does not write. Remove it")
    texts = ["|".join(re.escape(text) for text in sorted(rule.literals, key=len, reverse=True)), rule.pattern or ""]
    heads = [
        compile_pattern(text, alphabet=alphabet, max_width=MAX_WIDTH, ignore_case=rule.ignore_case)
        for text in texts
        if text
    ]
    after = TOKEN_BYTES if rule.action == "allow" else frozenset()
    return [
        Rule(rule.id, head, action=rule.action, replacement=rule.replacement, is_own=True, after=after)
        for head in heads
    ]


def _chosen(keys: PolicyKeys, origins: dict[KeyPath, str], path: Path) -> tuple[list[Family], list[str]]:
    """The families that a file asks for, and its mistakes in their names."""
    problems = []
    secrets, personal = ({family.id for family in table} for table in (SECRETS, PERSONAL))
    for key, names, known in (
        ("personal_data", keys.personal_data, personal | {"all"}),
        ("off", keys.off, secrets | personal),
    ):
        for index, name in enumerate(names):
            if name not in known:
                where = origins.get((key, index), str(path))
                problems.append(f"{where}: {key}: no such family: '{name}'. {did_you_mean(name, sorted(known))}")
    asked = personal if "all" in keys.personal_data else set(keys.personal_data)
    chosen = [*(SECRETS if keys.secrets else ()), *(family for family in PERSONAL if family.id in asked)]
    return [family for family in chosen if family.id not in keys.off], problems


def _line(error: Any, values: dict[str, Any], origins: dict[KeyPath, str], path: Path) -> str:
    """One pydantic error as a problem line, with the id of the rule that it is in."""
    place: KeyPath = tuple(error["loc"])
    known = [place[:end] for end in range(len(place), 0, -1) if place[:end] in origins]
    where = origins[known[0]] if known else f"{path}:1"
    inside = f"rule {place[1]}" if place[:1] == ("rules",) and len(place) > 1 else ""
    if inside and isinstance(values.get("rules"), list) and isinstance(values["rules"][int(place[1])], dict):
        inside = f"rule '{values['rules'][int(place[1])].get('id', int(place[1]) + 1)}'"
    key = dotted(place[2:] if inside else place)
    head = ": ".join(part for part in (where, inside, key) if part)
    fields = (RuleKeys if inside else PolicyKeys).model_fields
    if error["type"] == "extra_forbidden":
        return f"{head}: unknown key. {did_you_mean(str(place[-1]), fields)}"
    if error["type"] == "missing":
        return f"{head}: required and not given ({fields[str(place[-1])].description}). Add it."
    return f"{head}: {shown_value(error['input'])}: {error['msg'].removeprefix('Input ')}."
