"""Callbacks are told each moment once, may end the run, and cannot tell a resumed run from an unbroken one."""

import json
import random
import shutil
import types
from pathlib import Path

import pytest
from conftest import metrics_of, train_argv
from secret_grammar import secret_of
from test_resume import kill_once, outcome
from test_run import config

from codex_accel import callbacks, generation, manifest, prompts, run_folder, seeds
from codex_accel import model as models
from codex_accel import tokenizer as tokenizers
from codex_accel.callbacks import Moment
from codex_accel.checkpoint import TrainerState
from codex_accel.errors import UserError
from codex_accel.events import LineLog
from codex_accel.preemption import Preempted
from codex_accel.train_schema import Evaluation

ALONE = types.SimpleNamespace(num_processes=1, is_main_process=True)  # what `call` asks of an accelerator
EVALUATED = Evaluation(every_steps=5)


def moment_of(name="on_step", *, step=1, state=None, settings=None, elapsed_s=0.0, steps_per_epoch=4.0, **values):
    state = state or TrainerState(step=step)
    settings = settings or config()
    log = LineLog(Path("events"), enabled=False)
    return Moment(name, state, values, settings, None, None, log, steps_per_epoch, elapsed_s)


def chosen(**callbacks):
    return config().model_copy(update={"callbacks": callbacks, "evaluation": EVALUATED})


def failing(function, name="on_step") -> str:
    """The one problem of a callback that is called at a moment."""
    with pytest.raises(UserError) as caught:
        callbacks.call({"mine": {name: function}}, moment_of(name, step=7), ALONE)
    [problem] = caught.value.problems
    assert f"callbacks.mine: the callback 'mine' of codex-accel 0.1.0 failed at {name} of step 7: " in problem
    return problem


# --- calling --------------------------------------------------------------------------------------------------------


def test_only_those_that_wait_for_the_moment_are_called_in_order():
    heard = []
    called = {
        "b": {"on_step": lambda moment: heard.append(("b", moment.name))},
        "a": {"on_step": lambda moment: heard.append(("a", moment.name)), "on_end": lambda moment: heard.append("end")},
    }
    assert callbacks.call(called, moment_of(), ALONE) == ""
    assert heard == [("b", "on_step"), ("a", "on_step")]


def test_the_first_reason_of_a_run_stays_and_all_are_called():
    heard = []
    called = {
        "a": {"on_step": lambda moment: None},
        "b": {"on_step": lambda moment: "enough"},
        "c": {"on_step": lambda moment: heard.append(1) or "more"},
    }
    state = TrainerState(step=3)
    assert callbacks.call(called, moment_of(state=state), ALONE) == "b: enough"
    state.end_reason = "b: enough"
    assert callbacks.call({"c": called["c"]}, moment_of(state=state), ALONE) == "b: enough"
    assert len(heard) == 2


def test_each_callback_has_a_memory_of_its_own_in_the_state():
    def count(moment):
        moment.memory["n"] = moment.memory.get("n", 0) + 1

    state = TrainerState(step=1)
    for _ in range(3):
        callbacks.call({"a": {"on_step": count}}, moment_of(state=state), ALONE)
    callbacks.call({"b": {"on_step": count}}, moment_of(state=state), ALONE)
    assert state.callbacks == {"a": {"n": 3}, "b": {"n": 1}}


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, float("nan"), {1}, Path("a"), b"a"], ids=repr)
def test_memory_that_a_checkpoint_would_not_give_back_is_refused(value):
    problem = failing(lambda moment: moment.memory.update(it=value))
    assert "TypeError: it remembers what is not plain JSON: {'it': " in problem


def test_no_secret_of_a_callback_gets_into_a_checkpoint():
    text, secret = secret_of("github personal", random.Random(1))
    state = TrainerState(step=1)
    reason = callbacks.call({"a": {"on_step": lambda moment: f"because {text}"}}, moment_of(state=state), ALONE)
    assert reason == "a: because [SECRET]"
    problem = failing(lambda moment: moment.memory.update(it=text))
    assert "it remembers a secret" in problem
    assert secret not in problem


@pytest.mark.parametrize("name", ["on_save", "on_end"])
def test_after_the_checkpoint_nothing_can_be_decided_or_remembered(name):
    assert "a checkpoint has been written" in failing(lambda moment: "enough", name)
    assert "a checkpoint has been written" in failing(lambda moment: moment.memory.update(a=1), name)


def test_an_answer_that_is_no_text_is_refused():
    assert "it answers True, neither None nor text" in failing(lambda moment: True)


def test_a_mistake_that_a_callback_tells_itself_is_told_as_it_is():
    def refuse(moment):
        raise UserError("mine: 3 is too much. Take 2.")

    with pytest.raises(UserError) as caught:
        callbacks.call({"mine": {"on_step": refuse}}, moment_of(), ALONE)
    assert caught.value.problems == ["mine: 3 is too much. Take 2."]


@pytest.mark.parametrize("error", [KeyboardInterrupt, Preempted])
def test_being_told_to_stop_passes(error):
    def stop(moment):
        raise error

    with pytest.raises(error):
        callbacks.call({"mine": {"on_step": stop}}, moment_of(), ALONE)


# --- early stopping -------------------------------------------------------------------------------------------------


def reasons_of(scores, **settings) -> list[str]:
    """What early_stopping answers to evaluations at steps 5, 10, ..."""
    called, state, given = callbacks.load(chosen(early_stopping=settings)), TrainerState(), chosen()
    answers = []
    for score in scores:
        state.step += 5
        values = {"split": "validation", settings.get("metric", "loss"): score}
        answers.append(callbacks.call(called, moment_of("on_evaluate", state=state, settings=given, **values), ALONE))
    return answers


@pytest.mark.parametrize(
    ("scores", "settings", "ends_at"),
    [
        ([3, 2, 1, 1, 1, 1], {}, 6),
        ([3, 2, 2.1, 2.2, 1.9, 2, 2, 2], {}, 8),
        ([3, 2.95, 2.91], {"patience": 2, "min_delta": 0.1}, 3),
        ([3, 2.95, 2.89, 2.85], {"patience": 2, "min_delta": 0.1}, None),
        ([0.1, 0.2, 0.3, 0.2], {"metric": "token_accuracy", "patience": 1}, 4),
        ([float("nan"), float("nan")], {"patience": 2}, 2),
        ([float("nan"), 3, float("inf"), 2], {"patience": 2}, None),
    ],
)
def test_the_run_ends_after_so_many_evaluations_without_a_better_one(scores, settings, ends_at):
    answers = reasons_of(scores, **settings)
    assert [bool(answer) for answer in answers] == [place + 1 == ends_at for place in range(len(scores))]


def test_the_reason_tells_the_best():
    assert reasons_of([3, 2, 2, 2.5], patience=2)[-1] == (
        "early_stopping: loss has not become better in 2 evaluations; the best is 2 at step 10"
    )


def test_other_splits_decide_nothing():
    called, state = callbacks.load(chosen(early_stopping={"patience": 1})), TrainerState(step=5)
    for _ in range(3):
        told = moment_of("on_evaluate", state=state, settings=chosen(), split="test", loss=1.0)
        assert callbacks.call(called, told, ALONE) == ""
    assert state.callbacks == {"early_stopping": {}}


@pytest.mark.parametrize(
    ("name", "update", "words"),
    [
        ("early_stopping", {"evaluation": Evaluation()}, "callbacks.early_stopping: needs evaluation.every_steps"),
        ("early_stopping", {"data": {"validation_split": None}}, "early_stopping: needs data.validation_split"),
        ("sample_texts", {"data": {"validation_split": None}}, "callbacks.sample_texts: needs data.validation_split"),
    ],
)
def test_what_can_never_happen_is_told_at_once(name, update, words):
    given = chosen(**{name: {"prompts": ["a"]} if name == "sample_texts" else {}})
    if "data" in update:
        update = {"data": given.data.model_copy(update=update["data"])}
    with pytest.raises(UserError, match=words):
        callbacks.load(given.model_copy(update=update))


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("early_stopping", {"patience": 0}, "early_stopping.patience: 0: should be greater than 0."),
        ("early_stopping", {"metric": "f1"}, "early_stopping.metric: 'f1': should be 'loss', 'perplexity', "),
        ("sample_texts", {}, "sample_texts.prompts: required and not given."),
        ("sample_texts", {"prompts": []}, "sample_texts.prompts: []: List should have at least 1 item"),
        ("sample_texts", {"prompts": ["a"], "temperature": 1e-5}, "sample_texts: temperature = 1e-05 is too small"),
        ("history", {"every": 1}, "history.every: unknown key. It takes no settings."),
    ],
)
def test_wrong_settings_are_told(name, settings, words):
    with pytest.raises(UserError) as caught:
        callbacks.load(chosen(**{name: settings}))
    assert words in str(caught.value)


# --- history --------------------------------------------------------------------------------------------------------


def history_of(run_dir: Path, state: TrainerState, steps: range, *, end: bool = False) -> list[dict]:
    """Lines after these steps of 2 s in an epoch of 2.5 steps; step n has rate n, and every other one has loss n."""
    given = chosen(history={}).model_copy(update={"output_dir": str(run_dir)})
    called = callbacks.load(given)
    for step in steps:
        state.step = step
        values = {"learning_rate": float(step)} | ({"loss": float(step)} if step % 2 == 0 else {})
        options = {"state": state, "settings": given, "elapsed_s": 2.0 * step, "steps_per_epoch": 2.5}
        callbacks.call(called, moment_of(**options, **values), ALONE)
    if end:
        callbacks.call(called, moment_of("on_end", **options), ALONE)
    path = run_dir / "history.ndjson"  # which the first line makes
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def epoch_line(epoch, step, steps, time_s, mean_loss, first, last) -> dict:
    names = ("epoch", "step", "steps", "time_s", "mean_loss", "first_learning_rate", "last_learning_rate")
    return dict(zip(names, (epoch, step, steps, time_s, mean_loss, first, last), strict=True))


HISTORY = [
    epoch_line(1, 3, 3, 6.0, 2.0, 1.0, 3.0),
    epoch_line(2, 5, 2, 4.0, 4.0, 4.0, 5.0),
    epoch_line(3, 8, 3, 6.0, 7.0, 6.0, 8.0),
    epoch_line(4, 9, 1, 2.0, None, 9.0, 9.0),
]


def test_history_has_each_epoch_with_the_steps_that_begin_in_it(tmp_path):
    """Steps of 0.4 epochs: 1-3 begin in the first, 4-5 in the second, 6-8 in the third."""
    assert history_of(tmp_path, TrainerState(), range(1, 10), end=True) == HISTORY


@pytest.mark.parametrize("saved", range(1, 9))
def test_history_is_the_same_whenever_the_run_is_resumed(tmp_path, saved):
    """From a checkpoint after which it had gone on to its end."""
    state = TrainerState()
    history_of(tmp_path, state, range(1, saved + 1))
    stored = json.loads(json.dumps(vars(state)))
    history_of(tmp_path, state, range(saved + 1, 10), end=True)
    assert history_of(tmp_path, TrainerState(**stored), range(saved + 1, 10), end=True) == HISTORY


@pytest.mark.parametrize(("num_blocks", "batch"), [(7, 3), (8904, 8), (10, 3), (1, 1), (1, 8), (125, 64)])
def test_an_epoch_of_any_length_has_the_steps_of_whole_numbers(num_blocks, batch):
    """The first sequence of step n is number (n - 1) * batch, of epoch (n - 1) * batch // num_blocks."""
    for step in range(1, 200):
        assert callbacks._epoch_of(step, num_blocks / batch) == (step - 1) * batch // num_blocks + 1


# --- in a run -------------------------------------------------------------------------------------------------------

ALL = (
    "callbacks={early_stopping: {patience: 3, min_delta: 1.0}, history: {}, sample_texts: "
    "{prompts: ['def ', 'import'], max_new_tokens: 8, temperature: 1.0}}"
)


def shorter_epochs(tiny: Path) -> list[str]:
    """875 blocks of the split `test` and 64 a step: 13.7 steps an epoch."""
    return [
        f"data={{dataset: {tiny}/dataset, block_size: 32, train_split: test}}",
        "training.micro_batch_size=32",
        "training.global_batch_size=64",
        "training.max_steps=60",
    ]


def full_argv(tiny: Path, run_dir: Path) -> list[str]:
    argv = [argument for argument in train_argv(tiny, run_dir) if not argument.startswith("data=")]
    return [*shorter_epochs(tiny)[:1], *argv, *shorter_epochs(tiny)[1:], ALL]


def written(run_dir: Path) -> tuple[str, list[dict]]:
    """samples.ndjson, and history.ndjson without times."""
    lines = [json.loads(line) for line in (run_dir / "history.ndjson").read_text().splitlines()]
    return (run_dir / "samples.ndjson").read_text(), [{**line, "time_s": None} for line in lines]


@pytest.fixture(scope="module")
def unbroken(fork_server, tiny, tmp_path_factory) -> Path:
    """A run with all shipped callbacks, which early stopping has ended."""
    run_dir = tmp_path_factory.mktemp("callbacks") / "unbroken"
    job = fork_server.run("train", full_argv(tiny, run_dir))
    assert job.codes == [0], job.output
    return run_dir


def test_early_stopping_ends_the_run_where_its_rule_says(unbroken):
    lines = metrics_of(unbroken)
    scores = [(line["step"], line["loss"]) for line in lines if line["split"] == "validation"]
    best, without, ends = float("inf"), 0, []
    for step, loss in scores:
        without = 0 if best - loss > 1.0 else without + 1
        best = loss if without == 0 else best
        ends += [step] if without == 3 else []
    assert ends == [scores[-1][0]]
    assert ends[0] < 60
    assert max(run_folder.steps_saved(unbroken)) == ends[0]
    assert json.loads((unbroken / "final" / "manifest.json").read_text())["facts"]["step"] == ends[0]


@pytest.mark.parametrize(("evaluate_every", "saves"), [(3, [3, 6]), (4, [3, 6, 8])])
def test_an_end_by_an_evaluation_saves_a_step_that_is_not_saved_yet(fork_server, tiny, tmp_path, evaluate_every, saves):
    """And never twice: the first would go before the second has its name, and with keep_last = 1 it is the only one."""
    stop = "callbacks.early_stopping={patience: 1, min_delta: 10.0}"
    more = [f"evaluation.every_steps={evaluate_every}", "checkpoint.keep_last=1", stop]
    job = fork_server.run("train", train_argv(tiny, tmp_path / "run", *more))
    assert job.codes == [0], job.output
    events = [json.loads(line) for line in (tmp_path / "run" / "events.ndjson").read_text().splitlines()]
    assert [event["message"] for event in events if event["kind"] == "save"] == [f"step {step}" for step in saves]
    assert metrics_of(tmp_path / "run")[-1]["step"] == saves[-1]


def test_history_tells_the_epochs_of_the_run(unbroken):
    lines = [json.loads(line) for line in (unbroken / "history.ndjson").read_text().splitlines()]
    train = [line for line in map(json.loads, (unbroken / "metrics.ndjson").open()) if line["split"] == "train"]
    num_blocks = json.loads((unbroken / "run.json").read_text())["blocks"]["num_blocks"]
    assert [line["step"] for line in lines] == [-(-num_blocks // 64), train[-1]["step"]]
    first = train[: lines[0]["step"]]
    assert lines[0]["mean_loss"] == pytest.approx(sum(line["loss"] for line in first) / len(first))
    assert lines[0]["last_learning_rate"] == first[-1]["learning_rate"]
    assert lines[0]["time_s"] == pytest.approx(first[-1]["elapsed_s"], abs=0.05)
    assert sum(line["steps"] for line in lines) == len(train)


def test_kills_change_nothing_that_callbacks_see_or_write(fork_server, tiny, unbroken, tmp_path):
    """Killed while it evaluates, and anywhere after a few steps more."""
    draws, hits, argv = random.Random(3), [], full_argv(tiny, tmp_path / "killed")
    for aim in ("evaluate", None):
        hit = kill_once(fork_server, argv, tmp_path / "killed", num_processes=1, aim=aim, draws=draws)
        hits += [hit] if hit else []
    assert hits
    job = fork_server.run("train", argv)
    assert job.codes == [0], job.output
    assert outcome(tmp_path / "killed") == outcome(unbroken), hits
    assert written(tmp_path / "killed") == written(unbroken), hits


def test_lines_after_the_checkpoint_go_when_the_run_is_resumed(fork_server, tiny, unbroken, tmp_path):
    """The last checkpoint, which is the one of the last evaluation, is lost with the model."""
    run_dir = tmp_path / "run"
    shutil.copytree(unbroken, run_dir, symlinks=True)
    last, before = run_folder.steps_saved(run_dir)
    shutil.rmtree(run_dir / "final")
    shutil.rmtree(run_folder.checkpoint_path(run_dir, last))
    job = fork_server.run("train", full_argv(tiny, run_dir))
    assert job.codes == [0], job.output
    assert f"step {before}" in job.output
    assert outcome(run_dir) == outcome(unbroken)
    assert written(run_dir) == written(unbroken)


def test_samples_are_what_the_checkpoint_generates(fork_server, tiny, unbroken):
    """The last evaluation, from the folder of its step."""
    folder = run_folder.checkpoint_path(unbroken, max(run_folder.steps_saved(unbroken)))
    lines = [json.loads(line) for line in (unbroken / "samples.ndjson").read_text().splitlines()]
    steps = sorted({line["step"] for line in metrics_of(unbroken) if line["split"] == "validation"})
    assert [(line["step"], line["prompt"]) for line in lines] == [(s, p) for s in steps for p in ("def ", "import")]
    model, tokenizer = models.load(folder), tokenizers.load(folder)
    for number, line in enumerate(lines[-2:]):
        ids, seed = prompts.encode_prompt(tokenizer, line["prompt"]), seeds.derive(0, "sample", number)
        asked = generation.Request(ids, max_new_tokens=8, temperature=1.0, seed=seed)
        assert generation.generate(model.eval(), tokenizer, [asked])[0].text == line["text"]


def test_sampling_disturbs_nothing(fork_server, tiny, tmp_path):
    """Weights, metrics and the content of the checkpoints are those of a run without it."""
    settings = "callbacks.sample_texts={prompts: ['def ', ''], max_new_tokens: 8, temperature: 1.0}"
    found = []
    for name, more in (("with", [settings]), ("without", [])):
        job = fork_server.run("train", train_argv(tiny, tmp_path / name, "training.max_steps=6", *more))
        assert job.codes == [0], job.output
        saved = manifest.read(run_folder.checkpoint_path(tmp_path / name, 6))["content_digest"]
        found.append((outcome(tmp_path / name), saved))
    assert found[0] == found[1]


@pytest.mark.distributed
def test_two_processes_end_together_and_one_writes(fork_server, tiny, tmp_path):
    stop = "callbacks={early_stopping: {patience: 1, min_delta: 10.0}, history: {}, sample_texts: {prompts: ['a']}}"
    argv = [*train_argv(tiny, tmp_path / "run"), stop, "callbacks.sample_texts.max_new_tokens=8"]
    job = fork_server.run("train", argv, num_processes=2)
    assert job.codes == [0, 0], job.output
    samples, epochs = written(tmp_path / "run")
    assert [json.loads(line)["step"] for line in samples.splitlines()] == [5, 10]
    assert [(line["epoch"], line["steps"]) for line in epochs] == [(1, 10)]


@pytest.mark.distributed
def test_a_prompt_that_leaves_no_room_ends_all_processes_at_the_first_step(fork_server, tiny, tmp_path):
    settings = "callbacks.sample_texts={prompts: ['def main'], max_new_tokens: 30}"
    job = fork_server.run("train", [*train_argv(tiny, tmp_path / "run"), settings], num_processes=2)
    assert job.codes == [2, 2], job.output
    assert job.output.count("error: ") == 1
    assert "error: command line: callbacks.sample_texts.max_new_tokens: 30 after the " in job.output
    assert "goes beyond the model's 32 positions. Take " in job.output
    assert metrics_of(tmp_path / "run")[-1]["step"] == 1


def test_a_damaged_line_of_a_log_is_named(tmp_path):
    (tmp_path / "history.ndjson").write_text('{"epoch": 0}\nhello\n')
    with pytest.raises(UserError, match=r"history\.ndjson:2: is no line of this file\. Delete the line\."):
        history_of(tmp_path, TrainerState(), range(1, 10), end=True)
