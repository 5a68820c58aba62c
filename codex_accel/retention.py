"""Which checkpoints of a run stay: the newest, and the best by a metric.

Rule: the two are separate sets. The newest checkpoint, from which the run would go on, always stays; a checkpoint
without a finite score is never among the best.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from codex_accel import events, files, run_folder
from codex_accel.errors import UserError
from codex_accel.schema import BestMetric
from codex_accel.train_schema import Checkpoint


def kept(
    steps: Iterable[int], scores: Mapping[int, float], *, keep_last: int, keep_best: int, best_is: str
) -> dict[int, list[str]]:
    """Steps to keep, newest first, each with its reasons: "last", "best" or both.

    `best_is` is "lowest" or "highest"; of two equal scores the earlier step is the better.
    """
    newest_first = sorted(steps, reverse=True)
    sign = 1 if best_is == "lowest" else -1
    scored = [step for step in newest_first if math.isfinite(scores.get(step, math.nan))]
    best = sorted(scored, key=lambda step: (sign * scores[step], step))[:keep_best]
    reasons = {step: ["last"] * (step in newest_first[:keep_last]) + ["best"] * (step in best) for step in newest_first}
    return {step: why for step, why in reasons.items() if why}


def best_is(metric: BestMetric) -> str:
    """Which end of the metric is the good one, "lowest" or "highest"."""
    return "highest" if metric == "token_accuracy" else "lowest"


def evaluations(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The line of metrics.ndjson for each step that was evaluated, of the split that stands first, which decides.

    Raises: UserError for a line that is not one, or if there is no such file: without it nothing would be the best.
    """
    found: dict[int, dict[str, Any]] = {}
    path = run_dir / run_folder.METRICS
    if not events.exists(path):
        raise UserError(f"{path}: no such file, so no score is known. Restore it from a copy, or say keep_best=0.")
    for line in events.read(path):
        if b'"learning_rate": ' in line.text:  # of a training step
            continue
        try:
            values = json.loads(line.text)
            found.setdefault(int(values["step"]), values)
        except (ValueError, KeyError, TypeError) as error:
            what = f"is not a line of metrics ({error!r}). Remove the line."
            raise UserError(f"{line.path}:{line.number}: {what}") from error
    return found


def scores(evaluated: Mapping[int, Mapping[str, Any]], *, metric: str) -> dict[int, float]:
    """`metric` of each evaluation that has it as a finite number (the log has text for others, "nan")."""
    numbers = {step: values.get(metric) for step, values in evaluated.items()}
    return {step: float(n) for step, n in numbers.items() if isinstance(n, int | float) and math.isfinite(n)}


def prune(run_dir: Path, rules: Checkpoint) -> list[str]:
    """Delete the checkpoints that `rules` do not keep; returns their names, newest first."""
    steps = run_folder.steps_saved(run_dir)
    values = scores(evaluations(run_dir), metric=rules.best_metric) if rules.keep_best else {}
    keep = kept(steps, values, keep_last=rules.keep_last, keep_best=rules.keep_best, best_is=best_is(rules.best_metric))
    old = [run_folder.checkpoint_path(run_dir, step) for step in steps if step not in keep]
    for path in old:
        files.remove_folder(path)
    return [path.name for path in old]
