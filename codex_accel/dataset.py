"""Preparation of a dataset: from raw files to the token store with its splits, quarantine and statistics.

Rule: every record that is read is counted once, in a split or in the quarantine; the bytes written depend on the input
and the settings alone.
"""

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from codex_accel import progress, splits, tokens
from codex_accel.errors import UserError
from codex_accel.records import BadRecord, RawFile, Reader, Record
from codex_accel.schema import PrepareConfig
from codex_accel.tokenizer import Tokenizer, encode_records

QUARANTINE = "quarantine.jsonl"
BATCH_RECORDS, BATCH_CHARACTERS = 1024, 4 << 20  # tokenized in one call, whichever is reached first

# (record, index over all good records, its source's split) -> the pieces with their splits
Assign = Callable[[Record, int, RawFile], list[tuple[str, Record]]]


@dataclass
class Prepared:
    """What came out of a preparation, for the manifest."""

    sources: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def require_splits(config: PrepareConfig, raw_files: list[RawFile]) -> None:
    """Raise UserError unless split.method, split.key and the sources go together and names of splits fit in files."""
    given = config.split.method == "given"
    problems = []
    for name in _split_names(config):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            what = f"{name!r} names no split, because files are named after it. Use letters, digits, '_', '.' and '-'."
            problems.append(config.problem("sources" if given else "split.ratios", what))
    for index, source in enumerate(config.sources):
        if given and source.split is None:
            problems.append(
                config.problem(f"sources.{index}.split", "split.method: given needs a split for each source.")
            )
        if not given and source.split is not None:
            what = f"{source.split!r} works with split.method: given only, not {config.split.method}."
            problems.append(config.problem(f"sources.{index}.split", what))
    texts = [raw.path for raw in raw_files if raw.format == "text"]
    if config.split.key is not None and texts:
        what = f"{config.split.key!r} is a field, and the text file '{texts[0]}' has none. Remove it, or use JSONL."
        problems.append(config.problem("split.key", what))
    if problems:
        raise UserError(*problems)


def plan_splits(config: PrepareConfig, raw_files: list[RawFile]) -> Assign:
    """How records find their split; `exact` and `position` read all input once for it."""
    split, ratios, seed = config.split, config.split.ratios, config.split.seed
    if split.method == "given":
        return lambda record, index, raw: [(str(raw.source.split), record)]
    if split.method == "hash":
        return lambda record, index, raw: [
            (splits.by_hash(record.key if record.key is not None else record.id.hex(), ratios, seed=seed), record)
        ]
    ids = [item.id for raw in raw_files for item in _reader(config, raw) if isinstance(item, Record)]
    if split.method == "position" and len(ids) == 1:
        return lambda record, index, raw: _cut(record, ratios)
    names = splits.by_position(len(ids), ratios) if split.method == "position" else splits.exact(ids, ratios, seed=seed)

    def assign(record: Record, index: int, raw: RawFile) -> list[tuple[str, Record]]:
        if index >= len(ids) or ids[index] != record.id:
            raise UserError(f"{raw.path}: has changed while it was being read. Run again.")
        return [(names[index], record)]

    return assign


def _reader(config: PrepareConfig, raw: RawFile) -> Reader:
    return Reader(raw, max_record_bytes=config.max_record_bytes, key=config.split.key)


def _cut(record: Record, ratios: dict[str, float]) -> list[tuple[str, Record]]:
    """One long text, cut by characters; the prompt/completion shape cannot be cut."""
    if len(record.parts) > 1:
        raise UserError(
            f"{record.file}:{record.line}: the only record has a prompt, so position cannot cut it. Use hash."
        )
    pieces = splits.cut_text(record.parts[0][0], ratios)
    return [
        (name, Record(record.file, record.line, record.offset, ((text, True),)))
        for name, text in pieces.items()
        if text
    ]


def write(
    config: PrepareConfig, raw_files: list[RawFile], tokenizer: Tokenizer, assign: Assign, folder: Path
) -> Prepared:
    """Read every file, write the shards and the quarantine into `folder`; returns sources and facts.

    A record goes to the shard of the unit that its first byte lies in, counted over all files in order, so that shards
    are the same however the work is shared out.
    """
    names = _split_names(config)
    statistics = {name: _Statistics() for name in names}
    bad: Counter[str] = Counter()
    result = Prepared()
    total_bytes = sum(raw.path.stat().st_size for raw in raw_files)
    before_bytes = num_records = 0
    with (
        _Shards(folder, tokens.schema_for(tokenizer.vocab_size)) as shards,
        open(folder / QUARANTINE, "w", encoding="utf-8") as quarantine,
        progress.bar("prepare", total=total_bytes, unit="bytes") as show,
    ):

        def flush(pending: list[tuple[int, str, Record]]) -> None:
            encoded = encode_records(
                tokenizer, [record for _, _, record in pending], add_bos=config.add_bos, add_eos=config.add_eos
            )
            for (unit, name, record), document in zip(pending, encoded, strict=True):
                shards.add(unit, name, document)
                statistics[name].add(document, record, tokenizer.unk_id)

        for raw in raw_files:
            reader = _reader(config, raw)
            num_good = num_bad = 0
            pending: list[tuple[int, str, Record]] = []
            num_characters = 0
            for item in reader:
                if isinstance(item, BadRecord):
                    if config.on_bad_record == "error":
                        raise UserError(
                            f"{item.file}:{item.line}: {item.reason}. Mend it, or on_bad_record=quarantine."
                        )
                    line = {"file": item.file, "line": item.line, "reason": item.reason}
                    quarantine.write(json.dumps(line, ensure_ascii=False) + "\n")
                    bad[item.reason.split(":")[0]] += 1  # kinds, of which there are few
                    num_bad += 1
                    continue
                unit = (before_bytes + item.offset) // config.unit_bytes
                pending += [(unit, name, piece) for name, piece in assign(item, num_records, raw)]
                num_characters += sum(len(text) for text, _ in item.parts)
                num_good, num_records = num_good + 1, num_records + 1
                if len(pending) >= BATCH_RECORDS or num_characters > BATCH_CHARACTERS:
                    flush(pending)
                    pending, num_characters = [], 0
                    show(before_bytes + reader.num_bytes, f"{num_records:,} records")
            flush(pending)
            before_bytes += reader.num_bytes
            result.sources.append(
                {
                    "path": str(raw.path),
                    "format": raw.format,
                    "size": reader.num_bytes,
                    "sha256": reader.sha256,
                    "num_records": num_good,
                    "num_bad": num_bad,
                }
            )
    if not bad:
        (folder / QUARANTINE).unlink()
    members = splits.membership({name: bytes(statistics[name].ids) for name in names})
    result.facts = {
        "num_records": num_records,
        "num_bad": sum(bad.values()),
        "bad_by_reason": dict(bad.most_common()),
        "split": config.split.model_dump(),
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id if config.add_bos else None,  # as placed; None too where the tokenizer has none
        "eos_id": tokenizer.eos_id if config.add_eos else None,
        "splits": {name: {**members[name], **statistics[name].facts()} for name in names},
    }
    return result


def _split_names(config: PrepareConfig) -> list[str]:
    if config.split.method == "given":
        return list(dict.fromkeys(str(source.split) for source in config.sources))
    return list(config.split.ratios)


def check(config: PrepareConfig, result: Prepared) -> None:
    """Raise UserError if there is no record, too many bad ones, or an empty split."""
    facts = result.facts
    seen = facts["num_records"] + facts["num_bad"]
    reasons = "; ".join(f"{count} x {reason}" for reason, count in list(facts["bad_by_reason"].items())[:3])
    if not facts["num_records"]:
        raise UserError(
            config.problem("sources", f"no usable record in {seen}. {reasons or 'The files hold blank lines.'}")
        )
    if facts["num_bad"] > config.max_bad_fraction * seen:
        limit = f"more than max_bad_fraction = {config.max_bad_fraction}"
        what = f"{facts['num_bad']} of {seen} records are bad, {limit}: {reasons}."
        raise UserError(config.problem("max_bad_fraction", what))
    empty = [name for name, split in facts["splits"].items() if not split["num_records"]]
    if empty:
        given = config.split.method == "given"
        mend = "Name other files for it" if given else "Change the shares, or add data"
        what = f"{', '.join(empty)} came out empty from {facts['num_records']} records. {mend}."
        raise UserError(config.problem("sources" if given else "split.ratios", what))


class _Shards(contextlib.AbstractContextManager["_Shards"]):
    """The open shard of each split; units come in rising order, so one is closed when the next begins."""

    def __init__(self, folder: Path, schema: Any):
        self._folder, self._schema = folder, schema
        self._open: dict[str, tuple[int, tokens.ShardWriter]] = {}

    def add(self, unit: int, split: str, document: tokens.Document) -> None:
        current = self._open.get(split)
        if current is None or current[0] != unit:
            if current is not None:
                current[1].close()
            current = (unit, tokens.ShardWriter(self._folder / tokens.shard_name(split, unit), self._schema))
            self._open[split] = current
        current[1].add(document)

    def __exit__(self, *exception: object) -> None:
        for _, writer in self._open.values():
            writer.close()


@dataclass
class _Statistics:
    """Counts of one split."""

    ids: bytearray = field(default_factory=bytearray)
    lengths: list[int] = field(default_factory=list)
    num_target_tokens: int = 0
    num_bytes: int = 0
    num_unknown: int = 0

    def add(self, document: tokens.Document, record: Record, unk_id: int | None) -> None:
        self.ids += record.id
        self.lengths.append(len(document.input_ids))
        self.num_target_tokens += int(document.is_target().sum())
        self.num_bytes += sum(len(text.encode()) for text, _ in record.parts)
        if unk_id is not None:
            self.num_unknown += int((document.input_ids == unk_id).sum())

    def facts(self) -> dict[str, Any]:
        num_tokens = sum(self.lengths)
        percentiles = np.percentile(self.lengths or [0], [0, 50, 90, 99, 100], method="inverted_cdf")
        return {
            "num_tokens": num_tokens,
            "num_target_tokens": self.num_target_tokens,
            "num_bytes": self.num_bytes,
            "bytes_per_token": self.num_bytes / num_tokens if num_tokens else 0.0,
            "num_unknown_tokens": self.num_unknown,
            "length_percentiles": dict(zip(["min", "p50", "p90", "p99", "max"], map(int, percentiles), strict=True)),
        }


def documents_of(
    raw_files: Iterable[RawFile], tokenizer: Tokenizer, *, add_bos: bool, add_eos: bool
) -> Iterator[tokens.Document]:
    """Documents straight from raw files, for evaluation. Raises UserError at the first bad record."""
    for raw in raw_files:
        for item in Reader(raw, max_record_bytes=1 << 30):
            if isinstance(item, BadRecord):
                raise UserError(f"{item.file}:{item.line}: {item.reason}. Mend the record; scoring leaves none out.")
            yield encode_records(tokenizer, [item], add_bos=add_bos, add_eos=add_eos)[0]
