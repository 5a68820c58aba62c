"""Raw records with their secrets masked, as the stages that read data for a model get them.

Rule: nothing sees a record before its secrets are masked, so ids, splits, duplicates and tokens are those of the masked
text; and no count or reason holds a secret. A record is looked at as one text, the one that the model sees, and each of
its parts alone too: a name in the prompt can tell a secret, and letters before one can hide it. Lines and paragraphs
are looked at as the stretch of the file that they come from, so a private key may go over many of them.
"""

import bisect
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from codex_accel import files, redaction, safety
from codex_accel.policy import MAX_WIDTH
from codex_accel.records import BadRecord, Reader, Record
from codex_accel.safety import WINDOW, Finding, Masked
from codex_accel.secret_families import PERSONAL, SECRETS

SECRET, BLOCKED = "secret", "blocked by a rule"  # kinds of bad records
TOGETHER = 1 << 15  # characters of records that are looked at together
LEAST = 32  # characters that a record counts for besides its own
GAP = 64  # characters that may stand between two lines of a key
REACH = 1 << 16  # bytes before a unit in which a secret may begin that goes on in it
OnSecret = Literal["redact", "quarantine"]
Item = Record | BadRecord


class Before(NamedTuple):
    """What stands before some lines, as far as a secret that goes on in them needs it."""

    text: str = ""
    goes_on: bool = False  # a secret, which was counted where it began


class Screen:
    """Iterates over what a reader gives, with the secrets masked by the policy that holds, and counts what it finds.

    `on_secret` quarantine makes a bad record of each record with a secret; so does a rule with the action block in any
    case. Under a bypass everything goes through as it is.
    """

    def __init__(self, reader: Reader, *, on_secret: OnSecret = "redact"):
        self.reader, self.on_secret = reader, on_secret
        self.policy = redaction.policy()
        self.num_records, self.by_type = 0, Counter[str]()  # records with secrets; secrets by family or rule

    @property
    def num_bytes(self) -> int:
        """Raw bytes consumed so far."""
        return self.reader.num_bytes

    def counts(self) -> dict[str, Any]:
        """What the last iteration has found, for `facts`."""
        return {"num_records": self.num_records, "by_type": dict(self.by_type)}

    def __iter__(self) -> Iterator[Item]:
        self.num_records, self.by_type = 0, Counter()
        raw = self.reader.unit.raw
        if self.policy is None:
            return iter(self.reader)
        if raw.format == "text" and raw.source.unit != "file":
            return self._in_a_row("\n" if raw.source.unit == "line" else "\n\n")
        return self._one_by_one()

    def _one_by_one(self) -> Iterator[Item]:
        """Records that have nothing to do with their neighbours."""
        for group in _groups(self.reader):
            for number in self._candidates([*map(_text_of, group)]):
                item = group[number]
                group[number] = self._bad(item) if isinstance(item, BadRecord) else self._alone(item)
            yield from group

    def _candidates(self, texts: Sequence[str]) -> Iterator[int]:
        """The numbers of the texts that are worth a closer look, by a single search through all of them."""
        assert self.policy
        if self.policy.searched or not self.policy.anchors:
            yield from range(len(texts))
            return
        view, starts = self.policy.alphabet.view("\0".join(texts)), starts_of([*texts, ""], gap=1)
        found = self.policy.anchors.search(view)
        while found:
            number = bisect.bisect_right(starts, found.start()) - 1
            yield number
            found = self.policy.anchors.search(view, starts[number + 1])

    def _alone(self, record: Record) -> Item:
        texts = [part.text for part in record.parts]
        starts, looks = starts_of(texts), [(0, self._mask(_text_of(record)))]
        if len(texts) > 1:
            looks += zip(starts, map(self._mask, texts), strict=True)
        findings = united(_moved(finding, start) for start, look in looks for finding in look.findings)
        blocked = next((look.blocked for _, look in looks if look.blocked), None)
        return self._decide(record, touching(findings, texts, starts), blocked)

    def _in_a_row(self, between: str) -> Iterator[Item]:
        """Records that stand in one text, with `between` between them."""
        before = self._before_unit(between)
        for group in _groups(self.reader):
            waiting, done = [item for item in group if isinstance(item, Record)], list[Item]()
            while waiting:
                decided, before = self._row(waiting, before, between)
                waiting, done = waiting[len(decided) :], done + decided
            good = iter(done)
            yield from (self._bad(item) if isinstance(item, BadRecord) else next(good) for item in group)

    def _row(self, records: Sequence[Record], before: Before, between: str) -> tuple[list[Item], Before]:
        """What becomes of the records up to a blocked one (of none, if that was `before`); the `before` of the next."""
        texts = [record.parts[0].text for record in records]
        head = before.text + between if before.text else ""
        row = head + between.join(texts)
        if not self._may_hold(row):
            return [*records], Before(row[-WINDOW:])
        masked = self._mask(row)
        starts = starts_of(texts, first=len(head), gap=len(between))
        found = touching(masked.findings, texts, starts, known=len(head) if before.goes_on else 0)
        if not masked.blocked:
            decided = [self._decide(record, [mine]) for record, mine in zip(records, found, strict=True)]
            return decided, self._opening(row, masked.findings, between)
        last = masked.findings[-1]  # nothing behind it was looked at
        first, stop = bisect.bisect_right(starts, last.start) - 1, bisect.bisect_left(starts, last.end)
        decided = [self._decide(records[n], [found[n]], masked.blocked if n >= first else None) for n in range(stop)]
        return decided, Before()

    def _before_unit(self, between: str) -> Before:
        """What stands in the file before the unit; that it has not changed, the reading of that unit proves."""
        unit = self.reader.unit
        start = max(0, unit.start - REACH)
        try:
            with open(unit.raw.path, "rb") as stream:
                stream.seek(start)
                data = stream.read(unit.start - start)
        except OSError:
            return Before()  # the reader tells it
        text = data.decode(unit.raw.source.encoding, errors="ignore").replace("\r\n", "\n").rstrip("\n")
        masked = self._mask(text)
        return Before() if masked.blocked else self._opening(text, masked.findings, between)

    def _opening(self, row: str, findings: Sequence[Finding], between: str) -> Before:
        """What has to stand before the next group, so that a secret that goes on there is known.

        Of a long one its beginning is enough, because the same letters are swallowed however many there were.
        """
        if not findings or len(row) - findings[-1].end > GAP:
            return Before(row[-WINDOW:])
        start = max(0, findings[-1].start - MAX_WIDTH)
        longer = row[start:] + between + "A" * GAP  # a line as keys have them
        again = self._mask(longer).findings
        if not again or (start + again[-1].start, again[-1].end) != (findings[-1].start, len(longer)):
            return Before(row[-WINDOW:])
        whole, head = row[start:], row[start : start + MAX_WIDTH + WINDOW]
        return Before(whole if len(whole) == len(head) else head.rpartition("\n")[0] or head, goes_on=True)

    def _may_hold(self, text: str) -> bool:
        """Whether `text` is worth a closer look; costs a search for the beginnings of secrets."""
        assert self.policy
        view = self.policy.alphabet.view(text)
        if self.policy.anchors and self.policy.anchors.search(view):
            return True
        return any(rule.head.whole.search(view) for rule in self.policy.searched)

    def _mask(self, text: str) -> Masked:
        assert self.policy
        if self.policy.searched and not self._may_hold(text):  # where there are none, `mask` asks that itself
            return Masked(text)
        return safety.mask(text, policy=self.policy)

    def _bad(self, item: BadRecord) -> BadRecord:
        """A template refuses in words of its own, which may repeat the data."""
        return dataclasses.replace(item, reason=self._mask(item.reason).text)

    def _decide(self, record: Record, found: Sequence[Sequence[Finding]], blocked: str | None = None) -> Item:
        """The record with the findings in its parts masked, counted; or why it is set aside."""
        found = [
            [] if part.is_special else mine for part, mine in zip(record.parts, found, strict=True)
        ]  # a special token is placed, not written
        types = sorted({finding.type for mine in found for finding in mine})
        if not types and not blocked:
            return record
        self.num_records += 1
        self.by_type.update(finding.type for mine in found for finding in mine if finding.start >= 0)
        parts = [part._replace(text=replaced(part.text, mine)) for part, mine in zip(record.parts, found, strict=True)]
        has_target = any(part.text and part.is_target and not part.is_special for part in parts)
        if has_target and not blocked and self.on_secret == "redact":
            return Record(record.file, record.line, tuple(parts), record.key)
        why = f"{BLOCKED}: {blocked}" if blocked else f"{SECRET}: {', '.join(types)}"
        return BadRecord(record.file, record.line, why if has_target or blocked else f"{why}; nothing else is a target")


# --- findings over several texts --------------------------------------------------------------------------------------


def starts_of(texts: Sequence[str], *, first: int = 0, gap: int = 0) -> list[int]:
    """Where each text begins in a row of all of them."""
    return list(itertools.accumulate((len(text) + gap for text in texts[:-1]), initial=first))


def touching(
    findings: Iterable[Finding], texts: Sequence[str], starts: Sequence[int], *, known: int = 0
) -> list[list[Finding]]:
    """The findings in each text of a row, with places in that text.

    In the first text that it touches a finding starts at 0 or later, in others before 0; before 0 in the first too if
    it begins before `known` in the row.
    """
    result: list[list[Finding]] = [[] for _ in texts]
    for finding in findings:
        is_known = finding.start < known
        for number in range(max(0, bisect.bisect_right(starts, finding.start) - 1), len(texts)):
            if starts[number] >= finding.end:
                break
            if finding.start < starts[number] + len(texts[number]):
                moved = _moved(finding, -starts[number])
                result[number].append(moved if is_known else dataclasses.replace(moved, start=max(0, moved.start)))
                is_known = True
    return result


def united(findings: Iterable[Finding]) -> list[Finding]:
    """Findings in order of their places; those that overlap become one."""
    result: list[Finding] = []
    for finding in sorted(findings, key=lambda one: (one.start, -one.end)):
        if result and finding.start < result[-1].end:
            result[-1] = dataclasses.replace(result[-1], end=max(result[-1].end, finding.end))
        else:
            result.append(finding)
    return result


def replaced(text: str, findings: Iterable[Finding]) -> str:
    """`text` with what stands for each finding in its place, as far as that lies in it.

    >>> replaced("to ghp_x and", [Finding("github", 3, 8, "[SECRET]")])
    'to [SECRET] and'
    """
    pieces, at = [], 0
    for finding in findings:
        pieces += [text[at : max(0, finding.start)], finding.replacement]
        at = finding.end
    return "".join(pieces) + text[at:]


def _moved(finding: Finding, by: int) -> Finding:
    return dataclasses.replace(finding, start=finding.start + by, end=finding.end + by)


def _text_of(item: Item) -> str:
    if isinstance(item, BadRecord):
        return item.reason
    return item.parts[0].text if len(item.parts) == 1 else "".join(part.text for part in item.parts)


def _groups(reader: Reader) -> Iterator[list[Item]]:
    group: list[Item] = []
    size = 0
    for item in reader:
        group.append(item)
        size += LEAST + len(_text_of(item))
        if size >= TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group


# --- for manifests ----------------------------------------------------------------------------------------------------


def identity(*, on_secret: OnSecret = "redact") -> dict[str, Any]:
    """What masked records follow from besides the raw ones, for the digests of input."""
    if redaction.is_bypassed():
        return redaction.facts()
    families = files.sha256_bytes(repr((SECRETS, PERSONAL)).encode())
    return {**redaction.facts(), "families": families, "on_secret": on_secret}


def facts(counts: Iterable[dict[str, Any]], *, on_secret: OnSecret = "redact") -> dict[str, Any]:
    """What was found, from the counts of all screens, and by which policy; nothing is counted under a bypass."""
    num_records, by_type = 0, Counter[str]()
    for one in counts:
        num_records += one["num_records"]
        by_type.update(one["by_type"])
    bypassed = redaction.is_bypassed()
    return {
        "action": None if bypassed else on_secret,
        **redaction.facts(),
        "num_records": None if bypassed else num_records,
        "num_findings": None if bypassed else by_type.total(),
        "by_type": dict(sorted(by_type.items(), key=lambda item: (-item[1], item[0]))),
    }


def summary(found: dict[str, Any]) -> str:
    """`facts` in a line for the terminal."""
    if found["bypass_reason"] is not None:
        return f"secrets      not looked for: {found['bypass_reason']}"
    types = ", ".join(f"{count:,} x {name}" for name, count in found["by_type"].items())
    done = "masked" if found["action"] == "redact" else "set aside"
    return f"secrets      {found['num_findings']:>9,} in {found['num_records']:,} records, {done}: {types}"
