"""The newest checkpoint stays, the best stay, and nothing else does."""

import json
import math
import random
import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from conftest import train_argv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codex_accel import retention, run_folder
from codex_accel.errors import UserError
from codex_accel.events import LineLog
from codex_accel.train_schema import Checkpoint

# Few values, so that ties are common.
SCORES = (0.0, -0.0, 1.0, 1.5, 2.0, -3.0, 1e308, 5e-324, math.nan, math.inf, -math.inf)
BEST_IS = ("lowest", "highest")


def better(first: int, second: int, scores: dict[int, float], best_is: str) -> bool:
    """Whether `first` is a better checkpoint than `second`, both with a finite score."""
    if scores[first] == scores[second]:
        return first < second
    return scores[first] < scores[second] if best_is == "lowest" else scores[first] > scores[second]


def expected(
    steps: list[int], scores: dict[int, float], *, keep_last: int, keep_best: int, best_is: str
) -> tuple[set[int], set[int]]:
    """(last, best) by counting rivals: a checkpoint is among the K best if fewer than K others are better."""
    last = {step for step in steps if sum(other > step for other in steps) < keep_last}
    rivals = [step for step in steps if step in scores and -math.inf < scores[step] < math.inf]  # false for NaN
    best = {step for step in rivals if sum(better(other, step, scores, best_is) for other in rivals) < keep_best}
    return last, best


# --- the pure function --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ({"keep_last": 1, "keep_best": 0}, {50: ["last"]}),
        ({"keep_last": 2, "keep_best": 1}, {50: ["last"], 40: ["last"], 20: ["best"]}),
        ({"keep_last": 1, "keep_best": 2}, {50: ["last"], 30: ["best"], 20: ["best"]}),
        ({"keep_last": 3, "keep_best": 2}, {50: ["last"], 40: ["last"], 30: ["last", "best"], 20: ["best"]}),
        ({"keep_last": 9, "keep_best": 9}, {s: ["last", "best"][: 1 + (s in (20, 30, 40))] for s in range(50, 0, -10)}),
    ],
    ids=str,
)
def test_kept_steps_by_hand(rules, left):
    """Step 20 is the best; 30 and 40 tie, and the earlier is the better; 10 is NaN; 50 is not evaluated yet."""
    scores = {10: math.nan, 20: 1.0, 30: 2.0, 40: 2.0}
    found = retention.kept([10, 20, 30, 40, 50], scores, best_is="lowest", **rules)
    assert found == left
    assert list(found) == sorted(found, reverse=True)


def check(steps: list[int], scores: dict[int, float], **rules) -> dict[int, list[str]]:
    """What `retention.kept` says, which must be what counting rivals says, for any order of the steps."""
    found = retention.kept(iter(steps[::-1]), scores, **rules)
    last, best = expected(steps, scores, **rules)
    assert list(found.items()) == [
        (s, ["last"] * (s in last) + ["best"] * (s in best)) for s in sorted(last | best, reverse=True)
    ]
    assert not steps or max(steps) in found
    assert all(math.isfinite(scores.get(step, math.nan)) for step in best)
    return found


RULES = {"keep_last": st.integers(1, 5), "keep_best": st.integers(0, 5), "best_is": st.sampled_from(BEST_IS)}


@settings(max_examples=300)
@given(
    steps=st.sets(st.integers(1, 12)),
    scores=st.dictionaries(st.integers(1, 12), st.one_of(st.sampled_from(SCORES), st.floats())),
    rules=st.fixed_dictionaries(RULES),
)
def test_any_scores_keep_the_last_and_the_best_and_nothing_else(steps, scores, rules):
    """Scores of steps without a checkpoint, and checkpoints without a score, are both among them."""
    check(sorted(steps), scores, **rules)


class History:
    """A run as retention sees it: its checkpoints, its scores and its rules, all of which change as it goes."""

    def __init__(self, seed: int):
        self.draws = random.Random(seed)
        self.steps: list[int] = []
        self.scores: dict[int, float] = {}
        self.counts = Counter()

    def save(self) -> None:
        self.steps.append(self.draws.randint(1, 3) + max(self.steps, default=0))

    def evaluate(self) -> None:
        if self.steps:
            self.scores[self.steps[-1]] = self.draws.choice(SCORES)

    def damage(self) -> None:
        """One is set aside. If it was the newest, the run steps back: later scores are cut off, to be made again."""
        if len(self.steps) > 1:
            self.steps.remove(self.draws.choice(self.steps))
            self.scores = {step: score for step, score in self.scores.items() if step < self.steps[-1]}

    def prune(self) -> None:
        """By rules that the user may have changed since the last time."""
        rules = {"keep_last": self.draws.randint(1, 4), "keep_best": self.draws.randint(0, 4)}
        rules["best_is"] = self.draws.choice(BEST_IS)
        left = sorted(check(self.steps, self.scores, **rules))
        assert sorted(check(left, self.scores, **rules)) == left, "pruning twice deletes what pruning once has kept"
        self.counts["deleted"] += len(self.steps) - len(left)
        self.counts["kept as the best"] += len(left) - min(rules["keep_last"], len(left))
        self.steps = left


def test_ten_thousand_histories_keep_the_last_and_the_best_and_nothing_else():
    """Saves, evaluations, damage, steps back and changes of the rules, in any order."""
    counts = Counter()
    for seed in range(10_000):
        history = History(seed)
        for action in history.draws.choices(("save", "evaluate", "prune", "damage"), (8, 6, 3, 1), k=16):
            getattr(history, action)()
            counts[action] += 1
        history.prune()
        counts += history.counts
    print(f"\n0 violations in 10,000 histories of {dict(counts)}")
    assert min(counts[name] for name in ("damage", "prune", "deleted", "kept as the best")) > 5_000


@pytest.mark.parametrize("best_is", BEST_IS)
def test_every_small_history_keeps_the_last_and_the_best_and_nothing_else(best_is):
    """All scores of four checkpoints, of five values and none, with limits up to five: 31,104 of a direction."""
    steps, values = [1, 2, 3, 4], (0.0, 1.0, math.nan, math.inf, -math.inf, None)
    for drawn in product(values, repeat=4):
        scores = {step: score for step, score in zip(steps, drawn, strict=True) if score is not None}
        for keep_last, keep_best in product((1, 2, 3, 5), (0, 1, 2, 3, 4, 5)):
            check(steps, scores, keep_last=keep_last, keep_best=keep_best, best_is=best_is)


# --- scores of a real log -----------------------------------------------------------------------------------------


def write_log(run_dir: Path, records: list[dict]) -> None:
    log = LineLog(run_dir / run_folder.METRICS)
    for record in records:
        log.write(record)


def scores_of(run_dir: Path, metric: str) -> dict[int, float]:
    return retention.scores(retention.evaluations(run_dir), metric=metric)


def test_scores_are_those_of_the_evaluations(tmp_path):
    """Lines of the training have a loss too, which is that of one batch."""
    train = {"learning_rate": 0.1, "grad_norm": 1.0}
    write_log(
        tmp_path,
        [
            {"step": 1, "split": "train", "loss": 9.0, **train},
            {"step": 1, "split": "validation", "loss": 3.0, "bits_per_byte": None},
            {"step": 2, "split": "train", "loss": 8.0, **train},
            {"step": 2, "split": "validation", "loss": math.nan, "bits_per_byte": 0.5},
            {"step": 3, "split": "validation", "loss": -math.inf},
            {"step": 4, "split": "validation", "loss": 7},
        ],
    )
    assert list(retention.evaluations(tmp_path)) == [1, 2, 3, 4]
    assert scores_of(tmp_path, "loss") == {1: 3.0, 4: 7.0}
    assert scores_of(tmp_path, "bits_per_byte") == {2: 0.5}
    assert scores_of(tmp_path, "token_accuracy") == {}


def test_a_validation_split_may_be_named_train(tmp_path):
    """Who overfits on purpose evaluates on what it trains on."""
    write_log(tmp_path, [{"step": 1, "split": "train", "loss": 9.0, "learning_rate": 0.1}])
    write_log(tmp_path, [{"step": 1, "split": "train", "loss": 3.0, "perplexity": 20.0}])
    assert scores_of(tmp_path, "loss") == {1: 3.0}


def test_scores_are_read_from_all_files_of_a_log(tmp_path):
    log = LineLog(tmp_path / run_folder.METRICS, max_bytes=1)
    for step in (1, 2, 3):
        log.write({"step": step, "split": "validation", "loss": float(step)})
    assert len(list(tmp_path.iterdir())) == 3
    assert scores_of(tmp_path, "loss") == {1: 1.0, 2: 2.0, 3: 3.0}


def test_half_a_line_is_no_score(tmp_path):
    write_log(tmp_path, [{"step": 1, "split": "validation", "loss": 3.0}])
    with open(tmp_path / run_folder.METRICS, "ab") as stream:
        stream.write(b'{"step": 2, "split": "validation", "loss": 2.0')
    assert scores_of(tmp_path, "loss") == {1: 3.0}


@pytest.mark.parametrize("line", [b"not JSON", b'{"split": "validation", "loss": 1.0}', b"[1]", b'{"step": "x"}'])
def test_a_line_that_is_not_one_of_ours_is_named(tmp_path, line):
    (tmp_path / run_folder.METRICS).write_bytes(b'{"step": 1, "split": "validation", "loss": 3.0}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"metrics\.ndjson:2: is not a line of metrics"):
        retention.evaluations(tmp_path)


# --- real folders -------------------------------------------------------------------------------------------------


def make_checkpoints(run_dir: Path, steps: list[int]) -> None:
    for step in steps:
        path = run_folder.checkpoint_path(run_dir, step)
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"weights")


@pytest.mark.parametrize("keep_last", [1, 2, 3, 4])
def test_prune_keeps_the_newest_and_tells_the_others(tmp_path, keep_last):
    make_checkpoints(tmp_path, [3, 5, 7])
    pruned = retention.prune(tmp_path, Checkpoint(keep_last=keep_last))
    assert pruned == [f"step-{step:09d}" for step in (7, 5, 3)[keep_last:]]
    assert run_folder.steps_saved(tmp_path) == [7, 5, 3][:keep_last]


def test_prune_touches_nothing_but_checkpoints(tmp_path):
    make_checkpoints(tmp_path, [3, 5])
    others = [f"damaged-step-{1:09d}", "step-1", "notes", ".tmp-step-000000001-9"]
    for name in others:
        (tmp_path / run_folder.CHECKPOINTS / name).mkdir()
    retention.prune(tmp_path, Checkpoint(keep_last=1))
    left = sorted(path.name for path in (tmp_path / run_folder.CHECKPOINTS).iterdir())
    assert left == sorted([*others, "step-000000005"])


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_history_of_real_folders_keeps_the_last_and_the_best_and_nothing_else(tmp_path, data):
    run_dir = tmp_path / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    history, texts = {}, st.sampled_from([0.5, 1.0, 2.0, math.nan, math.inf, -math.inf, None])
    steps = sorted(data.draw(st.sets(st.integers(1, 40), min_size=1, max_size=9)))
    make_checkpoints(run_dir, steps)
    records = []
    for step in steps:
        records.append({"step": step, "split": "train", "loss": data.draw(texts), "learning_rate": 0.1})
        if data.draw(st.booleans()):
            history[step] = data.draw(texts)
            records.append({"step": step, "split": "validation", "loss": 0.0, "token_accuracy": history[step]})
    write_log(run_dir, records)
    scores = {step: score for step, score in history.items() if score is not None}
    rules = {"keep_last": data.draw(st.integers(1, 4)), "keep_best": data.draw(st.integers(0, 4))}
    last, best = expected(steps, scores, **rules, best_is="highest")
    pruned = retention.prune(run_dir, Checkpoint(best_metric="token_accuracy", **rules))
    assert run_folder.steps_saved(run_dir) == sorted(last | best, reverse=True)
    assert pruned == [f"step-{step:09d}" for step in sorted(set(steps) - last - best, reverse=True)]
    names = {path.name for path in (run_dir / run_folder.CHECKPOINTS).iterdir()}
    assert names == {f"step-{step:09d}" for step in last | best}


# --- a real run ---------------------------------------------------------------------------------------------------


def evaluated(run_dir: Path, metric: str) -> dict[int, float]:
    """`metric` of each evaluation of a run, read without our code."""
    lines = [json.loads(line) for line in (run_dir / run_folder.METRICS).read_text().splitlines()]
    return {line["step"]: line[metric] for line in lines if line["split"] == "validation"}


@pytest.mark.parametrize(("metric", "best_is"), [("loss", "lowest"), ("token_accuracy", "highest")])
def test_a_run_leaves_the_checkpoints_that_its_metrics_say(fork_server, tiny, tmp_path, metric, best_is):
    """Every step is saved and every second one evaluated; the learning rate rises until it undoes what was learnt."""
    rules = f"{{every_steps: 1, keep_last: 1, keep_best: 2, best_metric: {metric}}}"
    overrides = ["training.max_steps=8", "optimizer.learning_rate=1.0", "schedule.warmup=8", f"checkpoint={rules}"]
    evaluation = "evaluation={every_steps: 2, max_windows: 32}"
    job = fork_server.run("train", train_argv(tiny, tmp_path / "run", *overrides, evaluation))
    assert job.codes == [0], job.output
    scores = evaluated(tmp_path / "run", metric)
    assert list(scores) == [2, 4, 6, 8]
    last, best = expected(list(scores), scores, keep_last=1, keep_best=2, best_is=best_is)
    [other] = set(BEST_IS) - {best_is}
    assert best != expected(list(scores), scores, keep_last=1, keep_best=2, best_is=other)[1], "shows no direction"
    assert run_folder.steps_saved(tmp_path / "run") == sorted(last | best, reverse=True)
