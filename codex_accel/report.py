"""The files of an evaluation: `report.json` for programs, `report.csv` for tables, `samples.ndjson` by document.

Rule: every number stands in `report.json`; the other files repeat or detail it. Nothing in them depends on the time, so
an equal evaluation has an equal content digest.
"""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PAYLOAD = ("report.json", "report.csv", "samples.ndjson")


def write(folder: Path, *, report: dict[str, Any], samples: Iterable[dict[str, Any]]) -> None:
    """Write the files of `PAYLOAD` into `folder`."""
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    with open(folder / "report.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["metric", "value"])
        writer.writerows(flatten(report["metrics"]))
    with open(folder / "samples.ndjson", "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(sample, ensure_ascii=False, allow_nan=False) + "\n" for sample in samples)


def flatten(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested numbers as rows: `{"lzma": {"together": 1.5}}` gives `("lzma.together", 1.5)`."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
