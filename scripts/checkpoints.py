"""List, check or thin out the checkpoints of a training run.

examples:
  python scripts/checkpoints.py runs/quickstart/train
  python scripts/checkpoints.py runs/quickstart/train verify
  python scripts/checkpoints.py runs/quickstart/train prune keep_last=1 keep_best=1
  python scripts/checkpoints.py runs/quickstart/train list --json

Each line: step, size, the evaluation at that step, and why it stays (last, best). `resume point` is where the run would
go on. `prune` follows the run's own rules unless others are given, and waits for no run: one that trains is refused.
Exit code 0, or 1 if a checkpoint is damaged.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codex_accel import cli, events, files, manifest, offline, retention, run_folder
from codex_accel.errors import UserError
from codex_accel.schema import CheckpointsConfig
from codex_accel.train_schema import Checkpoint
from codex_accel.yaml_reader import read_yaml


def main(argv: Sequence[str] | None = None) -> int:
    """Run the action; returns the exit code."""
    config = cli.parse(CheckpointsConfig, argv, doc=__doc__, stage="checkpoints", positional=["run", "action"])
    offline.enforce(allow_network=config.allow_network)
    run_dir = Path(config.run)
    if not (run_dir / run_folder.CHECKPOINTS).is_dir() or not (run_dir / manifest.CONFIG).is_file():
        raise UserError(config.problem("run", f"'{run_dir}' is no run folder. Give the output_dir of a training run."))
    rules = _rules(config, run_dir)

    pruned: list[str] = []
    if config.action == "prune":
        with run_folder.held(run_dir):
            _require_whole_newest(config, run_dir)
            pruned = retention.prune(run_dir, rules)
            files.sweep(run_dir / run_folder.CHECKPOINTS)
    rows = _rows(run_dir, rules, hashed=config.action == "verify")
    set_aside = sorted(path.name for path in (run_dir / run_folder.CHECKPOINTS).glob(f"{run_folder.DAMAGED_PREFIX}*"))
    if config.as_json:
        document = {"run": str(run_dir), "checkpoints": rows, "pruned": pruned, "set_aside": set_aside}
        print(json.dumps(document, indent=2))
    else:
        _show(rows, pruned, metric=rules.best_metric)
        for name in set_aside:
            print(f"set aside: {name}, which a start has found damaged. Mend it or delete it.")
    return 1 if any(row["problems"] for row in rows) else 0


def _rules(config: CheckpointsConfig, run_dir: Path) -> Checkpoint:
    """The run's own rules, with what the command line gives in their place."""
    own = read_yaml(run_dir / manifest.CONFIG)[0].get("checkpoint", {})
    given = {name: getattr(config, name) for name in ("keep_last", "keep_best", "best_metric")}
    return Checkpoint(**own | {name: value for name, value in given.items() if value is not None})


def _require_whole_newest(config: CheckpointsConfig, run_dir: Path) -> None:
    """The newest one is the resume point, and it stays: but only if it is whole can the others go."""
    for step in run_folder.steps_saved(run_dir)[:1]:
        if problems := manifest.problems_of(run_folder.checkpoint_path(run_dir, step)):
            what = (
                "prune, but the newest checkpoint is damaged, so an older one is the resume point. Nothing was deleted."
            )
            raise UserError(config.problem("action", what), *problems)


def _rows(run_dir: Path, rules: Checkpoint, *, hashed: bool) -> list[dict[str, Any]]:
    """One row a checkpoint, newest first; checked by digests if `hashed`, else by names and sizes."""
    steps = run_folder.steps_saved(run_dir)
    evaluated = retention.evaluations(run_dir) if events.exists(run_dir / run_folder.METRICS) else {}
    scores = retention.scores(evaluated, metric=rules.best_metric)
    kept = retention.kept(
        steps,
        scores,
        keep_last=rules.keep_last,
        keep_best=rules.keep_best,
        best_is=retention.best_is(rules.best_metric),
    )
    check = manifest.problems_of if hashed else manifest.problems_of_outline
    rows: list[dict[str, Any]] = []
    resume_point = None
    for step in steps:
        path = run_folder.checkpoint_path(run_dir, step)
        problems, document, num_bytes = check(path), {}, 0
        with contextlib.suppress(UserError, FileNotFoundError):  # it is among the problems
            num_bytes = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
            document = manifest.read(path)
        if not path.is_dir():
            continue  # the run, which may be training, has pruned it meanwhile
        resume_point = resume_point or (None if problems else step)
        rows.append(
            {
                "step": step,
                "path": str(path),
                "time": document.get("provenance", {}).get("time"),
                "num_bytes": num_bytes,
                "score": scores.get(step),
                "evaluation": evaluated.get(step),
                "kept_as": kept.get(step, []),
                "is_resume_point": step == resume_point,
                "checked": "digests" if hashed else "names and sizes",
                "problems": problems,
            }
        )
    return rows


def _show(rows: list[dict[str, Any]], pruned: list[str], *, metric: str) -> None:
    for name in pruned:
        print(f"deleted  {name}")
    print(f"{'step':>9}  {'MB':>9}  {metric:>14}  {'written':<25}  kept as")
    for row in rows:
        score = "-" if row["score"] is None else f"{row['score']:.4f}"
        notes = [*row["kept_as"], *(["resume point"] if row["is_resume_point"] else [])]
        place = f"{row['step']:>9}  {row['num_bytes'] / 1e6:>9,.1f}  {score:>14}  {row['time'] or '-':<25}"
        print(f"{place}  {', '.join(notes) or 'nothing'}")
        for problem in row["problems"]:
            print(f"           {problem}")
    damaged = sum(bool(row["problems"]) for row in rows)
    checked = rows[0]["checked"] if rows else "nothing"
    print(f"{len(rows)} checkpoint{'s' * (len(rows) != 1)}, {damaged} damaged; checked: {checked}")


if __name__ == "__main__":
    cli.run(main)
