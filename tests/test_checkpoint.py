"""A folder named step-N is whole; the newest whole one is taken; what differs is told."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

from codex_accel import checkpoint, files, manifest, optim
from codex_accel import model as models
from codex_accel import tokenizer as tokenizers
from codex_accel.checkpoint import TrainerState
from codex_accel.errors import UserError
from codex_accel.schema import Data, Model, Optimizer, TrainConfig, Training

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16}
STATE = TrainerState(step=7, num_target_tokens=1234, num_skipped=1, elapsed_s=2.5, metrics_bytes=99)
CONFIG = TrainConfig(
    output_dir="run", model=Model(config=GPT2), data=Data(dataset="d", block_size=16), training=Training(max_steps=1)
)


class Run:
    """A prepared model and optimizer that have taken a step, as the training script has them."""

    def __init__(self, tiny: Path, seed: int = 0):
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(cpu=True, mixed_precision="no")
        self.tokenizer = tiny / "tokenizer"
        config = CONFIG.model_copy(update={"seed": seed})
        self.model = models.build(config, tokenizers.load(self.tokenizer), start=None)
        self.model, self.optimizer = self.accelerator.prepare(self.model, optim.build(Optimizer(), self.model))
        checkpoint.register_hooks(self.accelerator)
        self.model(input_ids=torch.tensor([[1, 2, 3 + seed]])).logits.square().sum().backward()
        self.optimizer.step()

    def save(self, run_dir: Path, state: TrainerState, *, keep_last: int = 2) -> list[str]:
        (run_dir / checkpoint.FOLDER).mkdir(parents=True, exist_ok=True)
        return checkpoint.save(
            self.accelerator,
            run_dir,
            state,
            model=self.accelerator.unwrap_model(self.model),
            config=CONFIG,
            tokenizer_folder=self.tokenizer,
            parents=[],
            identity={"seed": 0},
            keep_last=keep_last,
        )


@pytest.fixture(scope="module")
def run(tiny):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Run(tiny)
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """A run folder with checkpoints of steps 3, 5 and 7, each with other weights."""
    run_dir = tmp_path_factory.mktemp("run")
    for step in (3, 5, 7):
        run.save(run_dir, TrainerState(**{**asdict(STATE), "step": step}), keep_last=9)
    return run_dir


@pytest.fixture
def run_dir(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run", symlinks=True))


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / checkpoint.FOLDER).glob("step-*"))


def damage(run_dir: Path, step: int) -> None:
    path = checkpoint.path_of(run_dir, step) / "optimizer.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def newest(run_dir: Path) -> tuple[str | None, dict[str, list[str]]]:
    """Name of the newest whole checkpoint, and the problems of those that were skipped."""
    rejected = {}
    found = checkpoint.newest_whole(run_dir, lambda path, problems: rejected.update({path.name: problems}))
    return found and found.name, rejected


# --- saving -------------------------------------------------------------------------------------------------------


def test_saved_folder_is_whole_and_names_its_step(run_dir):
    path = checkpoint.path_of(run_dir, 7)
    assert path.name == "step-000000007"
    assert manifest.problems_of(path) == []
    document = manifest.read(path)
    assert (document["kind"], document["facts"]) == ("checkpoint", {"step": 7, "num_target_tokens": 1234})


def test_no_temporary_folder_is_left(saved):
    assert not [path for path in (saved / checkpoint.FOLDER).iterdir() if path.name.startswith(".")]


@pytest.mark.security
def test_no_pickle_of_random_states_is_kept(run_dir):
    assert list(checkpoint.path_of(run_dir, 7).glob("*.pkl")) == []


def test_trainer_state_holds_the_counters_and_the_identity(run_dir):
    text = (checkpoint.path_of(run_dir, 7) / checkpoint.TRAINER_STATE).read_text()
    assert json.loads(text) == {**asdict(STATE), "identity": {"seed": 0}}


def test_saved_folder_is_a_from_pretrained_folder(run, run_dir):
    """By transformers alone: the same logits and the same ids."""
    folder = checkpoint.path_of(run_dir, 7)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    input_ids = torch.tensor([[1, 5, 9]])
    torch.testing.assert_close(model(input_ids).logits, run.model.eval()(input_ids=input_ids).logits, rtol=0, atol=0)
    text = "def f(x): return x"
    auto = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert auto(text)["input_ids"] == tokenizers.load(run.tokenizer).encode([text])[0]


def test_tied_weights_are_stored_once(run_dir):
    """By hand: embeddings 512 x 16 and 16 x 16, a layer of 12 x 16 x 16 + 13 x 16, the last norm 2 x 16, float32."""
    num = 512 * 16 + 16 * 16 + 12 * 16 * 16 + 13 * 16 + 2 * 16
    size = (checkpoint.path_of(run_dir, 7) / "model.safetensors").stat().st_size
    assert 4 * num <= size < 4 * num + 4096


def test_a_broken_folder_of_the_same_step_is_replaced(run, run_dir):
    """What resuming has stepped back over and reached again."""
    damage(run_dir, 7)
    run.save(run_dir, STATE)
    assert manifest.problems_of(checkpoint.path_of(run_dir, 7)) == []


def test_a_failed_save_leaves_the_older_ones(run, run_dir, monkeypatch):
    """A disk that fails at the last moment, when the manifest has been written."""

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no space"):
        run.save(run_dir, TrainerState(step=9), keep_last=1)
    assert names(run_dir) == [f"step-{step:09d}" for step in (3, 5, 7)]
    assert newest(run_dir) == ("step-000000007", {})


# --- pruning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_last", [1, 2, 3, 4])
def test_prune_keeps_the_newest(run_dir, keep_last):
    kept = [3, 5, 7][-keep_last:]
    pruned = checkpoint.prune(run_dir, keep_last=keep_last)
    assert sorted(pruned) == [f"step-{step:09d}" for step in (3, 5, 7) if step not in kept]
    assert names(run_dir) == [f"step-{step:09d}" for step in kept]


def test_saving_prunes_and_tells(run, run_dir):
    assert run.save(run_dir, TrainerState(step=9), keep_last=2) == ["step-000000005", "step-000000003"]
    assert names(run_dir) == ["step-000000007", "step-000000009"]


def test_steps_are_those_of_the_names_newest_first(run_dir):
    for name in ("step-1", "step-00000000x", ".tmp-step-000000009-1", "other"):
        (run_dir / checkpoint.FOLDER / name).mkdir()
    assert checkpoint.steps_saved(run_dir) == [7, 5, 3]
    assert checkpoint.steps_saved(run_dir / "none") == []


# --- choosing -----------------------------------------------------------------------------------------------------


def test_newest_checkpoint_is_taken(run_dir):
    assert newest(run_dir) == ("step-000000007", {})


def test_broken_checkpoints_are_named_and_skipped(run_dir):
    damage(run_dir, 7)
    (checkpoint.path_of(run_dir, 5) / "manifest.json").unlink()
    found, rejected = newest(run_dir)
    assert found == "step-000000003"
    assert list(rejected) == ["step-000000007", "step-000000005"]
    assert any("optimizer.bin: has changed" in problem for problem in rejected["step-000000007"])


def test_nothing_is_taken_where_nothing_is_whole(run_dir):
    for step in (3, 5, 7):
        damage(run_dir, step)
    found, rejected = newest(run_dir)
    assert found is None
    assert len(rejected) == 3


# --- loading ------------------------------------------------------------------------------------------------------


def test_loading_brings_weights_optimizer_and_counters_back(run, run_dir, tiny):
    """Into a run with other weights and other moments; accelerate keeps one state a process, so `run` lends it."""
    folder = checkpoint.path_of(run_dir, 7)
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    moments = [value["exp_avg"].clone() for value in run.optimizer.state_dict()["state"].values()]
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1.0)
        for value in run.optimizer.state.values():
            value["exp_avg"].add_(1.0)
    state, identity = checkpoint.load(run.accelerator, folder)
    assert (state, identity) == (STATE, {"seed": 0})
    assert all(torch.equal(value, weights[name]) for name, value in run.model.state_dict().items())
    found = [value["exp_avg"] for value in run.optimizer.state_dict()["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(found, moments, strict=True))
    assert run.accelerator.step == 0


def test_tied_head_stays_tied_after_loading(run, run_dir):
    checkpoint.load(run.accelerator, checkpoint.path_of(run_dir, 7))
    model = run.accelerator.unwrap_model(run.model)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.security
@pytest.mark.parametrize("name", ["random_states_0.pkl", "custom_checkpoint_0.pkl"])
def test_pickle_is_refused_and_not_run(run, run_dir, tmp_path, name):
    import pickle

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = checkpoint.path_of(run_dir, 7)
    (folder / name).write_bytes(pickle.dumps(Attack()))
    assert any("is not listed" in problem for problem in manifest.problems_of(folder))
    with pytest.raises(UserError, match=f"{name}: is a pickle"):
        checkpoint.load(run.accelerator, folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.security
def test_optimizer_file_cannot_run_code(run, run_dir, tmp_path):
    """torch.load with weights_only: a forged file is an error, whatever the manifest says."""
    import pickle

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = checkpoint.path_of(run_dir, 7)
    torch.save({"state": Attack(), "param_groups": []}, folder / "optimizer.bin")
    with pytest.raises(pickle.UnpicklingError):
        checkpoint.load(run.accelerator, folder)
    assert not (tmp_path / "ran").exists()


# --- differences --------------------------------------------------------------------------------------------------

BEFORE = {"seed": 0, "data": {"block_size": 32, "split": "train"}, "model": {"path": None, "sizes": [1, 2]}}


def differences(now, *allowed: str) -> list[str]:
    return checkpoint.differences(BEFORE, now, allowed=list(allowed))


def test_equal_identities_have_no_differences():
    assert differences(json.loads(json.dumps(BEFORE))) == []


def test_differences_are_told_with_key_before_and_now():
    now = {"seed": 1, "data": {"block_size": 64, "split": "train"}, "model": {"path": "m", "sizes": [1, 3]}}
    assert differences(now) == [
        "data.block_size: 32 -> 64",
        "model.path: None -> 'm'",
        "model.sizes: [1, 2] -> [1, 3]",
        "seed: 0 -> 1",
    ]


def test_key_that_came_or_went_is_a_difference():
    assert differences({**BEFORE, "new": 1}) == ["new: None -> 1"]
    assert differences({"seed": 0, "data": BEFORE["data"], "model": 5}) == [f"model: {BEFORE['model']!r} -> 5"]


def test_allowed_keys_and_what_lies_below_them_may_differ():
    now = {"seed": 1, "data": {"block_size": 64, "split": "other"}, "model": BEFORE["model"]}
    assert differences(now, "data", "seed") == []
    assert differences(now, "data.block_size", "seed") == ["data.split: 'train' -> 'other'"]
    assert differences(now, "dat", "see") == differences(now)


def test_copied_tokenizer_is_the_same(tiny, tmp_path):
    checkpoint.copy_tokenizer(tiny / "tokenizer", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert files.sha256_file(tmp_path / name) == files.sha256_file(tiny / "tokenizer" / name)
