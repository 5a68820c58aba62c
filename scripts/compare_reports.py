"""Hold two evaluations, or two training runs, against each other.

examples:
  python scripts/compare_reports.py runs/base/test runs/tuned/test
  python scripts/compare_reports.py runs/base/test runs/tuned/test show=5 --json
  python scripts/compare_reports.py runs/base/train runs/tuned/train

Evaluations: each metric of both, the difference b - a with its paired bootstrap interval and p-value over the samples
that both have scored, and the samples that changed, most changed first. Runs: what they reached, and in what their
configuration and surroundings differ. Exit code 0, whatever the difference.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from codex_accel import cli, curves, offline, redaction
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import CompareConfig
from codex_accel.visible import escaped

WIDTH = 110  # characters of a sample's text on a line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit code."""
    config = cli.parse(CompareConfig, argv, doc=__doc__, stage="compare_reports", positional=["a", "b"])
    offline.enforce(allow_network=config.allow_network)
    a, b = Path(config.a), Path(config.b)
    for key, path in (("a", a), ("b", b)):
        if not path.is_dir():
            what = f"'{path}': no such folder. Give an evaluation or a run folder."
            raise UserError(config.problem(key, what))
    are_runs = [curves.is_run(path) for path in (a, b)]
    if are_runs[0] != are_runs[1]:
        run, other = (a, b) if are_runs[0] else (b, a)
        what = f"'{run}' is a training run and '{other}' is none. Compare two runs, or two evaluations."
        raise UserError(config.problem("b", what))

    if are_runs[0]:
        from codex_accel import run_comparison

        document = run_comparison.compare(a, b, config)
    else:
        from codex_accel import comparison

        evaluations = [comparison.read(path, verify=config.verify, key=key) for key, path in (("a", a), ("b", b))]
        document = comparison.compare(*evaluations, config)
    document = redaction.value(document)  # before any text is cut: a part of a secret is not known as one
    if config.as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        lines = _run_lines(document) if are_runs[0] else _evaluation_lines(document)
        print("\n".join(map(escaped, lines)))  # nothing that was compared can command the terminal
    return 0


# --- evaluations --------------------------------------------------------------------------------------------------


def _evaluation_lines(document: Mapping[str, Any]) -> Iterable[str]:
    for side in ("a", "b"):
        yield f"{side}  {document[side]['path']}  manifest {document[side]['manifest_digest'][:12]}"
    yield from _difference_lines("they differ in", document["differences"])
    yield from (f"note: {note}" for note in document["notes"])
    bootstrap = document["bootstrap"]
    for task, part in document["parts"].items():
        yield ""
        yield from _part_lines(task, part, f"{bootstrap['confidence']:.4g}")
    yield ""
    drawn = f"{bootstrap['num_resamples']:,} resamples, seed {bootstrap['seed']}"
    yield f"* p < {document['alpha']:g}; of many metrics or tasks, some fall below it by chance. Paired bootstrap over"
    yield f"  the samples of both, {drawn}. rises, falls: samples by their own score."


def _part_lines(task: str, part: Mapping[str, Any], confidence: str) -> Iterable[str]:
    counts = part["samples"]
    what = "documents" if part["kind"] == "losses" else "samples"
    yield f"{f'{task}: ' if task else ''}{counts['num_both']:,} {what} in both"
    for key, count in counts.items():
        if key != "num_both" and count:
            yield f"  {key.removeprefix('num_').replace('_', ' ')}: {count:,}"
    yield from (f"note: {note}" for note in part["notes"])
    changed = part["changed"]
    rows = [("", "a", "b", "b - a", f"interval {confidence}", "p", "rises", "falls")]
    for name, value in part["metrics"].items():
        interval = "" if value["low"] is None else f"[{value['low']:+.4g}, {value['high']:+.4g}]"
        difference = _number(value["difference"], sign="+") if value["compares"] else "does not compare"
        moves = changed["moves"].get("nll" if name == "loss" else name)
        counts_of_moves = [f"{moves[move]:,}" if moves else "" for move in ("rises", "falls")]
        rows.append((name, _number(value["a"]), _number(value["b"]), difference, interval, _p(value), *counts_of_moves))
    yield from _columns(rows)
    yield f"{changed['num']:,} of {counts['num_both']:,} {what} changed"
    if changed["samples"]:
        yield f"the {len(changed['samples'])} that changed most:"
    for sample in changed["samples"]:
        yield from _document_lines(sample) if "record_id" in sample else _sample_lines(sample)


def _p(value: Mapping[str, Any]) -> str:
    """A p-value with a star if it is small, which is as wide as the blank of the others."""
    p = value["p_value"]
    if p is None:
        return ""
    return f"{'< 0.0001' if p < 0.0001 else f'{p:.4f}'} {'*' if value['below_alpha'] else ' '}"


def _document_lines(document: Mapping[str, Any]) -> Iterable[str]:
    losses = " -> ".join(map(_number, document["loss"]))
    nll = document["nll"][1] - document["nll"][0]
    yield f"  {document['record_id']}  loss {losses}  nll {nll:+.4g}  {document['num_tokens'][0]:,} tokens"


def _sample_lines(sample: Mapping[str, Any]) -> Iterable[str]:
    scores = "  ".join(
        f"{name} {' -> '.join(map(_number, pair))}" for name, pair in sample["scores"].items() if pair[0] != pair[1]
    )
    given = f"  id {sample['id']}" if "id" in sample else ""
    yield f"  line {sample.get('line')}{given}  {scores or 'same scores'}"
    if "choices" in sample:
        choices = {"right": sample["answer"], "a": sample["predicted"][0], "b": sample["predicted"][1]}
        texts = {name: sample["choices"][number] for name, number in choices.items()}
    else:
        texts = {"ref": sample["references"][0], "a": sample["output"][0], "b": sample["output"][1]}
    shared = _shared_prefix(texts["a"], texts["b"]) if texts["a"] != texts["b"] else 0
    for name, text in texts.items():
        start = max(0, shared - WIDTH // 3) if name in ("a", "b") else 0
        shown = text[start : start + WIDTH]
        yield f"    {name:<5} {'...' * bool(start)}{shown}{'...' * (len(text) > start + WIDTH)}"


def _shared_prefix(a: str, b: str) -> int:
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# --- runs ---------------------------------------------------------------------------------------------------------


def _run_lines(document: Mapping[str, Any]) -> Iterable[str]:
    for side in ("a", "b"):
        run = document[side]
        state = "complete" if run["is_complete"] else "not complete"
        yield f"{side}  {run['path']}  step {run['last_step']:,}, {state}"
        if run["num_damaged_lines"]:
            yield f"note: {run['num_damaged_lines']} damaged lines in its metrics.ndjson"
    yield from (f"note: {note}" for note in document["notes"])
    for split, measured in document["splits"].items():
        for what, pair in measured.items():
            if any(one is not None for one in pair):
                best = f", by {document['best_metric']}" if what == "best" else ""
                yield from ("", f"{split}, {what.replace('_', ' ')}{best}")
                yield from _side_by_side(pair)
    yield from ("", *_difference_lines("configurations differ in", document["configuration"]))
    yield from _difference_lines("runs differ in", document["facts"])
    yield from _difference_lines("surroundings differ in", document["environment"])


def _side_by_side(pair: Sequence[Any]) -> Iterable[str]:
    a, b = ({"loss": one} if isinstance(one, float) else one or {} for one in pair)
    rows = [("", "a", "b", "b - a")]
    for name in dict.fromkeys([*a, *b]):
        x, y = a.get(name), b.get(name)
        numbers = curves.is_finite(x) and curves.is_finite(y)
        rows.append((name, _number(x), _number(y), _number(y - x, sign="+") if numbers else ""))
    return _columns(rows)


# --- both ---------------------------------------------------------------------------------------------------------


def _difference_lines(title: str, found: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    if not found:
        yield f"{title}: nothing"
        return
    yield f"{title}:"
    rows = [(f"{one['key']}", *(_shown(one[side]) for side in ("a", "b"))) for one in found]
    yield from _columns([("", "a", "b"), *rows], left=True)


def _shown(value: Any) -> str:
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 48 else f"{text[:45]}..."


def _number(value: Any, *, sign: str = "") -> str:
    if not curves.is_finite(value):
        return "none" if value is None else str(value)
    return f"{value:{sign},}" if isinstance(value, int) else f"{value:{sign}.6g}"


def _columns(rows: Sequence[Sequence[str]], *, left: bool = False) -> Iterable[str]:
    """Rows of cells as lines, the first column to the left, the others to the right unless `left`."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *others = (
            f"{cell:<{width}}" if left or not column else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield f"  {'  '.join([first, *others])}".rstrip()


if __name__ == "__main__":
    cli.run(main)
