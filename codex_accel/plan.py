"""The plan of a preparation: what is read, cut into units, and the folder that the work lies in.

Rule: a unit is a stretch of input that goes into one set of shards. What it gives depends on the input and the settings
alone, and a unit whose marker stands is whole; so any number of processes writes the same bytes, and a killed
preparation goes on.

The work folder holds `inventory/` (digests of the input), `survey/` and `decision.json` (who is in which split, where
that needs all records), `units/` (a marker, the bad records and the ids of each unit) and `dataset/` (the shards).
Process r of P does units r, r + P, r + 2P, ...
"""

import collections
import concurrent.futures
import fcntl
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codex_accel import chat, files, screening, sources
from codex_accel.errors import UserError
from codex_accel.records import BadRecord, Reader, Record, Render
from codex_accel.schema import PrepareConfig
from codex_accel.screening import Screen
from codex_accel.sources import FileFacts, RawFile, Unit
from codex_accel.tokenizer import FILES, Tokenizer, read_template
from codex_accel.workers import Workers

VERSION = 2  # of the bytes that a preparation writes: another one is another input digest
WORK_PREFIX = ".partial-"  # of the work folder, which lies beside the dataset
OF_UNIT = {"survey": r"(\d+)[-.]", "units": r"(\d+)[-.]", "dataset": r".*-(\d+)\.arrow"}  # names of a unit's files
BLOCK_RECORDS, BLOCK_CHARACTERS = 4096, 1 << 20  # read and tokenized at once, whichever is reached first
SAMPLE_CHARACTERS = 1 << 16  # of real text, on which the fast tokenization is compared with `tokenizers`
# Keys that do not change what a unit gives, and those whose content is digested apart.
NOT_INPUT = {
    "output_dir", "overwrite", "dry_run", "list", "list_split", "gc", "tokenizer", "sources", "max_bad_fraction",
    "num_threads", "verify", "allow_network", "safety",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is to be read, and where the work lies."""

    config: PrepareConfig
    work: Path
    inventory: list[FileFacts]
    names: list[str]  # of the splits, in order of their numbers
    renders: dict[str | None, Render]  # by the source's chat_template
    input_digest: str

    @functools.cached_property
    def units(self) -> list[Unit]:
        """Every unit, in order of the files."""
        return [unit for facts in self.inventory for unit in facts.units]

    def path(self, folder: str, unit: int, suffix: str) -> Path:
        """File of a unit in a folder of the work folder."""
        return self.work / folder / f"{unit:05d}{suffix}"

    def runs(self, folder: str) -> list[Path]:
        """The sorted entries of the records of every unit."""
        return sorted((self.work / folder).glob("*.run"))

    def place(self, unit: int, line: int) -> str:
        """Where a record stands, for people."""
        return f"{self.units[unit].raw.path}:{line}"

    def read(self, unit: int) -> Screen:
        """The records of a unit, without their secrets."""
        found = self.units[unit]
        reader = Reader(
            found,
            max_record_bytes=self.config.max_record_bytes,
            key=self.config.split.key,
            render=self.renders[found.raw.source.chat_template] if found.raw.source.messages else None,
        )
        return Screen(reader, on_secret=self.config.safety.on_secret)


def lock(work: Path) -> Any:
    """Keep every other preparation out of `work` for as long as the returned file is open."""
    path, is_held = work / ".lock", False
    while not is_held:
        work.mkdir(parents=True, exist_ok=True)
        stream = open(path, "a+")  # noqa: SIM115  kept open for as long as the work lasts
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            stream.close()
            raise UserError(f"{work}: {holder} prepares this dataset now. Wait for it, or stop it.") from error
        # Its last holder may have removed it, with the folder, after it was opened here.
        is_held = path.exists() and os.path.samestat(os.fstat(stream.fileno()), path.stat())
        if not is_held:
            stream.close()
    stream.truncate(0)
    stream.write(f"process {os.getpid()} on {os.uname().nodename}")
    stream.flush()
    return stream


def take_inventory(raw_files: Sequence[RawFile], work: Path, workers: Workers, *, unit_bytes: int) -> list[FileFacts]:
    """Digests and units of all files, each hashed by one process, over its threads."""
    folder = work / "inventory"
    folder.mkdir(parents=True, exist_ok=True)

    def one(number: int) -> None:
        facts = sources.inventory(raw_files[number], unit_bytes=unit_bytes)
        units = [[unit.start, unit.stop, unit.first_line, unit.sha256] for unit in facts.units]
        document = {"size": facts.size, "sha256": facts.sha256, "units": units}
        files.write_durable(folder / f"{number:05d}.json", json.dumps(document).encode())

    mine = range(workers.process, len(raw_files), workers.num_processes)
    with concurrent.futures.ThreadPoolExecutor(workers.num_threads) as pool:
        collections.deque(pool.map(one, mine), maxlen=0)
    workers.wait()
    result = []
    for number, raw in enumerate(raw_files):
        found = json.loads((folder / f"{number:05d}.json").read_bytes())
        units = tuple(Unit(raw, found["size"], *fields) for fields in found["units"])
        result.append(FileFacts(raw, found["size"], found["sha256"], units))
    return result


def digest_input(config: PrepareConfig, inventory: Sequence[FileFacts], tokenizer: Tokenizer) -> str:
    """SHA-256 over everything that the bytes of the dataset follow from: settings, files, tokenizer and masking.

    The tokenizer's files are hashed as they are now, whatever a manifest says of them.
    """
    keys = {key: value for key, value in config.model_dump(mode="json").items() if key not in NOT_INPUT}
    read = [
        {
            "path": str(facts.raw.path),
            "sha256": facts.sha256,
            "format": facts.raw.format,
            "source": facts.raw.source.model_dump(mode="json", exclude={"path"}),
            "template": _template_digest(facts.raw.source.chat_template),
        }
        for facts in inventory
    ]
    made_by = {name: files.sha256_file(path) for name in FILES if (path := tokenizer.folder / name).is_file()}
    masked_by = screening.identity(on_secret=config.safety.on_secret)
    document = {"version": VERSION, "settings": keys, "files": read, "tokenizer": made_by, "masking": masked_by}
    return files.sha256_bytes(json.dumps(document, sort_keys=True).encode())


def _template_digest(path: str | None) -> str | None:
    return files.sha256_file(Path(path)) if path else None


def start_or_go_on(plan: Plan) -> int:
    """Keep the finished units of the same input and settings, remove all else; returns how many there are."""
    document = {"input_digest": plan.input_digest}
    path = plan.work / "plan.json"
    is_whole = path.exists() and (plan.work / "dataset").is_dir()  # it gets another name when all is done
    if not is_whole or json.loads(path.read_bytes()) != document:
        path.unlink(missing_ok=True)  # first, so that nobody goes on with what is half removed
        files.fsync_path(plan.work)
        for folder in OF_UNIT:
            if (plan.work / folder).exists():
                shutil.rmtree(plan.work / folder)
        (plan.work / "decision.json").unlink(missing_ok=True)
        files.write_durable(path, json.dumps(document).encode())
    for folder in OF_UNIT:
        (plan.work / folder).mkdir(exist_ok=True)
    surveyed = {path.stem for path in (plan.work / "survey").glob("*.json")}
    done = {path.stem for path in (plan.work / "units").glob("*.json")}
    for folder, pattern in OF_UNIT.items():
        whole = surveyed if folder == "survey" else done
        for path in (plan.work / folder).iterdir():
            unit = re.match(pattern, path.name)
            if unit is None or unit[1] not in whole:
                path.unlink()
    return len(done)


def renders(raw_files: Sequence[RawFile], tokenizer: Tokenizer) -> dict[str | None, Render]:
    """What turns messages into parts, for each chat template that the sources name; None is the tokenizer's own."""
    result: dict[str | None, Render] = {}
    for raw in raw_files:
        path = raw.source.chat_template
        if raw.source.messages is None or path in result:
            continue
        text = tokenizer.chat_template if path is None else read_template(Path(path))
        if text is None:
            raise UserError(
                f"{raw.path}: holds messages, but the tokenizer '{tokenizer.folder}' has no chat template. "
                "Name a file in sources[].chat_template."
            )
        result[path] = chat.template(text, where=path or str(tokenizer.folder), **tokenizer.template_facts)
    return result


def first_texts(plan: Plan) -> list[str]:
    """The first texts of the input, of `SAMPLE_CHARACTERS` at most."""
    texts, left = [], SAMPLE_CHARACTERS
    for item in next(blocks(plan.read(0)), []):
        for part in item.parts if isinstance(item, Record) else ():
            if left > 0:
                texts.append(part.text[:left])
                left -= len(part.text)
    return texts


def blocks(reader: Screen) -> Iterator[list[Record | BadRecord]]:
    """What the reader gives, in blocks to be tokenized at once; where they end depends on the records alone."""
    block: list[Record | BadRecord] = []
    num_characters = 0
    for item in reader:
        block.append(item)
        if isinstance(item, Record):
            num_characters += sum(len(part.text) for part in item.parts)
        if len(block) >= BLOCK_RECORDS or num_characters >= BLOCK_CHARACTERS:
            yield block
            block, num_characters = [], 0
    if block:
        yield block


def share(plan: Plan, workers: Workers, folder: str) -> tuple[list[int], int, int]:
    """This process's units without a marker in `folder`; raw bytes of all of its units, and of those with one."""
    mine = range(workers.process, len(plan.units), workers.num_processes)
    left = [unit for unit in mine if not plan.path(folder, unit, ".json").exists()]
    total = sum(plan.units[unit].num_bytes for unit in mine)
    return left, total, total - sum(plan.units[unit].num_bytes for unit in left)
