"""A run's length, identity and ancestors are decided before its first step."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st

from codex_accel import checkpoint, manifest, processes, run
from codex_accel import model as models
from codex_accel import tokenizer as tokenizers
from codex_accel.errors import UserError
from codex_accel.evaluation import Scores
from codex_accel.events import LineLog
from codex_accel.packing import Batch
from codex_accel.schema import Data, Model, Optimizer, TrainConfig, Training

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16}


def config(*, resume="auto", seed=0, block_size=16, optimizer=None, model=GPT2, **training) -> TrainConfig:
    training = {"max_steps": 10, **training}
    return TrainConfig(
        output_dir="run",
        resume=resume,
        seed=seed,
        model=Model(config=model),
        data=Data(dataset="d", block_size=block_size),
        training=Training(**training),
        optimizer=optimizer or Optimizer(),
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


# --- identity -----------------------------------------------------------------------------------------------------


def parents_of(tiny, settings):
    start = None if settings.model.path is None else Path(settings.model.path)
    return run.parents(tiny / "dataset", tiny / "tokenizer", start)


def identity_of(tiny, settings: TrainConfig, *, mixed_precision="no") -> dict:
    loaded = tokenizers.load(tiny / "tokenizer")
    parents = parents_of(tiny, settings)
    document, model = manifest.read(tiny / "dataset"), models.build(settings, loaded, start=None)
    return run.identity(settings, document, parents, model, mixed_precision=mixed_precision)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"block_size": 8}, "data.block_size"),
        ({"max_steps": 11}, "training.max_steps"),
        ({"micro_batch_size": 4}, "training.micro_batch_size"),
        ({"max_grad_norm": None}, "training.max_grad_norm"),
        ({"optimizer": Optimizer(weight_decay=0.2)}, "optimizer.weight_decay"),
        ({"model": {**GPT2, "resid_pdrop": 0.2}}, "model.architecture.resid_pdrop"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_change_that_matters_is_a_difference(tiny, change, key):
    before, now = identity_of(tiny, config()), identity_of(tiny, config(**change))
    [line] = checkpoint.differences(before, now, allowed=[])
    assert line.startswith(f"{key}: ")


def test_precision_from_the_environment_is_a_difference(tiny):
    before, now = identity_of(tiny, config()), identity_of(tiny, config(), mixed_precision="bf16")
    assert checkpoint.differences(before, now, allowed=[]) == ["mixed_precision: 'no' -> 'bf16'"]


def test_paths_and_logging_may_change(tiny):
    settings = config()
    other = settings.model_copy(update={"output_dir": "elsewhere", "log": settings.log.model_copy()})
    assert identity_of(tiny, other) == identity_of(tiny, settings)


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


def test_fresh_folder_starts_from_nothing(tmp_path):
    for resume in ("auto", "never"):
        assert run.choose_checkpoint(config(resume=resume), tmp_path, lambda *_: None) is None


def test_never_refuses_a_folder_with_a_run(tmp_path):
    checkpoint.path_of(tmp_path, 5).mkdir(parents=True)
    with pytest.raises(UserError, match=r"resume: never, but .* holds a run at step 5"):
        run.choose_checkpoint(config(resume="never"), tmp_path, lambda *_: None)


def test_run_whose_checkpoints_are_all_broken_is_not_begun_anew(tmp_path):
    checkpoint.path_of(tmp_path, 5).mkdir(parents=True)
    rejected = []
    with pytest.raises(UserError, match=r"no checkpoint in .* is whole"):
        run.choose_checkpoint(config(), tmp_path, lambda path, problems: rejected.append(path.name))
    assert rejected == ["step-000000005"]


def test_named_checkpoint_must_be_one(tiny, tmp_path):
    with pytest.raises(UserError, match=r"resume = .* holds a dataset, not a checkpoint"):
        run.choose_checkpoint(config(resume=str(tiny / "dataset")), tmp_path, lambda *_: None)


# --- steps without an update --------------------------------------------------------------------------------------


def test_nonfinite_gradient_stops_the_run_or_is_noted(tmp_path):
    events = LineLog(tmp_path / "events.ndjson", enabled=True)
    with pytest.raises(UserError, match=r"gradient norm is nan at step 3. The checkpoint of step 2 stands"):
        run.on_nonfinite(config(), events, step=3, grad_norm=math.nan, saved_step=2)
    run.on_nonfinite(config(on_nonfinite="skip"), events, step=4, grad_norm=math.inf, saved_step=-1)
    assert len((tmp_path / "events.ndjson").read_text().splitlines()) == 2


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
