"""A run's length, ancestors and place to go on from are decided before its first step."""

import errno
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st

from codex_accel import checkpoint, files, identity, manifest, processes, run, run_folder
from codex_accel import model as models
from codex_accel import tokenizer as tokenizers
from codex_accel.errors import UserError
from codex_accel.evaluation import Scores
from codex_accel.events import LineLog
from codex_accel.packing import Batch
from codex_accel.train_schema import Checkpoint, Data, Model, Optimizer, Schedule, TrainConfig, Training

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16}


def config(
    *, resume="auto", seed=0, block_size=16, optimizer=None, schedule=None, model=GPT2, attention="sdpa", **training
) -> TrainConfig:
    training = {"max_steps": 10, **training}
    return TrainConfig(
        output_dir="run",
        resume=resume,
        seed=seed,
        model=Model(config=model, attention=attention),
        data=Data(dataset="d", block_size=block_size),
        training=Training(**training),
        optimizer=optimizer or Optimizer(),
        schedule=schedule or Schedule(),
    )


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


# --- batches and length -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_processes", "expected"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_processes_share_the_batch(monkeypatch, num_processes, expected):
    monkeypatch.setenv("WORLD_SIZE", str(num_processes))
    assert run.accumulation_steps(config(micro_batch_size=4, global_batch_size=24)) == expected


def test_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"global_batch_size: 24 cannot be shared by 4 .* Take a multiple of 16"):
        run.accumulation_steps(config(micro_batch_size=4, global_batch_size=24))


@given(num_blocks=st.integers(1, 1000), epochs=st.floats(0.01, 10), batch=st.integers(1, 32))
def test_length_in_epochs_covers_them_and_no_more(num_blocks, epochs, batch):
    settings = config(max_steps=None, max_epochs=epochs, micro_batch_size=batch, global_batch_size=batch)
    steps, per_epoch = run.length(settings, num_blocks=num_blocks)
    assert per_epoch == num_blocks / batch
    assert steps == math.ceil(epochs * per_epoch)


def test_length_in_tokens_covers_them():
    """1000 tokens in steps of 8 x 16 = 128: seven are 896, eight are 1024."""
    assert run.length(config(max_steps=None, max_tokens=1000), num_blocks=5)[0] == 8


def test_shortest_limit_counts():
    limits = {"max_steps": 5, "max_epochs": 2.0, "max_tokens": 10_000}
    assert run.length(config(**limits), num_blocks=8)[0] == 2
    assert run.length(config(**limits), num_blocks=800)[0] == 5


# --- engine -------------------------------------------------------------------------------------------------------


def test_engine_that_accelerate_has_taken_is_accepted(accelerator):
    processes.require_engine(accelerator)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_engine_that_accelerate_has_not_taken_is_refused(accelerator, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=f"environment: {variable} = true: asks for .*, but NO is in use"):
        processes.require_engine(accelerator)


def test_processes_that_train_alone_are_refused(accelerator, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match="WORLD_SIZE = 2: the launcher started 2 processes, but accelerate has joined 1"
    ):
        processes.require_engine(accelerator)


# --- ancestors ----------------------------------------------------------------------------------------------------


def parents_of(tiny, settings):
    start = None if settings.model.path is None else Path(settings.model.path)
    return run.parents(tiny / "dataset", tiny / "tokenizer", start)


def identity_of(tiny, settings: TrainConfig, *, mixed_precision="no", parents=None) -> dict:
    loaded, document = tokenizers.load(tiny / "tokenizer"), manifest.read(tiny / "dataset")
    start = None if settings.model.path is None else Path(settings.model.path)
    parents, model = parents or parents_of(tiny, settings), models.build(settings, loaded, start=start)
    return identity.of(settings, document, parents, model, mixed_precision=mixed_precision)


def test_parents_are_dataset_tokenizer_and_start(tiny, shared):
    settings = config().model_copy(update={"model": Model(path=str(shared / "models" / "stories260K"))})
    kinds = [parent["kind"] for parent in parents_of(tiny, settings)]
    assert kinds == ["dataset", "tokenizer", "unverified"]


# --- the tokenizer of the data ------------------------------------------------------------------------------------


def test_tokenizer_of_a_dataset_is_the_one_recorded(tiny):
    document = manifest.read(tiny / "dataset")
    assert run.tokenizer_folder(tiny / "dataset", document, verify=True) == tiny / "tokenizer"


def test_changed_tokenizer_is_refused(tiny):
    document = manifest.read(tiny / "dataset")
    forged = {**document["parents"][0], "manifest_digest": "0" * 64}
    with pytest.raises(UserError, match="its tokenizer is not the one recorded"):
        run.tokenizer_folder(tiny / "dataset", {"parents": [forged]}, verify=True)


def test_model_of_another_tokenizer_is_refused(tiny, shared):
    run.require_same_tokenizer(tiny / "tokenizer", tiny / "dataset", key="dataset")
    with pytest.raises(UserError, match="ids mean other text to the model"):
        run.require_same_tokenizer(shared / "models" / "stories260K", tiny / "dataset", key="dataset")


# --- where to go on -----------------------------------------------------------------------------------------------


def sealed(run_dir: Path, step: int, parents: Sequence[dict] = ()) -> Path:
    """A checkpoint that verifies; what choosing looks at is in its manifest."""
    folder = run_folder.checkpoint_path(run_dir, step)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(f"{run_dir.name} {step}".encode())
    names, facts = ["model.safetensors"], {"step": step}
    manifest.seal(folder, kind="checkpoint", final=folder, payload=names, config=config(), parents=parents, facts=facts)
    return folder


def damage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"damaged")


def begin(run_dir: Path, *, parents: Sequence[dict] = ()) -> None:
    """What a run that has started leaves besides checkpoints."""
    LineLog(run_dir / run_folder.METRICS).write({"step": 1, "loss": 2.0})
    (run_dir / "run.json").write_text(json.dumps({"parents": parents}))


def choose(run_dir: Path, resume="auto", **options) -> Path | None:
    LineLog(run_dir / run_folder.METRICS)  # the script has made it by then
    settings = config(resume=str(resume)).model_copy(update=options)
    return run.choose_checkpoint(settings, run_dir, lambda *_: None)


def test_fresh_folder_starts_from_nothing(tmp_path):
    for resume in ("auto", "never"):
        assert choose(tmp_path, resume) is None


def test_auto_takes_the_newest_whole(tmp_path):
    for step in (1, 2, 3):
        sealed(tmp_path, step)
    assert choose(tmp_path).name == "step-000000003"
    damage(run_folder.checkpoint_path(tmp_path, 3))
    assert choose(tmp_path).name == "step-000000002"


def test_never_refuses_a_folder_with_a_run(tmp_path):
    run_folder.checkpoint_path(tmp_path, 5).mkdir(parents=True)
    with pytest.raises(UserError, match=r"resume: never, but .* holds a run at step 5"):
        choose(tmp_path, "never")


def test_run_whose_checkpoints_are_all_broken_is_not_begun_anew(tmp_path):
    run_folder.checkpoint_path(tmp_path, 5).mkdir(parents=True)
    rejected = []
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        run.choose_checkpoint(config(), tmp_path, lambda path, problems: rejected.append(path.name))
    assert rejected == ["step-000000005"]
    assert run_folder.steps_saved(tmp_path) == [5]


def test_named_checkpoint_must_be_one(tiny, tmp_path):
    with pytest.raises(UserError, match=r"resume = .* holds a dataset, not a checkpoint"):
        choose(tmp_path, tiny / "dataset")
    with pytest.raises(UserError, match=r"resume = .*: no such folder"):
        choose(tmp_path, tmp_path / "none")


def test_named_checkpoint_must_be_whole(tmp_path):
    damage(folder := sealed(tmp_path / "other", 5))
    with pytest.raises(UserError, match=r"resume = .* is damaged"):
        choose(tmp_path / "run", folder)
    assert choose(tmp_path / "run", folder, verify=False) == folder


def test_newest_of_the_run_itself_may_be_named(tmp_path):
    sealed(tmp_path, 1)
    assert choose(tmp_path, folder := sealed(tmp_path, 2)) == folder


def test_older_of_the_run_itself_is_refused(tmp_path):
    """It would be a second history in one folder."""
    folder = sealed(tmp_path, 1)
    sealed(tmp_path, 2)
    with pytest.raises(UserError, match=r"resume: is at step 1, but .* goes to step 2\. Choose another output_dir"):
        choose(tmp_path, folder)


def test_named_folder_among_the_checkpoints_need_not_have_the_name_of_one(tmp_path):
    """Somebody has put a copy back by hand, and nothing else is there."""
    copy = sealed(tmp_path, 1).rename(tmp_path / run_folder.CHECKPOINTS / "copy")
    assert choose(tmp_path, copy) == copy


def test_branch_begins_in_an_empty_folder(tmp_path):
    assert choose(tmp_path / "branch", start := sealed(tmp_path / "run", 5)) == start


def test_branch_said_again_goes_on_with_the_branch(tmp_path):
    """Also with none of its own checkpoints yet; and from an older one of its own where the newest is damaged."""
    start, branch = sealed(tmp_path / "run", 5), tmp_path / "branch"
    parents = run.branch_parents(start, branch)
    begin(branch, parents=[{"manifest_digest": None}, *parents])
    assert choose(branch, start) == start
    own = [sealed(branch, step, parents) for step in (6, 7)]
    assert choose(branch, start) == own[1]
    damage(own[1])
    assert choose(branch, start) == own[0]


def test_branch_without_checkpoints_is_not_begun_at_step_0(tmp_path):
    """Killed before its first save, and then told to go on from what it has: that would be nothing."""
    start, branch = sealed(tmp_path / "run", 5), tmp_path / "branch"
    begin(branch, parents=run.branch_parents(start, branch))
    with pytest.raises(UserError, match=f"is a branch of {start}. Say resume={start} again"):
        choose(branch)


def test_branch_whose_checkpoints_are_all_broken_is_not_begun_anew(tmp_path):
    start, branch = sealed(tmp_path / "run", 5), tmp_path / "branch"
    begin(branch, parents=run.branch_parents(start, branch))
    damage(sealed(branch, 6))
    with pytest.raises(UserError, match=r"no checkpoint in .*branch is whole"):
        choose(branch, start)


@pytest.mark.parametrize("own", [True, False], ids=["with checkpoints", "with metrics alone"])
def test_branch_into_a_folder_with_another_run_is_refused(tmp_path, own):
    start, other, branch = sealed(tmp_path / "run", 5), sealed(tmp_path / "run", 6), tmp_path / "branch"
    begin(branch, parents=run.branch_parents(other, branch))
    if own:
        sealed(branch, 1)
    with pytest.raises(UserError, match=r"resume: is of another run, but .*branch holds a run already"):
        choose(branch, start)


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"parents": [1]}', '{"parents": [{}]}'])
def test_folder_that_does_not_say_what_it_is_a_branch_of_is_refused(tmp_path, text):
    start, branch = sealed(tmp_path / "run", 5), tmp_path / "branch"
    begin(branch)
    (branch / "run.json").unlink()
    if text is not None:
        (branch / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"is of another run, but .*branch holds a run already"):
        choose(branch, start)


def test_branch_keeps_its_parent_through_its_own_checkpoints(tmp_path):
    """With the path as seen from here, and the digest that it was branched from."""
    start, branch = sealed(tmp_path / "run", 5), tmp_path / "branch"
    [parent] = run.branch_parents(start, branch)
    assert (parent["kind"], parent["path"]) == ("checkpoint", str(start))
    assert parent["manifest_digest"] == files.sha256_file(start / manifest.MANIFEST)
    assert run.branch_parents(sealed(branch, 6, [parent]), branch) == [parent]
    assert run.branch_parents(sealed(branch, 7), branch) == []


# --- a run that is complete ---------------------------------------------------------------------------------------


def finish(run_dir: Path, settings: TrainConfig, parents: Sequence[dict] = ()) -> None:
    final = run_dir / run_folder.FINAL
    final.mkdir(parents=True)
    gone = [{"kind": kind, "path": kind, "content_digest": "0" * 64} for kind in ("dataset", "tokenizer")]
    manifest.seal(final, kind="model", final=final, payload=[], config=settings, parents=parents or gone)


def test_run_with_a_final_is_complete(tmp_path):
    assert not identity.is_complete(config(), tmp_path)
    finish(tmp_path, config())
    assert identity.is_complete(config(), tmp_path)
    assert not identity.is_complete(config(resume="somewhere"), tmp_path)


def test_complete_run_of_other_settings_is_refused_unless_they_are_named(tmp_path):
    finish(tmp_path, config())
    longer = config(max_steps=20)
    with pytest.raises(UserError, match=r"training\.max_steps   10     20"):
        identity.is_complete(longer, tmp_path)
    assert not identity.is_complete(longer.model_copy(update={"allow_drift": ["training.max_steps"]}), tmp_path)


def test_complete_run_may_move_and_be_told_to_stop_otherwise(tmp_path):
    """What is no part of the identity: paths, evaluation, limits of time."""
    finish(tmp_path, config())
    settings = config(max_time_s=1.0, stop_at_step=3)
    changed = {"data": settings.data.model_copy(update={"dataset": "moved", "validation_split": None})}
    assert identity.is_complete(settings.model_copy(update=changed), tmp_path)


def test_complete_run_of_other_contents_is_refused_under_the_names_of_the_identity(tiny, shared, tmp_path):
    """The paths may change, what lies there may not; each name of the table is one that `allow_drift` takes."""
    models = shared / "models"
    start = config().model_copy(update={"model": Model(path=str(models / "stories260K"))})
    finish(tmp_path, start, parents_of(tiny, start))
    moved = {"data": start.data.model_copy(update={"dataset": f"{tiny}/tokenizer/../dataset"})}
    moved["model"] = Model(path=f"{models}/../models/stories260K")
    assert identity.is_complete(start.model_copy(update=moved), tmp_path)
    other = {"data": start.data.model_copy(update={"dataset": str(tiny / "tokenizer")})}
    other["model"] = Model(config=GPT2, attention="eager")
    with pytest.raises(UserError) as caught:
        identity.is_complete(start.model_copy(update=other), tmp_path)
    names = {line.split()[0] for line in caught.value.problems[2:-1]}
    assert names == {"dataset", "model.start", "model.architecture", "model.attention"}
    identity.require_known_drift(start.model_copy(update={"allow_drift": [*names]}), identity_of(tiny, config()))


# --- pruning ------------------------------------------------------------------------------------------------------


def test_prune_that_the_disk_refuses_is_noted_and_tried_again(tmp_path, monkeypatch, capsys):
    for step in (1, 2):
        sealed(tmp_path, step)
    events = LineLog(tmp_path / "events.ndjson")
    settings = config().model_copy(update={"checkpoint": Checkpoint(keep_last=1)})

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        run.prune(settings, tmp_path, events)
    assert "old checkpoints cannot be deleted" in capsys.readouterr().out
    run.prune(settings, tmp_path, events)
    assert run_folder.steps_saved(tmp_path) == [2]
    kinds = [json.loads(line)["kind"] for line in events.path.read_text().splitlines()]
    assert kinds == ["failed prune", "prune"]


# --- a save that fails --------------------------------------------------------------------------------------------


def test_lost_scores_stop_a_run_that_keeps_the_best(tmp_path, capsys):
    """They alone tell which checkpoints are the best; without keep_best the loss is told."""
    metrics, events = LineLog(tmp_path / run_folder.METRICS), LineLog(tmp_path / run_folder.EVENTS)
    metrics.write({"step": 1})
    state = checkpoint.TrainerState(step=7, metrics_bytes=metrics.sync() + 1)
    best = config().model_copy(update={"checkpoint": Checkpoint(keep_best=1)})
    with pytest.raises(UserError, match=r"the scores are lost: .*metrics\.ndjson is shorter than it was at step 7"):
        run.cut_back(best, metrics, events, state)
    run.cut_back(config(), metrics, events, state)
    assert "lines before it are lost" in capsys.readouterr().out
    assert [json.loads(line)["kind"] for line in events.path.read_text().splitlines()] == ["lost metrics"]


def test_a_missing_file_of_the_log_stops_a_run_that_keeps_the_best(tmp_path):
    """Though what is left is longer than the place of the checkpoint."""
    metrics, events = (LineLog(tmp_path / name, max_bytes=12) for name in (run_folder.METRICS, run_folder.EVENTS))
    for step in range(5):
        metrics.write({"step": step})
    state = checkpoint.TrainerState(step=7, metrics_bytes=24)
    best = config().model_copy(update={"checkpoint": Checkpoint(keep_best=1)})
    run.cut_back(best, metrics, events, checkpoint.TrainerState(step=7, metrics_bytes=48))
    (tmp_path / "metrics.000001.ndjson").unlink()
    with pytest.raises(UserError, match="the scores are lost"):
        run.cut_back(best, metrics, events, state)


def test_failed_save_stops_the_run_or_is_noted(tmp_path, capsys):
    events, error = LineLog(tmp_path / "events.ndjson"), checkpoint.SaveFailed("step-3: was not saved.")
    with pytest.raises(checkpoint.SaveFailed, match="was not saved"):
        run.on_failed_save(config(), events, error)
    go_on = config().model_copy(update={"checkpoint": Checkpoint(on_failed_save="go_on")})
    run.on_failed_save(go_on, events, error)
    assert capsys.readouterr().out == "warning: step-3: was not saved.\n"
    policies = [json.loads(line)["policy"] for line in events.path.read_text().splitlines()]
    assert policies == ["stop", "go_on"]


# --- steps without an update --------------------------------------------------------------------------------------


def test_nonfinite_gradient_stops_the_run_or_is_noted(tmp_path):
    events = LineLog(tmp_path / "events.ndjson", enabled=True)
    with pytest.raises(UserError, match=r"gradient norm is nan at step 3. The checkpoint of step 2 stands"):
        run.on_nonfinite(config(), events, step=3, grad_norm=math.nan, saved_step=2)
    run.on_nonfinite(config(on_nonfinite="skip"), events, step=4, grad_norm=math.inf, saved_step=-1)
    run.on_nonfinite(config(on_nonfinite="skip"), events, step=5, grad_norm=0.5, saved_step=-1)
    messages = [json.loads(line)["message"] for line in (tmp_path / "events.ndjson").read_text().splitlines()]
    assert messages == [
        "the gradient norm is nan at step 3",
        "the gradient norm is inf at step 4",
        "the loss is not finite at step 5",
    ]


# --- arithmetic ---------------------------------------------------------------------------------------------------


def test_sums_of_one_process_are_its_own(accelerator):
    scores = Scores(np.array([1.0]), np.array([2]), np.array([1]))
    assert processes.sum_int(accelerator, 2**53 + 1) == 2**53 + 1
    assert processes.sum_float(accelerator, torch.tensor(1.5)) == 1.5
    assert processes.sum_over_processes(accelerator, scores) is scores


def test_batch_goes_to_the_device_as_it_is():
    ids, labels = np.array([[1, 2]]), np.array([[2, -100]])
    found = run.to_device(Batch(ids, labels, None), torch.device("cpu"))
    assert found["position_ids"] is None
    assert found["input_ids"].tolist() == [[1, 2]]
    assert found["labels"].tolist() == [[2, -100]]
