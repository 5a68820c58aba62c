"""The files of an evaluation: `report.json` for programs, `report.csv` for tables, `samples.ndjson` by sample, and
`report.html` for people.

Rule: every number stands in `report.json`; the other files repeat or detail it. Nothing in `PAYLOAD` depends on the
time, so an equal evaluation has an equal content digest. The page is no part of it: it also shows the curves of the
run that the model comes from, with its speed. Texts and settings have their secrets masked here, after scoring.
"""

import csv
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from codex_accel import files, redaction, report_page, text_stream
from codex_accel.curves import Curves
from codex_accel.samples import Overview

REPORT, TABLE, SAMPLES, PAGE = "report.json", "report.csv", "samples.ndjson", "report.html"
PAYLOAD = (REPORT, TABLE, SAMPLES)
ANSWERS = ("references", "choices", "output")  # which follow the prompt
TEXTS = ("id", "prompt", *ANSWERS, "skipped")  # of a line
NAMED_IN = 1024  # characters of a prompt's end in which a name may stand that makes what follows a secret


def write(
    folder: Path, *, report: dict[str, Any], samples: Iterable[dict[str, Any]], curves: Curves | None = None
) -> None:
    """Write the files of `PAYLOAD` and the page into `folder`.

    What the samples tell together (`samples.Overview`) is added to `report` as `overview`, by task if it has
    `settings.tasks`. `curves` are those of the run that the model comes from.
    """
    overview = Overview()
    with open(folder / SAMPLES, "w", encoding="utf-8", newline="") as stream:
        for number, sample in enumerate(map(masked, samples), 1):
            stream.write(ndjson_line(sample))
            overview.add(number, sample)
    tasks = tasks_of(report)
    together = overview.of() if tasks is None else {task: overview.of(task) for task in tasks}
    whole = {**report, "overview": together}
    for key in ("settings", "facts"):
        if key in report:
            whole[key] = _masked_below(report[key])
    text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / REPORT).write_text(text + "\n", encoding="utf-8")
    with open(folder / TABLE, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)  # or a lone CR ends a row
        writer.writerow(["task", "metric", "value", "low", "high"])
        writer.writerows([[_cell(cell) for cell in row] for row in rows(report)])
    page = report_page.render(whole, lines=overview.shown(), curves=curves)
    (folder / PAGE).write_text(page, encoding="utf-8")


def masked(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of `samples.ndjson` with the secrets of its texts masked, and their number as `num_findings`.

    Digests beside the texts are those of what is shown: one of a short secret could be guessed. A line of a document
    has no texts, and stays as it is.
    """
    texts = {name: line[name] for name in TEXTS if isinstance(line.get(name), str | list)}
    if not texts:
        return dict(line)
    before = line.get("prompt", "")[-NAMED_IN:]
    num_findings = line.get("num_findings", 0)  # in what the model wrote, before it was scored
    found = {**line}
    for name, text in texts.items():
        shown = []
        for each in text if isinstance(text, list) else [text]:
            seen = text_stream.masked(each, before=before if name in ANSWERS else "")
            shown.append(seen.text)
            num_findings += seen.num_findings
        found[name] = shown if isinstance(text, list) else shown[0]
        if f"{name}_sha256" in line and found[name] != text:
            whole = json.dumps(shown, ensure_ascii=False) if isinstance(text, list) else shown[0]
            found[f"{name}_sha256"] = files.sha256_bytes(whole.encode())
    return {**found, "num_findings": num_findings}


def _masked_below(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings or facts with their secrets masked; the names of tasks and metrics stay."""
    return {name: _masked_below(value) if name == "tasks" else redaction.value(value) for name, value in values.items()}


def tasks_of(report: dict[str, Any]) -> list[str] | None:
    """Names of the tasks, by which a report is parted; None if it has none: losses, or predictions of a file."""
    tasks = report.get("settings", {}).get("tasks")
    return list(tasks) if tasks else None


def rows(report: dict[str, Any]) -> Iterable[tuple[str, str, Any, float | None, float | None]]:
    """(task or "", metric, value, low, high) of every metric; low and high are None where there is no interval."""
    for task in tasks_of(report) or [""]:
        metrics = report["metrics"][task] if task else report["metrics"]
        intervals = report.get("intervals", {})
        intervals = intervals.get(task, {}) if task else intervals
        for name, value in flatten(metrics):
            bounds = intervals.get(name) or {"low": None, "high": None}
            yield task, name, value, bounds["low"], bounds["high"]


def flatten(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested numbers as rows: `{"lzma": {"together": 1.5}}` gives `("lzma.together", 1.5)`."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def ndjson_line(value: dict[str, Any]) -> str:
    """A line of NDJSON; what other readers take for the end of a line, and a lone surrogate, is escaped."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return re.sub("[\x85\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found.group()):04x}", text) + "\n"


def _cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: such text gets an apostrophe before it; numbers stay numbers.

    Which beginnings are dangerous: OWASP, "CSV Injection" (= + - @, tab, CR, LF, and the full-width forms).
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r\n＝＋－＠")) else value
