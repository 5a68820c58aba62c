"""Two evaluations side by side: each metric with the interval of its difference, and the samples that changed.

Rule: only samples that both have scored are compared, each with itself; the others are counted. What else differs
(data, settings, tokenizer) is told before any number, and a number that does not compare gets no difference.
"""

import collections
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from codex_accel import files, manifest, metrics, report, uncertainty
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import CompareConfig

LOSSES = "losses"  # the kind of a part that scores documents; the others are those of metrics.load
BY_TOKENS = ("loss", "perplexity", "token_accuracy")  # what a tokenizer decides too
SAME_LOSS = 1e-5  # relative; what batch sizes may change
SAME_VALUE = 1e-9  # relative; what the same code computes twice
_ASKED = ("prompt_sha256", "references_sha256", "scores")
NEEDED = {  # of each line, by kind of part
    LOSSES: ("num_tokens", "num_target_tokens", "num_correct", "num_bytes", "nll", "loss"),
    "generate": (*_ASKED, "references", "output"),
    "choice": (*_ASKED, "choices", "loglikelihoods", "answer", "predicted"),
}
Key = tuple[str, int]  # id, which of the lines with this id
Lines = dict[Key, dict[str, Any]]


@dataclass(frozen=True)
class Part:
    """One task of an evaluation, or all of it where it has none."""

    kind: str
    metrics: dict[str, dict[str, Any]]  # asked for, with their settings
    values: dict[str, Any]  # as reported
    lines: Lines
    num_skipped: int


@dataclass(frozen=True)
class Evaluation:
    """An evaluation folder."""

    path: Path
    manifest_digest: str
    report: dict[str, Any]
    parts: dict[str, Part]  # by task; "" where there are no tasks


def read(path: Path, *, verify: bool, key: str) -> Evaluation:
    """The evaluation in a folder. Raises UserError if it holds none, or is damaged."""
    manifest.require(path, kinds=["evaluation"], verify=verify, key=key)
    try:
        document = json.loads((path / report.REPORT).read_bytes())
        lines: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
        with open(path / report.SAMPLES, encoding="utf-8", newline="\n") as stream:
            for text in stream:
                line = json.loads(text)
                lines[line.get("task") or ""].append(line)
        tasks = report.tasks_of(document)
        parts = {
            task: _part(document, task, document["metrics"][task] if task else document["metrics"], lines[task])
            for task in tasks or [""]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{key} = '{path}': cannot be read ({what}). Evaluate again with this version.") from error
    return Evaluation(path, files.sha256_file(path / manifest.MANIFEST), document, parts)


def _part(document: Mapping[str, Any], task: str, values: dict[str, Any], lines: list[dict[str, Any]]) -> Part:
    settings = document["settings"]["tasks"][task] if task else document["settings"]
    asked = settings.get("metrics", {})
    kind = settings.get("kind", "generate") if task or "metrics" in settings else LOSSES
    kept: Lines = {}
    seen: collections.Counter[str] = collections.Counter()
    for line in lines:
        if "skipped" in line:
            continue
        id_ = line["sample_id"] if "sample_id" in line else line["record_id"]
        if missing := [name for name in NEEDED[kind] if name not in line]:
            raise KeyError(missing[0])
        kept[id_, seen[id_]] = line
        seen[id_] += 1
    named = asked if isinstance(asked, dict) else {name: {} for name in asked}
    return Part(kind, named, values, kept, len(lines) - len(kept))


def compare(a: Evaluation, b: Evaluation, config: CompareConfig) -> dict[str, Any]:
    """The comparison as plain JSON values; see docs/compare_reports.md.

    Raises: UserError if the two have no task or no sample in common, or a metric cannot be made again.
    """
    both = [task for task in a.parts if task in b.parts and a.parts[task].kind == b.parts[task].kind]
    if not both:
        names = [", ".join(f"{task} ({part.kind})".lstrip() for task, part in each.parts.items()) for each in (a, b)]
        what = f"'{b.path}' has nothing in common with a: {names[0]} there, {names[1]} here."
        raise UserError(config.problem("b", f"{what} Compare evaluations of the same tasks or data."))
    sides = (("a", a, b), ("b", b, a))
    notes = [f"only {side} has the task {t}." for side, one, other in sides for t in one.parts if t not in other.parts]
    notes += [f"the task {t} has other kinds of answers." for t in a.parts if t in b.parts and t not in both]
    other_tokenizer = _digest(a, "tokenizer") != _digest(b, "tokenizer")
    found = {task: _compare_part(a.parts[task], b.parts[task], config, other_tokenizer) for task in both}
    if not any(part["samples"]["num_both"] for part in found.values()):
        what = f"'{b.path}' has no sample in common with a, by its ids. Compare evaluations of the same data."
        raise UserError(config.problem("b", what))
    if other_tokenizer and any(part["kind"] == LOSSES for part in found.values()):
        notes.append(
            "The tokenizers differ: loss, perplexity and token accuracy are by token, so they do not compare. "
            "Bits per byte do."
        )
    return {
        "kind": "evaluations",
        "a": {"path": str(a.path), "manifest_digest": a.manifest_digest},
        "b": {"path": str(b.path), "manifest_digest": b.manifest_digest},
        "differences": differences(_conditions(a), _conditions(b)),
        "notes": notes,
        "bootstrap": {"seed": config.seed, "num_resamples": config.num_resamples, "confidence": config.confidence},
        "alpha": config.alpha,
        "parts": found,
    }


def _digest(one: Evaluation, name: str) -> str | None:
    return one.report.get("digests", {}).get(name)


def _conditions(one: Evaluation) -> dict[str, Any]:
    """All that a score depends on besides the samples' text; the bootstrap of a report is not used here."""
    settings = {key: value for key, value in one.report["settings"].items() if key != "bootstrap"}
    return {"digests": one.report.get("digests", {}), "settings": settings}


def differences(a: Mapping[str, Any], b: Mapping[str, Any], *, prefix: str = "") -> list[dict[str, Any]]:
    """`{"key", "a", "b"}` of each leaf of nested mappings in which they differ; None where one has no such key.

    >>> differences({"x": {"y": 1, "z": 2}}, {"x": {"y": 1, "z": 3}})
    [{'key': 'x.z', 'a': 2, 'b': 3}]
    """
    found = []
    for name in [*a, *(name for name in b if name not in a)]:
        left, right, key = a.get(name), b.get(name), f"{prefix}{name}"
        if isinstance(left, Mapping) or isinstance(right, Mapping):
            below = [value if isinstance(value, Mapping) else {} for value in (left, right)]
            found += differences(below[0], below[1], prefix=f"{key}.")
            if any(not isinstance(value, Mapping) and value is not None for value in (left, right)):
                found.append({"key": key, "a": left, "b": right})
        elif left != right:
            found.append({"key": key, "a": left, "b": right})
    return found


# --- one part -----------------------------------------------------------------------------------------------------


def _compare_part(a: Part, b: Part, config: CompareConfig, other_tokenizer: bool) -> dict[str, Any]:
    keys = [key for key in a.lines if key in b.lines]
    pairs = [(a.lines[key], b.lines[key]) for key in keys]
    samples = {
        "num_both": len(keys),
        "num_only_a": len(a.lines) - len(keys),
        "num_only_b": len(b.lines) - len(keys),
        "num_skipped_a": a.num_skipped,
        "num_skipped_b": b.num_skipped,
    }
    notes: list[str] = []
    if a.kind == LOSSES:
        samples["num_other_targets"] = sum(x["num_target_tokens"] != y["num_target_tokens"] for x, y in pairs)
        changed = _changed_losses(pairs)
    else:
        for name in ("prompt", "references"):
            samples[f"num_other_{name}"] = sum(x[f"{name}_sha256"] != y[f"{name}_sha256"] for x, y in pairs)
        changed = _changed_samples(pairs)
    values: dict[str, Any] = {}
    for metric, inputs in _metrics_of(a, b, config, pairs, notes):
        paired = uncertainty.paired(
            metric,
            *inputs,
            seed=config.seed,
            num_resamples=config.num_resamples,
            confidence=config.confidence,
        )
        values |= {name: asdict(one) for name, one in paired.items()}
    for name, value in values.items():
        value["compares"] = not (other_tokenizer and a.kind == LOSSES and name in BY_TOKENS)
        if not value["compares"]:
            value |= {"difference": None, "low": None, "high": None, "p_value": None}
        value["below_alpha"] = value["p_value"] is not None and value["p_value"] < config.alpha
    for side, part, num_only in (("a", a, samples["num_only_a"]), ("b", b, samples["num_only_b"])):
        notes += _not_as_reported(side, part, values) if not num_only and not part.num_skipped else []
    num = len(changed["samples"])
    changed = {"num": num, **changed, "samples": changed["samples"][: config.show]}
    return {"kind": a.kind, "samples": samples, "notes": notes, "metrics": values, "changed": changed}


def _metrics_of(
    a: Part, b: Part, config: CompareConfig, pairs: list[tuple[dict[str, Any], dict[str, Any]]], notes: list[str]
) -> Iterable[tuple[metrics.Metric, list[list[Any]]]]:
    """Each metric that either report has, and what it scores of both sides."""
    if a.kind == LOSSES:
        pairs = [(x, y) for x, y in pairs if x["num_target_tokens"] and y["num_target_tokens"]]
        whole = all(part.values.get("bits_per_byte") is not None for part in (a, b))
        yield metrics.losses(), [[_loss(pair[side], whole) for pair in pairs] for side in (0, 1)]
        return
    asked = {**b.metrics, **a.metrics}
    for name in [name for name in a.metrics if b.metrics.get(name, a.metrics[name]) != a.metrics[name]]:
        del asked[name]
        notes.append(f"{name} was computed with other settings in b, so it is not compared.")
    kind: Any = a.kind
    made = metrics.load(kind, asked, config=config, key="a")
    make = _choice if kind == "choice" else _text
    inputs = [[make(pair[side]) for pair in pairs] for side in (0, 1)]
    for name in asked:
        yield made[name], inputs


def _text(line: Mapping[str, Any]) -> metrics.Text:
    return metrics.Text(line["output"], tuple(line["references"]), line.get("weight", 1.0))


def _choice(line: Mapping[str, Any]) -> metrics.Choice:
    return metrics.Choice(tuple(line["loglikelihoods"]), tuple(line["choices"]), line["answer"])


def _loss(line: Mapping[str, Any], whole: bool) -> metrics.Loss:
    return metrics.Loss(
        line["nll"], line["num_target_tokens"], line["num_correct"], line["num_bytes"] if whole else None
    )


def _not_as_reported(side: str, part: Part, values: Mapping[str, Any]) -> Iterable[str]:
    """Notes on values that this code computes otherwise than the report has them; a library may be another."""
    for name, value in values.items():
        reported: Any = part.values.get(name)
        now = value[side]
        known = isinstance(reported, int | float) and now is not None
        if known and not math.isclose(reported, now, rel_tol=SAME_VALUE, abs_tol=SAME_VALUE):
            masked = any(line.get("num_findings") for line in part.lines.values())
            why = "secrets are masked in its texts" if masked else "maybe of another library version"
            yield f"{name} of {side} is {now!r} here and {reported!r} in its report, {why}."


# --- what changed -------------------------------------------------------------------------------------------------


def _changed_samples(pairs: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Samples whose answer or score differs, by the difference of the first score, then of the next ..., most first."""
    moves: dict[str, collections.Counter[str]] = {}
    found: list[tuple[tuple[float, ...], dict[str, Any]]] = []
    for a, b in pairs:
        scores = {name: [value, b["scores"][name]] for name, value in a["scores"].items() if name in b["scores"]}
        for name, (x, y) in scores.items():
            moves.setdefault(name, collections.Counter())[_move(x, y)] += 1
        what = "predicted" if "choices" in a else "output"
        if a[what] != b[what] or any(x != y for x, y in scores.values()):
            sample: dict[str, Any] = {key: a[key] for key in ("sample_id", "id", "line", "prompt") if key in a}
            sample |= {"choices": a["choices"], "answer": a["answer"]} if "choices" in a else {}
            sample |= {"references": a["references"]} if "output" in a else {}
            order = tuple(-_size(x, y) for x, y in scores.values())
            found.append((order, {**sample, "scores": scores, what: [a[what], b[what]]}))
    found.sort(key=lambda one: one[0])
    counts = {name: {move: moves[name][move] for move in ("rises", "falls", "other")} for name in moves}
    return {"moves": counts, "samples": [sample for _, sample in found]}


def _move(x: float | None, y: float | None) -> str:
    if x == y:
        return "same"
    return "other" if x is None or y is None else ("rises" if y > x else "falls")


def _size(x: float | None, y: float | None) -> float:
    if x == y:
        return 0.0
    return math.inf if x is None or y is None else abs(y - x)


def _changed_losses(pairs: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Documents by the difference of their summed loss, which is what moves the loss of all; most first."""
    moves: collections.Counter[str] = collections.Counter()
    found = []
    for a, b in pairs:
        x, y = a["nll"], b["nll"]
        if math.isclose(x, y, rel_tol=SAME_LOSS):
            continue
        moves[_move(x, y)] += 1
        document = {"record_id": a["record_id"], "num_tokens": [a["num_tokens"], b["num_tokens"]]}
        found.append((abs(y - x), {**document, "nll": [x, y], "loss": [a["loss"], b["loss"]]}))
    found.sort(key=lambda one: -one[0])
    counts = {"nll": {move: moves[move] for move in ("rises", "falls", "other")}}
    return {"moves": counts, "samples": [document for _, document in found]}
