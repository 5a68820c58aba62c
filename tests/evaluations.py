"""Small evaluations in the exact form of their files, scored by the real metrics."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from codex_accel import manifest, metrics, report
from codex_accel.curves import Curves
from codex_accel.evaluate_schema import EvaluateConfig

BOOTSTRAP = {"seed": 0, "num_resamples": 60, "confidence": 0.95}
CONFIG = EvaluateConfig(predictions="answers.jsonl", output_dir="report")


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def text_line(number: int, output: str, references: Sequence[str], **more) -> dict:
    prompt = more.pop("prompt", f"question {number}")
    return {
        "task": None, "sample_id": sha256(f"sample {number}")[:32], "line": number, "prompt": prompt,
        "prompt_sha256": sha256(prompt), "references": list(references),
        "references_sha256": sha256(json.dumps(references, ensure_ascii=False)),
        "output": output, "output_sha256": sha256(output), "scores": {}, **more,
    }  # fmt: skip


def choice_line(number: int, loglikelihoods: Sequence[float], answer: int, **more) -> dict:
    prompt = more.pop("prompt", f"beginning {number}")
    return {
        "task": None, "sample_id": sha256(f"choice {number}")[:32], "line": number, "prompt": prompt,
        "prompt_sha256": sha256(prompt), "references": [], "references_sha256": sha256("[]"),
        "choices": [f"ending {number}.{n}" + "!" * n for n in range(len(loglikelihoods))],
        "loglikelihoods": list(loglikelihoods), "answer": answer, "predicted": int(np.argmax(loglikelihoods)),
        "scores": {}, **more,
    }  # fmt: skip


def loss_line(number: int, num_tokens: int, loss: float, **more) -> dict:
    targets = max(0, num_tokens - 1)
    return {
        "record_id": sha256(f"document {number}")[:32], "num_tokens": num_tokens, "num_target_tokens": targets,
        "num_bytes": 4 * targets, "nll": loss * targets, "loss": loss if targets else None,
        "perplexity": math.exp(loss) if targets else None, "num_correct": targets // 4, **more,
    }  # fmt: skip


def scored(kind: str, lines: Sequence[dict], names: dict) -> metrics.Measured:
    """What the real metrics say of the lines that are not skipped; their scores are put into the lines."""
    good = [line for line in lines if "skipped" not in line]
    if kind == "choice":
        samples = [metrics.Choice(tuple(x["loglikelihoods"]), tuple(x["choices"]), x["answer"]) for x in good]
    else:
        samples = [metrics.Text(x["output"], tuple(x["references"])) for x in good]
    measured = metrics.measure(metrics.load(kind, names, config=CONFIG, key="metrics"), samples, **BOOTSTRAP)
    for line, scores in zip(good, measured.sample_scores, strict=True):
        line["scores"] = scores
    return measured


def parts_of(measured: metrics.Measured, lines: Sequence[dict]) -> dict:
    num_skipped = sum("skipped" in line for line in lines)
    counts = {"num_samples": len(lines), "num_scored": len(lines) - num_skipped, "num_skipped": num_skipped}
    if any("output" in line for line in lines):
        counts["num_empty_outputs"] = sum(not line["output"].strip() for line in lines if "output" in line)
    intervals = {
        name: None if pair is None else dict(zip(("low", "high"), pair, strict=True))
        for name, pair in measured.intervals.items()
    }
    return {"metrics": measured.values, "intervals": intervals, "counts": counts, "facts": measured.facts}


def of_predictions(lines: Sequence[dict], names: dict, **settings) -> dict:
    """The report of lines without a task."""
    parts = parts_of(scored("generate", lines, names), lines)
    settings = {"metrics": names, "bootstrap": BOOTSTRAP, **settings}
    return {**parts, "settings": settings, "digests": {"predictions": "ab" * 32}}


def of_tasks(tasks: dict[str, tuple[str, list[dict], dict]], **settings) -> tuple[dict, list[dict]]:
    """The report of tasks, each (kind, lines, metrics), and all lines."""
    document: dict = {key: {} for key in ("metrics", "intervals", "counts", "facts")}
    told, all_lines = {}, []
    for task, (kind, lines, names) in tasks.items():
        for line in lines:
            line["task"] = task
        for key, value in parts_of(scored(kind, lines, names), lines).items():
            document[key][task] = value
        told[task] = {"kind": kind, "metrics": names}
        all_lines += lines
    settings = {"context_length": 512, "tasks": told, "bootstrap": BOOTSTRAP, **settings}
    return {**document, "settings": settings, "digests": {"model": "12" * 32, "tokenizer": "34" * 32}}, all_lines


def of_losses(lines: Sequence[dict], *, tokenizer: str = "34" * 32, **settings) -> dict:
    """The report of documents."""
    losses = [
        metrics.Loss(line["nll"], line["num_target_tokens"], line["num_correct"], line["num_bytes"])
        for line in lines
        if line["num_target_tokens"]
    ]
    measured = metrics.measure({"loss": metrics.losses()}, losses, **BOOTSTRAP)
    parts = parts_of(measured, [])
    parts["metrics"] |= {
        "num_target_tokens": sum(x.num_targets for x in losses),
        "num_bytes": sum(x.num_bytes for x in losses),
    }
    parts["metrics"]["compression"] = {"lzma": {"together": 2.25, "each_alone": 2.5}}
    parts["counts"] = {"num_documents": len(lines), "num_windows": len(lines), "num_unknown_tokens": 3}
    settings = {"split": "test", "context_length": 512, "stride": 512, "bootstrap": BOOTSTRAP, **settings}
    digests = {"model": "12" * 32, "dataset": "56" * 32, "tokenizer": tokenizer}
    return {**parts, "settings": settings, "digests": digests}


def write(folder: Path, document: dict, lines: Iterable[dict], *, curves: Curves | None = None) -> Path:
    """An evaluation folder with its manifest."""
    folder.mkdir(parents=True)
    report.write(folder, report=document, samples=lines, curves=curves)
    manifest.seal(folder, kind="evaluation", final=folder, payload=report.PAYLOAD, config=CONFIG)
    return folder


def run_line(step: int, split: str = "train", **values) -> dict:
    return {"step": step, "split": split, **values}
