"""Units of input into shards: read, tokenized on all threads, written in order.

Rule: blocks are cut by the records alone and written in the order in which they were read, so the bytes do not depend
on threads; a unit's marker is written last, after its files are on the disk.
"""

import collections
import concurrent.futures
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from codex_accel import documents, duplicates, files, progress, tokens
from codex_accel.errors import UserError
from codex_accel.plan import Plan, blocks, share
from codex_accel.records import BadRecord, Record
from codex_accel.survey import Assign
from codex_accel.tally import Tally
from codex_accel.tokenizer import Tokenizer
from codex_accel.workers import Workers


def write_units(plan: Plan, workers: Workers, tokenizer: Tokenizer, assign: Assign) -> None:
    """Tokenize and write every unit of this process that has no marker yet."""
    left, total, done = share(plan, workers, "units")
    with (
        concurrent.futures.ThreadPoolExecutor(workers.num_threads) as pool,
        progress.bar("prepare", total=total, done=done, unit="bytes") as show,
    ):
        for number in left:
            unit = _Unit(plan, number, tokenizer)
            unit.write(assign, pool, num_threads=workers.num_threads, show=show, before=done)
            done += plan.units[number].num_bytes


class _Unit:
    """One unit being written: its shards, its bad records, its counts."""

    def __init__(self, plan: Plan, number: int, tokenizer: Tokenizer):
        self.plan, self.number, self.tokenizer = plan, number, tokenizer
        self.tallies = {name: Tally(tokenizer) for name in plan.names}
        self.shards: dict[str, tokens.ShardWriter] = {}
        self.runs = duplicates.RunWriter(plan.work / "units", number)
        self.num_records = 0
        self.bad: Counter[str] = Counter()

    def write(
        self,
        assign: Assign,
        pool: concurrent.futures.Executor,
        *,
        num_threads: int,
        show: Callable[[int, str], None],
        before: int,
    ) -> None:
        """Read, tokenize on the pool's threads, write in order; the marker comes last."""
        plan, config = self.plan, self.plan.config
        reader = plan.read(self.number)
        waiting: collections.deque[tuple[list[Record], list[int], Any]] = collections.deque()
        with open(plan.path("units", self.number, ".bad.jsonl"), "w", encoding="utf-8") as quarantine:
            for block in blocks(reader):
                good = [item for item in block if isinstance(item, Record)]
                if len(good) < len(block):
                    self._set_aside([item for item in block if isinstance(item, BadRecord)], quarantine)
                written, numbers = assign(good, self.number, self.num_records)
                self.num_records += len(good)
                if written:
                    job = pool.submit(
                        documents.encode, self.tokenizer, written, add_bos=config.add_bos, add_eos=config.add_eos
                    )
                    waiting.append((written, numbers, job))
                while len(waiting) > num_threads:
                    self._take(*waiting.popleft())
                    show(before + reader.num_bytes, f"unit {self.number + 1} of {len(plan.units)}")
            while waiting:
                self._take(*waiting.popleft())
        self._finish(secrets=reader.counts())

    def _set_aside(self, bad: list[BadRecord], quarantine: Any) -> None:
        for item in bad:
            if self.plan.config.on_bad_record == "error":
                raise UserError(f"{item.file}:{item.line}: {item.reason}. Mend it, or on_bad_record=quarantine.")
            line = {"file": item.file, "line": item.line, "reason": item.reason}
            quarantine.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.bad[item.reason.split(":")[0]] += 1  # kinds, of which there are few

    def _take(self, records: list[Record], numbers: list[int], job: Any) -> None:
        """Write one block's documents to the shards of their splits."""
        columns, text_bytes = job.result()
        self.runs.add([record.id for record in records], [record.line for record in records], numbers)
        split = np.array(numbers)
        for number in np.unique(split[split != duplicates.REMOVED]):
            name, chosen = self.plan.names[number], split == number
            mine = [record for record, is_mine in zip(records, chosen, strict=True) if is_mine]
            kept = columns.where(chosen)
            self.tallies[name].add(kept, mine, text_bytes[chosen])
            self._shard(name).add(kept)
        if not self.plan.config.allow_no_target:
            for tally in self.tallies.values():
                if tally.first_without_target:
                    what = "no token of it is a target, so nothing is learned from it"
                    raise UserError(f"{tally.first_without_target}: {what}. Mend it, or allow_no_target=true.")

    def _shard(self, name: str) -> tokens.ShardWriter:
        if name not in self.shards:
            path = self.plan.work / "dataset" / tokens.shard_name(name, self.number)
            self.shards[name] = tokens.ShardWriter(path, tokens.schema_for(self.tokenizer.vocab_size))
        return self.shards[name]

    def _finish(self, *, secrets: dict[str, Any]) -> None:
        """Close and flush everything, then write the marker that says so."""
        plan = self.plan
        for writer in self.shards.values():
            writer.close()
            files.fsync_path(writer.path)
        files.fsync_path(plan.work / "dataset")
        files.fsync_path(plan.path("units", self.number, ".bad.jsonl"))
        self.runs.close()
        marker = {
            "num_records": self.num_records,
            "bad_by_reason": dict(self.bad),
            "secrets": secrets,
            "splits": {name: tally.document() for name, tally in self.tallies.items()},
        }
        files.write_durable(plan.path("units", self.number, ".json"), json.dumps(marker).encode())
