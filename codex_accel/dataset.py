"""A prepared dataset as a whole: what its settings must satisfy, its counts, its report and its manifest.

Rule: every record that is read is counted once, in a split, as removed, or in the quarantine; what is counted stands in
the manifest, and every number of `report.html` in `report.json`.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from codex_accel import dataset_page, duplicates, files, manifest, packing_cost, redaction, screening, tally, tokens
from codex_accel.errors import UserError
from codex_accel.plan import Plan
from codex_accel.schema import PrepareConfig
from codex_accel.sources import RawFile
from codex_accel.tokenizer import Tokenizer

QUARANTINE, DUPLICATES, NEAR = "quarantine.jsonl", "duplicates.jsonl", "near_duplicates.jsonl"
REPORT_JSON, REPORT_PAGE = "report.json", "report.html"
NUM_LISTED = 20  # bad records on the page


def split_names(config: PrepareConfig) -> list[str]:
    """The splits in their order."""
    if config.split.method == "given":
        return list(dict.fromkeys(str(source.split) for source in config.sources))
    return list(config.split.ratios)


def require_splits(config: PrepareConfig, raw_files: list[RawFile]) -> None:
    """Raise UserError unless split.method, split.key and the sources go together and names of splits fit in files."""
    given = config.split.method == "given"
    problems = []
    if len(split_names(config)) >= duplicates.REMOVED or "removed" in split_names(config):
        what = f"at most {duplicates.REMOVED - 1} splits are possible, and none may be called removed."
        problems.append(config.problem("sources" if given else "split.ratios", what))
    for name in split_names(config):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
            mend = "Use up to 100 letters, digits, '_', '.' and '-'."
            what = f"{name!r} names no split, because files are named after it. {mend}"
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
        what = f"{config.split.key!r} is a field, and the text file '{texts[0]}' has none. Remove it, or that file."
        problems.append(config.problem("split.key", what))
    if problems:
        raise UserError(*problems)


# --- from the units to the whole ----------------------------------------------------------------------------------


def finish(plan: Plan, tokenizer: Tokenizer, *, name: str, tokenizer_digest: str) -> tuple[dict[str, Any], list[Any]]:
    """Write the lists and the report beside the shards; returns the manifest's facts and sources.

    Raises: UserError if there is no record, too many bad ones, or an empty split.
    """
    folder = plan.work / "dataset"
    bad: Counter[str] = Counter()
    secrets = []  # counts of each unit
    counts = []  # (records, bad records) of each unit
    merged = {split: tally.merge([]) for split in plan.names}
    for unit in range(len(plan.units)):  # one marker at a time: with their examples they are large together
        marker = json.loads(plan.path("units", unit, ".json").read_bytes())
        bad.update(marker["bad_by_reason"])
        secrets.append(marker["secrets"])
        counts.append((marker["num_records"], sum(marker["bad_by_reason"].values())))
        merged = {split: tally.merge([merged[split], marker["splits"][split]]) for split in plan.names}
    _join(folder / QUARANTINE, [plan.path("units", unit, ".bad.jsonl") for unit in range(len(plan.units))])
    num_records = sum(count for count, _ in counts)
    _require_records(plan, num_records, bad, folder / QUARANTINE)
    with open(folder / DUPLICATES, "w", encoding="utf-8") as listing:
        members, repeated = duplicates.count(plan.runs("units"), plan.names, place=plan.place, listing=listing)
    if not repeated["num_groups"]:
        (folder / DUPLICATES).unlink()
    decision = plan.work / "decision.json"
    repeated["near"] = json.loads(decision.read_bytes())["near"] if decision.exists() else None
    if repeated["near"] is not None:
        shutil.copyfile(plan.work / "near.jsonl", folder / NEAR)
    splits = {split: {**members[split].facts(), **_split_facts(folder, split, merged[split])} for split in plan.names}
    _require_splits_filled(plan.config, splits, num_records)
    sources = _sources(plan, counts)
    facts = {
        "input_digest": plan.input_digest,
        "num_records": num_records,
        "num_bad": sum(bad.values()),
        "bad_by_reason": dict(bad.most_common()),
        "secrets": screening.facts(secrets, on_secret=plan.config.safety.on_secret),
        "split": plan.config.split.model_dump(),
        "vocab_size": tokenizer.vocab_size,
        "tokenized_by": tokenizer.engine,
        "bos_id": tokenizer.bos_id if plan.config.add_bos else None,  # as placed; None too where there is none
        "eos_id": tokenizer.eos_id if plan.config.add_eos else None,
        "duplicates": {key: value for key, value in repeated.items() if key != "largest"},
        "splits": splits,
    }
    report = {
        "format_version": 1,
        "name": name,
        **{key: facts[key] for key in ("num_records", "num_bad", "bad_by_reason", "secrets")},
        "tokenizer": {
            "path": os.path.relpath(tokenizer.folder),
            "vocab_size": tokenizer.vocab_size,
            "engine": tokenizer.engine,
            "content_digest": tokenizer_digest,
        },
        "settings": redaction.value(
            {
                key: plan.config.model_dump(mode="json")[key]
                for key in ("split", "add_bos", "add_eos", "duplicates", "near_duplicates", "max_record_bytes")
            }
        ),
        "sources": sources,
        "splits": splits,
        "duplicates": {**repeated, "listed_in": DUPLICATES if repeated["num_groups"] else None},
        "examples": {split: [example for _, example in merged[split]["examples"]] for split in plan.names},
        "quarantine": _first_bad(folder / QUARANTINE, facts["num_bad"]),
    }
    if not bad:
        (folder / QUARANTINE).unlink()
    write_report(folder, report)
    return facts, sources


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """`report.json` and the page made from it."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / REPORT_JSON).write_text(text + "\n", encoding="utf-8")
    (folder / REPORT_PAGE).write_text(dataset_page.render(report), encoding="utf-8")


def _join(final: Path, pieces: Iterable[Path]) -> None:
    with open(final, "wb") as stream:
        for piece in pieces:
            with open(piece, "rb") as part:
                shutil.copyfileobj(part, stream)


def _first_bad(path: Path, num_bad: int) -> dict[str, Any]:
    with open(path, encoding="utf-8") as stream:
        lines = [json.loads(line) for _, line in zip(range(NUM_LISTED), stream, strict=False)]
    return {"num_listed": num_bad, "first": lines}


def _split_facts(folder: Path, split: str, merged: dict[str, Any]) -> dict[str, Any]:
    """Counts of one split, its lengths, and what each packing would cost."""
    sums = merged["sums"]
    num_tokens = sums["num_tokens"]
    lengths, counts = np.array(merged["lengths"], dtype=np.int64).reshape(-1, 2).T
    in_order = tokens.lengths_of(folder, split)
    return {
        **sums,
        "bytes_per_token": sums["num_bytes"] / num_tokens if num_tokens else 0.0,
        "unknown_fraction": sums["num_unknown_tokens"] / num_tokens if num_tokens else 0.0,
        "length_percentiles": packing_cost.percentiles(lengths, counts),
        "length_histogram": packing_cost.histogram(lengths, counts),
        "packing": packing_cost.costs(lengths, counts, in_order),
    }


def _sources(plan: Plan, counts: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """How the manifest records the raw files, from (records, bad records) of each unit."""
    result, unit = [], 0
    for facts in plan.inventory:
        mine = counts[unit : unit + len(facts.units)]
        unit += len(facts.units)
        result.append(
            {
                "path": str(facts.raw.path),
                "format": facts.raw.format,
                "size": facts.size,
                "sha256": facts.sha256,
                "num_records": sum(good for good, _ in mine),
                "num_bad": sum(bad for _, bad in mine),
            }
        )
    return result


def _require_records(plan: Plan, num_records: int, bad: Counter[str], quarantine: Path) -> None:
    config, num_bad = plan.config, sum(bad.values())
    seen = num_records + num_bad
    reasons = "; ".join(f"{count} x {reason}" for reason, count in bad.most_common(3))
    if not num_records:
        why = f"{reasons}. They are listed in {quarantine}" if num_bad else "The files hold blank lines"
        raise UserError(config.problem("sources", f"no usable record in {seen}: {why}. Mend them, or name others."))
    if num_bad > config.max_bad_fraction * seen:
        limit = f"more than max_bad_fraction = {config.max_bad_fraction}"
        what = f"{num_bad} of {seen} records are bad, {limit}: {reasons}. They are listed in {quarantine}."
        raise UserError(config.problem("max_bad_fraction", what))


def _require_splits_filled(config: PrepareConfig, splits: dict[str, Any], num_records: int) -> None:
    empty = [name for name, split in splits.items() if not split["num_records"]]
    if empty:
        given = config.split.method == "given"
        mend = "Name other files for it" if given else "Change the shares, or add data"
        what = f"{', '.join(empty)} came out empty from {num_records} records. {mend}."
        raise UserError(config.problem("sources" if given else "split.ratios", what))


def seal(
    plan: Plan, folder: Path, final: Path, *, parents: list[Any], sources: list[Any], facts: dict[str, Any]
) -> str:
    """Write the manifest, give `folder` its final name and remove the work folder; returns the manifest digest."""
    digest = manifest.seal(
        folder,
        kind="dataset",
        final=final,
        payload=[path.name for path in folder.glob("*.arrow")],
        config=plan.config,
        parents=parents,
        sources=sources,
        facts=facts,
    )
    files.take_name(folder, final)
    files.remove_folder(plan.work)
    return digest


def print_summary(final: Path, facts: dict[str, Any]) -> None:
    """What came out, for the terminal."""
    for name, split in facts["splits"].items():
        print(
            f"{name:<12} {split['num_records']:>9,} records  {split['num_tokens']:>12,} tokens  "
            f"{split['bytes_per_token']:.2f} bytes a token  {split['num_duplicates']} duplicates  "
            f"{split['num_shared']} also in another split"
        )
    repeated = facts["duplicates"]
    near = repeated["near"] or {"num_found": 0, "num_removed": 0}
    if repeated["num_duplicates"]:
        num_removed = repeated["num_removed"] - near["num_removed"]
        print(
            f"duplicates   {repeated['num_duplicates']:>9,} records beyond the first of their content, {num_removed:,} "
            f"removed; listed in {final / DUPLICATES}"
        )
    if near["num_found"]:
        print(
            f"near ones    {near['num_found']:>9,} records, {near['num_removed']:,} removed; listed in {final / NEAR}"
        )
    if facts["secrets"]["num_findings"] or facts["secrets"]["bypass_reason"]:
        print(screening.summary(facts["secrets"]))
    if facts["num_bad"]:
        print(f"quarantine   {facts['num_bad']:>9,} records in {final / QUARANTINE}, by reason:")
        for reason, count in facts["bad_by_reason"].items():
            print(f"{count:>22,} x {reason}")
    print(f"report   {final / REPORT_PAGE}")
