"""Who is in which split and who is removed, where that depends on all records.

Rule: `exact`, `position` and the removal of duplicates read all input once before it is tokenized; `hash` and `given`
look at each record alone. Every process decides alike, from what the survey has left in the work folder.
"""

import bisect
import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from codex_accel import duplicates, files, near_duplicates, progress, splits
from codex_accel.errors import UserError
from codex_accel.plan import Plan, blocks, share
from codex_accel.records import Record
from codex_accel.schema import PrepareConfig
from codex_accel.workers import Workers

# (records, unit, index of the first) -> the records to write with the numbers of their splits, or duplicates.REMOVED
Assign = Callable[[list[Record], int, int], tuple[list[Record], list[int]]]
Indices = dict[int, np.ndarray]  # of records, by their unit


def needs_survey(config: PrepareConfig) -> bool:
    """Whether the split of a record, or whether it stays, depends on the others."""
    together = config.split.method in ("exact", "position")
    return together or config.duplicates == "remove" or config.near_duplicates is not None


def survey(plan: Plan, workers: Workers) -> None:
    """Read every unit once and leave the ids of its records, and their MinHash signatures if they are asked for."""
    left, total, done = share(plan, workers, "survey")
    with progress.bar("survey", total=total, done=done, unit="bytes") as show:
        for number in left:
            _survey_unit(plan, number, show, before=done)
            done += plan.units[number].num_bytes


def _survey_unit(plan: Plan, number: int, show: Callable[[int, str], None], *, before: int) -> None:
    reader, runs = plan.read(number), duplicates.RunWriter(plan.work / "survey", number)
    split = plan.names.index(str(plan.units[number].raw.source.split)) if plan.config.split.method == "given" else 0
    minhash = plan.path("survey", number, ".minhash")
    with open(minhash, "wb") as signatures:
        for block in blocks(reader):
            good = [item for item in block if isinstance(item, Record)]
            runs.add([record.id for record in good], [record.line for record in good], [split] * len(good))
            if plan.config.near_duplicates is not None and good:
                texts = ["\n".join(part.text for part in record.parts) for record in good]
                near_duplicates.signatures(texts).tofile(signatures)
            show(before + reader.num_bytes, "")
    files.fsync_path(minhash)
    runs.close()
    files.write_durable(plan.path("survey", number, ".json"), b"{}")


def decide(plan: Plan) -> None:
    """What the survey says about all records together, for every process: `decision.json` and `survey/*.gone`."""
    folder, units = plan.work / "survey", range(len(plan.units))
    repeated: Indices = collections.defaultdict(lambda: np.empty(0, dtype=np.uint32))
    if plan.config.duplicates == "remove" or plan.config.near_duplicates is not None:
        prefer_last = plan.config.split.method == "given"
        for unit, indices in duplicates.superfluous(plan.runs("survey"), prefer_last_split=prefer_last):
            repeated[unit] = np.concatenate([repeated[unit], indices])
    near, found = _find_near(plan, repeated) if plan.config.near_duplicates is not None else (None, {})
    gone: Indices = collections.defaultdict(lambda: np.empty(0, dtype=np.uint32))
    if plan.config.duplicates == "remove":
        for unit in units:
            gone[unit] = np.concatenate([repeated[unit], np.array(found.get(unit, []), dtype=np.uint32)])
    for unit in units:
        files.write_durable(plan.path("survey", unit, ".gone"), np.sort(gone[unit]).tobytes())
    left = [duplicates.num_entries(folder, unit) - len(gone[unit]) for unit in units]
    decision: dict[str, Any] = {"near": near, "num_left": left, "cuts": []}
    if plan.config.split.method == "exact":

        def ranks() -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
            for unit in units:
                for entries in duplicates.read_unit(folder, unit):
                    left = entries[~np.isin(entries["index"], gone[unit])]
                    yield unit, splits.ranks(left["high"], seed=plan.config.split.seed), left["index"]

        decision["cuts"] = splits.exact_cuts(ranks, plan.config.split.ratios)
    files.write_durable(plan.work / "decision.json", json.dumps(decision).encode())


def _find_near(plan: Plan, repeated: Indices) -> tuple[dict[str, Any], dict[int, list[int]]]:
    """List near duplicates in `near.jsonl`, looking at one record of each content; facts, and indices for each unit.

    With `given` splits the one named last is looked at first, so that it keeps what the others give away.
    """
    folder, threshold = plan.work / "survey", float(plan.config.near_duplicates or 0.0)
    units = list(range(len(plan.units)))
    if plan.config.split.method == "given":
        units.sort(key=lambda unit: -plan.names.index(str(plan.units[unit].raw.source.split)))
    seen: list[np.ndarray] = []  # the entries looked at, in order
    starts: list[int] = []  # number of the first entry of each of these arrays

    def in_order() -> Iterator[np.ndarray]:
        num_before = 0
        for unit in units:
            with open(plan.path("survey", unit, ".minhash"), "rb") as stream:
                for entries in duplicates.read_unit(folder, unit):
                    size = len(entries) * near_duplicates.NUM_PERMUTATIONS
                    signatures = np.fromfile(stream, dtype=np.uint32, count=size).reshape(len(entries), -1)
                    kept = ~np.isin(entries["index"], repeated[unit])
                    seen.append(entries[kept])
                    starts.append(num_before)
                    num_before += int(kept.sum())
                    yield signatures[kept]

    def entry(number: int) -> np.void:
        place = bisect.bisect_right(starts, number) - 1
        return seen[place][number - starts[place]]

    places = collections.defaultdict(list)
    with open(plan.work / "near.jsonl", "w", encoding="utf-8") as listing:
        for number, earlier, similarity in near_duplicates.find(in_order(), threshold=threshold):
            found, kept = entry(number), entry(earlier)
            places[int(found["unit"])].append(int(found["index"]))
            line = {
                "place": plan.place(int(found["unit"]), int(found["line"])),
                "of": plan.place(int(kept["unit"]), int(kept["line"])),
                "similarity": round(similarity, 4),
            }
            listing.write(json.dumps(line, ensure_ascii=False) + "\n")
    num_found = sum(map(len, places.values()))
    num_removed = num_found if plan.config.duplicates == "remove" else 0
    return {"threshold": threshold, "num_found": num_found, "num_removed": num_removed}, places


def assignment(plan: Plan) -> Assign:
    """How records find their split, from the settings and the decision of the survey."""
    split = plan.config.split
    surveyed = needs_survey(plan.config)
    decision = json.loads((plan.work / "decision.json").read_bytes()) if surveyed else {}
    is_single = split.method == "position" and sum(decision["num_left"]) == 1
    numbers_of = {"hash": _by_hash, "given": _given, "exact": _exact, "position": _by_position}[split.method](
        plan, decision
    )

    @functools.lru_cache(maxsize=1)
    def gone_of(unit: int) -> np.ndarray:
        path = plan.path("survey", unit, ".gone")
        return np.fromfile(path, dtype=np.uint32) if surveyed else np.empty(0, dtype=np.uint32)

    def assign(records: list[Record], unit: int, first: int) -> tuple[list[Record], list[int]]:
        gone = gone_of(unit)
        indices = np.arange(first, first + len(records))
        is_gone = np.zeros(len(records), dtype=bool)
        low, high = np.searchsorted(gone, [first, first + len(records)])  # they may be millions, so none is looked at
        is_gone[gone[low:high] - first] = True
        if is_single:
            return _cut(plan, records, is_gone.tolist())
        numbers = np.array(numbers_of(records, unit, indices, gone))
        return records, np.where(is_gone, duplicates.REMOVED, numbers).tolist()

    return assign


# (records, unit, indices (D,), sorted indices of the unit's removed records) -> numbers of their splits (D,)
NumbersOf = Callable[[list[Record], int, np.ndarray, np.ndarray], Any]


def _by_hash(plan: Plan, decision: dict[str, Any]) -> NumbersOf:
    number_of = splits.by_hash(plan.config.split.ratios, seed=plan.config.split.seed)
    return lambda records, unit, indices, gone: [
        number_of(record.id.hex() if record.key is None else record.key) for record in records
    ]


def _given(plan: Plan, decision: dict[str, Any]) -> NumbersOf:
    of_unit = [plan.names.index(str(unit.raw.source.split)) for unit in plan.units]
    return lambda records, unit, indices, gone: [of_unit[unit]] * len(records)


def _exact(plan: Plan, decision: dict[str, Any]) -> NumbersOf:
    cuts = [tuple(cut) for cut in decision["cuts"]]

    def numbers_of(records: list[Record], unit: int, indices: np.ndarray, gone: np.ndarray) -> list[int]:
        heads = np.array([int.from_bytes(record.id[:8], "big") for record in records], dtype=np.uint64)
        ranks = splits.ranks(heads, seed=plan.config.split.seed)
        return splits.by_cuts(ranks, cuts, unit=unit, indices=indices)

    return numbers_of


def _by_position(plan: Plan, decision: dict[str, Any]) -> NumbersOf:
    base = np.cumsum([0, *decision["num_left"]])
    edges = splits.edges(int(base[-1]), plan.config.split.ratios)
    return lambda records, unit, indices, gone: np.searchsorted(
        edges, base[unit] + indices - np.searchsorted(gone, indices), side="right"
    )


def _cut(plan: Plan, records: list[Record], is_gone: list[bool]) -> tuple[list[Record], list[int]]:
    """`position` with a single record: one long text, cut by characters; the others are removed."""
    pieces, numbers = [], []
    for record, out in zip(records, is_gone, strict=True):
        if out:
            pieces.append(record)
            numbers.append(duplicates.REMOVED)
            continue
        if len(record.parts) > 1:
            raise UserError(
                f"{record.file}:{record.line}: the only record has a prompt, so position cannot cut it. Use hash."
            )
        texts = splits.cut_text(record.parts[0].text, plan.config.split.ratios)
        for number, text in enumerate(texts.values()):
            if text:
                pieces.append(dataclasses.replace(record, parts=(record.parts[0]._replace(text=text),)))
                numbers.append(number)
    return pieces, numbers
