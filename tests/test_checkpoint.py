"""A folder named step-N is whole, older ones stand until it is, and what it holds is loaded as numbers alone."""

import errno
import json
import os
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

from codex_accel import checkpoint, files, manifest, optim, run_folder
from codex_accel import model as models
from codex_accel import tokenizer as tokenizers
from codex_accel.checkpoint import SaveFailed, TrainerState
from codex_accel.errors import UserError
from codex_accel.events import LineLog
from codex_accel.train_schema import Data, Model, TrainConfig, Training

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16}
# By hand: embeddings 512 x 16 and 16 x 16, a layer of 12 x 16 x 16 + 13 x 16, the last norm 2 x 16.
NUM_PARAMETERS = 512 * 16 + 16 * 16 + 12 * 16 * 16 + 13 * 16 + 2 * 16
STATE = TrainerState(step=7, num_target_tokens=1234, num_skipped=1, elapsed_s=2.5, metrics_bytes=14)
CONFIG = TrainConfig(
    output_dir="run", model=Model(config=GPT2), data=Data(dataset="d", block_size=16), training=Training(max_steps=1)
)


class Run:
    """A prepared model and optimizer that have taken a step, as the training script has them."""

    def __init__(self, tokenizer: Path, model: dict, seed: int = 0):
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(cpu=True, mixed_precision="no")
        self.tokenizer = tokenizer
        self.config = CONFIG.model_copy(update={"seed": seed, "model": Model(config=model)})
        self.model = models.build(self.config, tokenizers.load(self.tokenizer), start=None)
        self.model, self.optimizer = self.accelerator.prepare(self.model, optim.build(self.config, self.model))
        checkpoint.register_hooks(self.accelerator)
        self.model(input_ids=torch.tensor([[1, 2, 3 + seed]])).logits.square().sum().backward()
        self.optimizer.step()

    def save(self, run_dir: Path, state: TrainerState, **options) -> None:
        (run_dir / run_folder.CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        checkpoint.save(
            self.accelerator,
            run_dir,
            state,
            model=self.accelerator.unwrap_model(self.model),
            config=self.config,
            log=LineLog(run_dir / run_folder.METRICS),
            tokenizer_folder=self.tokenizer,
            parents=[],
            identity={"seed": 0},
            **options,
        )


@pytest.fixture(scope="module")
def run(tiny):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Run(tiny / "tokenizer", GPT2)
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """A run folder with checkpoints of steps 3, 5 and 7, each with other weights."""
    run_dir = tmp_path_factory.mktemp("run")
    LineLog(run_dir / run_folder.METRICS).write({"loss": 2.5})
    for step in (3, 5, 7):
        run.save(run_dir, replace(STATE, step=step, metrics_bytes=0))
    return run_dir


@pytest.fixture
def run_dir(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run", symlinks=True))


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / run_folder.CHECKPOINTS).glob("step-*"))


def damage(run_dir: Path, step: int) -> None:
    path = run_folder.checkpoint_path(run_dir, step) / "optimizer.bin"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def newest(run_dir: Path) -> tuple[str | None, dict[str, list[str]]]:
    """Name of the newest whole checkpoint, and the problems of those that were skipped."""
    rejected = {}
    found = run_folder.newest_whole(run_dir, lambda path, problems: rejected.update({path.name: problems}))
    return found and found.name, rejected


# --- saving -------------------------------------------------------------------------------------------------------


def test_saved_folder_is_whole_and_names_its_step(run_dir):
    path = run_folder.checkpoint_path(run_dir, 7)
    assert path.name == "step-000000007"
    assert manifest.problems_of(path) == []
    document = manifest.read(path)
    counts = {"step": 7, "num_target_tokens": 1234}
    engine = {"num_processes": 1, "engine": "NO", "device": "cpu", "num_threads": 1}
    assert (document["kind"], document["facts"]) == ("checkpoint", counts | engine)


def test_no_temporary_folder_is_left(saved):
    assert not [path for path in (saved / run_folder.CHECKPOINTS).iterdir() if path.name.startswith(".")]


@pytest.mark.security
def test_no_pickle_of_random_states_is_kept(run_dir):
    assert list(run_folder.checkpoint_path(run_dir, 7).glob("*.pkl")) == []


def test_trainer_state_holds_the_counters_and_the_identity(run_dir):
    text = (run_folder.checkpoint_path(run_dir, 7) / checkpoint.TRAINER_STATE).read_text()
    assert json.loads(text) == {**asdict(STATE), "identity": {"seed": 0}}


def test_saved_folder_is_a_from_pretrained_folder(run, run_dir):
    """By transformers alone: the same logits and the same ids."""
    folder = run_folder.checkpoint_path(run_dir, 7)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    input_ids = torch.tensor([[1, 5, 9]])
    torch.testing.assert_close(model(input_ids).logits, run.model.eval()(input_ids=input_ids).logits, rtol=0, atol=0)
    text = "def f(x): return x"
    auto = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert auto(text)["input_ids"] == tokenizers.load(run.tokenizer).encode([text])[0]


def test_tied_weights_are_stored_once(run_dir):
    size = (run_folder.checkpoint_path(run_dir, 7) / "model.safetensors").stat().st_size
    assert 4 * NUM_PARAMETERS <= size < 4 * NUM_PARAMETERS + 4096


def test_a_broken_folder_of_the_same_step_is_replaced(run, run_dir):
    """What resuming has stepped back over and reached again."""
    damage(run_dir, 7)
    run.save(run_dir, STATE)
    assert manifest.problems_of(run_folder.checkpoint_path(run_dir, 7)) == []


def test_saving_leaves_the_older_ones(run, run_dir):
    run.save(run_dir, replace(STATE, step=9))
    assert names(run_dir) == [f"step-{step:09d}" for step in (3, 5, 7, 9)]


def test_lines_of_metrics_are_on_the_disk_before_the_state_that_counts_them(run, run_dir):
    """By hand: `{"loss": 2.5}` and its line end are 14 bytes; the state on the disk and the one in memory say so."""
    state = replace(STATE, step=9, metrics_bytes=0)
    run.save(run_dir, state)
    stored = json.loads((run_folder.checkpoint_path(run_dir, 9) / checkpoint.TRAINER_STATE).read_text())
    assert (stored["metrics_bytes"], state.metrics_bytes) == (14, 14)


def test_a_save_that_fails_at_the_last_rename_leaves_the_older_ones(run, run_dir, monkeypatch):
    """A disk that fails when all is written, with the message that the user gets."""

    def fail(source, target):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))

    monkeypatch.setattr(os, "rename", fail)
    final = run_folder.checkpoint_path(run_dir, 9)
    with pytest.raises(SaveFailed) as caught:
        run.save(run_dir, replace(STATE, step=9))
    assert re.fullmatch(
        rf"{final}: was not saved \(process 0: {final}: Input/output error\)\. It needs about [\d,]+ bytes, [\d,]+ are "
        r"free\. Older checkpoints stand\. Mend the disk or make room, and run the same command again\.",
        str(caught.value),
    )
    assert sorted(os.listdir(final.parent)) == ["latest", *(f"step-{step:09d}" for step in (3, 5, 7))]
    assert newest(run_dir) == ("step-000000007", {})


def test_a_disk_without_room_is_told_before_anything_is_written(run, run_dir, monkeypatch):
    """By hand: 11,760 parameters and two moments of each in float32, and 1 MiB for the rest."""
    needed = 3 * 4 * NUM_PARAMETERS + (1 << 20)
    assert checkpoint.expected_bytes(run.accelerator.unwrap_model(run.model)) == needed == 1_189_696
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(SaveFailed, match=r"No space left on device\)\. It needs about 1,189,696 bytes, 1,000 are free"):
        run.save(run_dir, replace(STATE, step=9), write_state=lambda _: pytest.fail("was written"))
    assert newest(run_dir) == ("step-000000007", {})


def test_a_folder_that_has_gone_is_a_failed_save(run, run_dir):
    """A network disk that is lost in the middle, say: the message cannot tell what is free there."""

    def write(folder: str) -> None:
        shutil.rmtree(run_dir)
        os.mkdir(folder)

    with pytest.raises(SaveFailed, match=r"No such file or directory\)\. .* bytes, an unknown number are free"):
        run.save(run_dir, replace(STATE, step=9), write_state=write)


def test_a_folder_that_cannot_be_listed_is_a_failed_save(run, run_dir):
    """So that `on_failed_save` decides, and no process waits for one that has given up alone."""

    def write(folder: str) -> None:
        os.mkdir(folder)
        os.symlink("/", f"{folder}/link")

    with pytest.raises(SaveFailed, match=r"process 0: .*link: is a symbolic link"):
        run.save(run_dir, replace(STATE, step=9), write_state=write)
    assert newest(run_dir) == ("step-000000007", {})


def test_a_failure_that_is_not_the_disks_keeps_its_traceback(run, run_dir):
    def fail(_):
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        run.save(run_dir, replace(STATE, step=9), write_state=fail)
    assert newest(run_dir) == ("step-000000007", {})


def test_latest_leads_to_the_newest(run, run_dir):
    assert os.readlink(run_dir / run_folder.CHECKPOINTS / "latest") == "step-000000007"
    run.save(run_dir, replace(STATE, step=9))
    assert os.readlink(run_dir / run_folder.CHECKPOINTS / "latest") == "step-000000009"


def test_a_final_that_the_disk_refuses_leaves_the_old_one(run, run_dir, monkeypatch):
    model = run.accelerator.unwrap_model(run.model)
    keys = {"model": model, "config": CONFIG, "tokenizer_folder": run.tokenizer, "parents": [], "facts": {}}
    weights = model.state_dict()
    checkpoint.save_final(run_dir, weights=weights, **keys)
    before = files.sha256_file(run_dir / "final" / manifest.MANIFEST)

    def fail(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SaveFailed, match=r"final: was not saved \(.*No space left on device\)"):
        checkpoint.save_final(run_dir, weights=weights, **keys)
    assert files.sha256_file(run_dir / "final" / manifest.MANIFEST) == before
    assert manifest.problems_of(run_dir / "final") == []


# --- choosing -----------------------------------------------------------------------------------------------------


def test_steps_are_those_of_the_names_newest_first(run_dir):
    for name in ("step-1", "step-00000000x", ".tmp-step-000000009-1", "other"):
        (run_dir / run_folder.CHECKPOINTS / name).mkdir()
    assert run_folder.steps_saved(run_dir) == [7, 5, 3]
    assert run_folder.steps_saved(run_dir / "none") == []


def test_newest_checkpoint_is_taken(run_dir):
    assert newest(run_dir) == ("step-000000007", {})


def test_broken_checkpoints_are_named_skipped_and_lose_their_names(run_dir):
    """Otherwise they would count among the newest to keep, in the place of whole ones."""
    damage(run_dir, 7)
    (run_folder.checkpoint_path(run_dir, 5) / "manifest.json").unlink()
    found, rejected = newest(run_dir)
    assert found == "step-000000003"
    assert list(rejected) == ["step-000000007", "step-000000005"]
    assert any("optimizer.bin: has changed" in problem for problem in rejected["step-000000007"])
    aside = sorted(path.name for path in (run_dir / run_folder.CHECKPOINTS).iterdir() if not path.is_symlink())
    assert aside == ["damaged-step-000000005", "damaged-step-000000007", "step-000000003"]
    assert newest(run_dir) == ("step-000000003", {})


def test_a_second_damaged_one_of_the_same_step_replaces_the_first(run, run_dir):
    for _ in range(2):
        damage(run_dir, 7)
        assert newest(run_dir)[0] == "step-000000005"
        run.save(run_dir, STATE)
    assert names(run_dir) == [f"step-{step:09d}" for step in (3, 5, 7)]


def test_damaged_ones_below_the_newest_whole_stay(run_dir):
    damage(run_dir, 5)
    assert newest(run_dir) == ("step-000000007", {})
    assert names(run_dir) == [f"step-{step:09d}" for step in (3, 5, 7)]


def test_where_nothing_is_whole_nothing_is_taken_and_all_stay(run_dir):
    """Somebody may still restore one from a copy, or save what is left by hand."""
    for step in (3, 5, 7):
        damage(run_dir, step)
    found, rejected = newest(run_dir)
    assert found is None
    assert len(rejected) == 3
    assert names(run_dir) == [f"step-{step:09d}" for step in (3, 5, 7)]


# --- loading ------------------------------------------------------------------------------------------------------


def test_loading_brings_weights_optimizer_and_counters_back(run, run_dir, tiny):
    """Into a run with other weights and other moments; accelerate keeps one state a process, so `run` lends it."""
    folder = run_folder.checkpoint_path(run_dir, 7)
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    moments = [value["exp_avg"].clone() for value in run.optimizer.state_dict()["state"].values()]
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1.0)
        for value in run.optimizer.state.values():
            value["exp_avg"].add_(1.0)
    state, identity = checkpoint.stored_state(folder)
    checkpoint.load(run.accelerator, folder)
    assert (state, identity) == (STATE, {"seed": 0})
    assert all(torch.equal(value, weights[name]) for name, value in run.model.state_dict().items())
    found = [value["exp_avg"] for value in run.optimizer.state_dict()["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(found, moments, strict=True))
    assert run.accelerator.step == 0


def test_tied_head_stays_tied_after_loading(run, run_dir):
    checkpoint.load(run.accelerator, run_folder.checkpoint_path(run_dir, 7))
    model = run.accelerator.unwrap_model(run.model)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.security
@pytest.mark.parametrize("name", ["random_states_0.pkl", "custom_checkpoint_0.pkl"])
def test_pickle_is_refused_and_not_run(run, run_dir, tmp_path, name):
    import pickle

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = run_folder.checkpoint_path(run_dir, 7)
    (folder / name).write_bytes(pickle.dumps(Attack()))
    assert any("is not listed" in problem for problem in manifest.problems_of(folder))
    with pytest.raises(UserError, match=f"{name}: is a pickle"):
        checkpoint.load(run.accelerator, folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.security
def test_optimizer_file_cannot_run_code(run, run_dir, tmp_path):
    """torch.load with weights_only: a forged file is an error, whatever the manifest says."""

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = run_folder.checkpoint_path(run_dir, 7)
    torch.save({"state": Attack(), "param_groups": []}, folder / "optimizer.bin")
    with pytest.raises(UserError, match=r"optimizer\.bin\) holds more than numbers"):
        checkpoint.load(run.accelerator, folder)
    assert not (tmp_path / "ran").exists()


def test_copied_tokenizer_is_the_same(tiny, tmp_path):
    checkpoint.copy_tokenizer(tiny / "tokenizer", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert files.sha256_file(tmp_path / name) == files.sha256_file(tiny / "tokenizer" / name)
