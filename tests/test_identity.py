"""A run goes on only as the run that it was; each difference is told, and only what is named may differ."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import metrics_of, run_script, train_argv
from test_run import GPT2, config, identity_of, parents_of

from codex_accel import config as configuration
from codex_accel import files, identity, manifest, run_folder
from codex_accel.checkpoint import TRAINER_STATE
from codex_accel.errors import UserError
from codex_accel.train_schema import Model, Optimizer, Schedule, TrainConfig

# --- what belongs to it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"block_size": 8}, "data.block_size"),
        ({"max_steps": 11}, "training.max_steps"),
        ({"micro_batch_size": 4}, "training.micro_batch_size"),
        ({"global_batch_size": 16}, "training.global_batch_size"),
        ({"max_grad_norm": None}, "training.max_grad_norm"),
        ({"on_nonfinite": "skip"}, "training.on_nonfinite"),
        ({"optimizer": Optimizer(weight_decay=0.2)}, "optimizer.weight_decay"),
        ({"schedule": Schedule(warmup=5)}, "schedule.warmup"),
        ({"model": {**GPT2, "resid_pdrop": 0.2}}, "model.architecture.resid_pdrop"),
        ({"model": {**GPT2, "n_layer": 2}}, "model.architecture.n_layer"),
        ({"attention": "eager"}, "model.attention"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_change_that_matters_is_a_difference(tiny, change, key):
    before, now = identity_of(tiny, config()), identity_of(tiny, config(**change))
    assert [name for name, _, _ in identity.differences(before, now, allowed=[])] == [key]
    assert identity.differences(before, now, allowed=[key]) == []


def test_precision_from_the_environment_is_a_difference(tiny):
    before, now = identity_of(tiny, config()), identity_of(tiny, config(), mixed_precision="bf16")
    assert identity.differences(before, now, allowed=[]) == [("mixed_precision", "no", "bf16")]


def test_paths_logging_and_saving_may_change(tiny):
    settings = config()
    changed = {"output_dir": "elsewhere", "dry_run": True, "resume": "never"}
    changed["log"] = settings.log.model_copy(update={"every_steps": 3})
    changed["checkpoint"] = settings.checkpoint.model_copy(update={"keep_last": 7})
    changed["data"] = settings.data.model_copy(update={"dataset": "moved", "validation_split": None})
    changed["training"] = settings.training.model_copy(update={"max_time_s": 1.0, "stop_at_step": 3})
    assert identity_of(tiny, settings.model_copy(update=changed)) == identity_of(tiny, settings)


def test_an_identity_is_plain_json_and_holds_digests_and_major_versions(tiny):
    found = identity_of(tiny, config())
    assert json.loads(json.dumps(found)) == found
    assert found["dataset"] == manifest.read(tiny / "dataset")["content_digest"]
    assert found["tokenizer"] == manifest.read(tiny / "tokenizer")["content_digest"]
    assert set(found["libraries"]) == {"torch", "transformers", "accelerate"}
    assert all(version.isdigit() for version in found["libraries"].values())


def test_the_model_started_from_is_part_of_it(tiny, shared):
    settings = config().model_copy(update={"model": Model(path=str(shared / "models" / "stories260K"))})
    assert [parent["kind"] for parent in parents_of(tiny, settings)] == ["dataset", "tokenizer", "unverified"]
    fresh, started = identity_of(tiny, config()), identity_of(tiny, config(), parents=parents_of(tiny, settings))
    assert identity.differences(fresh, started, allowed=[]) == [
        ("model.start", [], [parents_of(tiny, settings)[2]["content_digest"]])
    ]


def test_the_path_that_a_model_was_loaded_from_is_not(tiny, shared):
    """transformers keeps it in the configuration as `_name_or_path`."""
    folders = [shared / "models" / "stories260K", shared / "models" / ".." / "models" / "stories260K"]
    started = [config().model_copy(update={"model": Model(path=str(folder))}) for folder in folders]
    assert identity_of(tiny, started[0]) == identity_of(tiny, started[1])


# --- differences --------------------------------------------------------------------------------------------------

BEFORE = {"seed": 0, "data": {"block_size": 32, "split": "train"}, "model": {"path": None, "sizes": [1, 2]}}
CHANGED = {"seed": 1, "data": {"block_size": 64, "split": "train"}, "model": {"path": "m", "sizes": [1, 3]}}


def differences(now: dict, *allowed: str) -> list[tuple]:
    return identity.differences(BEFORE, now, allowed=list(allowed))


def test_equal_identities_have_no_differences():
    assert differences(json.loads(json.dumps(BEFORE))) == []
    identity.require_same(Path("step-1"), BEFORE, BEFORE, allowed=[])


def test_differences_are_told_with_key_before_and_now():
    assert differences(CHANGED) == [
        ("data.block_size", 32, 64),
        ("model.path", None, "m"),
        ("model.sizes", [1, 2], [1, 3]),
        ("seed", 0, 1),
    ]


def test_key_that_came_or_went_is_a_difference():
    assert differences({**BEFORE, "new": 1}) == [("new", None, 1)]
    assert differences({"seed": 0, "data": BEFORE["data"], "model": 5}) == [("model", BEFORE["model"], 5)]
    assert differences({"seed": 0, "data": BEFORE["data"]}) == [("model", BEFORE["model"], None)]


def test_allowed_keys_and_what_lies_below_them_may_differ():
    now = {"seed": 1, "data": {"block_size": 64, "split": "other"}, "model": BEFORE["model"]}
    assert differences(now, "data", "seed") == []
    assert differences(now, "data.block_size", "seed") == [("data.split", "train", "other")]
    assert differences(now, "dat", "see") == differences(now)


# --- the table ----------------------------------------------------------------------------------------------------


def rows(text: str) -> dict[str, tuple[str, str]]:
    """{key: (then, now)} of a table of differences, which must stand in aligned columns."""
    lines = [line.removeprefix("error: ") for line in text.splitlines()]
    lines = [line for line in lines if line.startswith("  ") and "   " in line.strip()]
    header, *body = lines
    then, now = header.index("then"), header.index("now")
    for line in lines:
        assert line[then - 3 : then] == line[now - 3 : now] == "   ", f"not aligned: {line!r}"
    assert header[2:].split() == ["key", "then", "now"]
    return {line[2:then].strip(): (line[then:now].strip(), line[now:].strip()) for line in body}


def test_all_differences_stand_in_one_table():
    with pytest.raises(UserError) as caught:
        identity.require_same(Path("run/step-1"), BEFORE, CHANGED, allowed=["data"])
    assert caught.value.problems == [
        "run/step-1: was made with other settings, so going on from it would not be the same run.",
        "  key           then     now",
        "  model.path    null     m",
        "  model.sizes   [1, 2]   [1, 3]",
        "  seed          0        1",
        "Put them back, name each in allow_drift, or choose another output_dir.",
    ]
    found = rows(str(caught.value))
    assert found == {"model.path": ("null", "m"), "model.sizes": ("[1, 2]", "[1, 3]"), "seed": ("0", "1")}


def test_long_values_are_shortened_and_digests_are_not():
    digest, other = "a" * 64, "b" * 64
    with pytest.raises(UserError) as caught:
        identity.require_same(Path("run"), {"a": digest, "b": [0] * 99}, {"a": other, "b": [1] * 99}, allowed=[])
    found = rows(str(caught.value))
    assert found["a"] == (digest, other)
    assert all(len(value) == 64 and value.endswith("...") for value in found["b"])


# --- names in allow_drift -----------------------------------------------------------------------------------------


def allowing(*names: str) -> TrainConfig:
    return config().model_copy(update={"allow_drift": list(names)})


def test_every_key_that_a_table_can_show_may_be_named(tiny):
    """Down to the keys of the model's configuration: the table tells the user to name what it shows."""
    found = identity_of(tiny, config())
    shown = [key for key, _, _ in identity.differences(found, emptied(found), allowed=[])]
    assert {"seed", "dataset", "optimizer.betas", "libraries.torch", "model.architecture.n_layer"} <= set(shown)
    identity.require_known_drift(allowing(*shown, "model", "model.architecture", "training"), found)
    assert identity.differences(found, emptied(found), allowed=shown) == []


def emptied(value: dict) -> dict:
    """An identity that differs in every leaf."""
    return {key: emptied(below) if isinstance(below, dict) and below else "other" for key, below in value.items()}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("training.max_step", "Did you mean 'training.max_steps'?"),
        ("tokeniser", "Did you mean 'tokenizer'?"),
        ("model.architecture.n_layers", "Did you mean 'model.architecture.n_layer'?"),
        ("xyz", "Choose from: seed, optimizer, optimizer.name, "),
    ],
)
def test_unknown_name_is_refused_with_a_suggestion(tiny, name, hint):
    with pytest.raises(UserError) as caught:
        identity.require_known_drift(allowing("seed", name), identity_of(tiny, config()))
    [problem] = caught.value.problems
    assert f"allow_drift: '{name}': no such key. {hint}" in problem
    assert len(problem) < 1500


# --- real runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(fork_server, tiny, tmp_path_factory) -> Path:
    """A folder with a run that has stopped at step 2 of 3, another split of its data, and another tokenizer's data."""
    root = tmp_path_factory.mktemp("drift")
    source = f"sources=[{{path: {tiny}/corpus/modules.jsonl}}]"
    for name, tokenizer, seed in (("resplit", tiny / "tokenizer", 1), ("retokenized", root / "tokenizer", 0)):
        if name == "retokenized":
            argv = [f"output_dir={tokenizer}", source, "vocab_size=512", "min_frequency=9", "pre_tokenizer=whitespace"]
            run_script("train_tokenizer", *argv)
        split = f"split={{method: exact, seed: {seed}, ratios: {{train: 0.8, validation: 0.1, test: 0.1}}}}"
        run_script("prepare_data", f"output_dir={root}/{name}", f"tokenizer={tokenizer}", source, split)
    argv = train_argv(tiny, root / "run", *SHORT, "training.stop_at_step=2")
    assert fork_server.run("train", argv).codes == [75]
    return root


SHORT = ("training.max_steps=3", "evaluation={every_steps: null, max_windows: 4}")


def start(fork_server, tiny: Path, run_dir: Path, *overrides: str) -> tuple[int, str]:
    job = fork_server.run("train", train_argv(tiny, run_dir, *SHORT, *overrides))
    return job.codes[0], job.output


def copy(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the run, beside which its parents lie as the original's do."""
    return Path(shutil.copytree(stopped / "run", tmp_path / "run", symlinks=True))


DRIFTS = {
    "dataset": ({"dataset"}, ["data.dataset={root}/resplit"]),
    "tokenizer": ({"dataset", "tokenizer"}, ["data.dataset={root}/retokenized"]),
    "batch": ({"training.micro_batch_size"}, ["training.micro_batch_size=4"]),
    "schedule": ({"schedule.warmup", "training.max_steps"}, ["schedule.warmup=2", "training.max_steps=4"]),
}


@pytest.mark.parametrize("kind", DRIFTS)
def test_drift_is_refused_in_a_table_and_goes_on_when_named(fork_server, tiny, stopped, tmp_path, kind):
    keys, overrides = DRIFTS[kind]
    run_dir, overrides = copy(stopped, tmp_path), [text.format(root=stopped) for text in overrides]
    code, output = start(fork_server, tiny, run_dir, *overrides)
    assert (code, set(rows(output))) == (2, keys), output
    assert run_folder.steps_saved(run_dir) == [2]
    code, output = start(fork_server, tiny, run_dir, *overrides, f"allow_drift=[{', '.join(keys)}]")
    assert code == 0, output
    assert "step-000000002, step 2" in output
    steps = [line["step"] for line in metrics_of(run_dir) if line["split"] == "train"]
    assert steps == list(range(1, 5 if kind == "schedule" else 4))


def test_a_setting_of_the_optimizer_that_is_let_drift_has_its_effect(fork_server, tiny, stopped, tmp_path):
    """torch's load_state_dict brings back the settings of the parameter groups along with the moments."""
    digests = []
    for number, override in enumerate(("optimizer.weight_decay=0.1", "optimizer.weight_decay=9.0")):
        run_dir = copy(stopped, tmp_path / str(number))
        code, output = start(fork_server, tiny, run_dir, override, "allow_drift=[optimizer.weight_decay]")
        assert code == 0, output
        digests.append(files.sha256_file(run_dir / "final" / "model.safetensors"))
    assert digests[0] != digests[1]


def test_all_drift_stands_in_one_table_and_a_part_of_it_named_is_not_enough(fork_server, tiny, stopped, tmp_path):
    """The model's shape too, which no name can bring to fit; and nothing is changed in the folder."""
    run_dir = copy(stopped, tmp_path)
    before = files.sha256_file(run_dir / "checkpoints" / "step-000000002" / "manifest.json")
    overrides = [f"data.dataset={stopped}/retokenized", "model.config.n_layer=1", "training.global_batch_size=16"]
    overrides += ["schedule.name=linear", "optimizer.learning_rate=1e-3", "seed=1"]
    code, output = start(fork_server, tiny, run_dir, *overrides, "allow_drift=[seed]")
    keys = {"dataset", "tokenizer", "training.global_batch_size", "schedule.name", "optimizer.learning_rate"}
    assert (code, set(rows(output))) == (2, keys | {"model.architecture.n_layer"}), output
    assert rows(output)["model.architecture.n_layer"] == ("2", "1")
    code, output = start(fork_server, tiny, run_dir, "model.config.n_layer=1", "allow_drift=[model]")
    assert code == 2
    assert re.search(r"step-000000002.*: does not fit this model", output), output
    assert files.sha256_file(run_dir / "checkpoints" / "step-000000002" / "manifest.json") == before


def test_a_checkpoint_of_another_major_version_is_refused_unless_named(fork_server, tiny, stopped, tmp_path):
    """As if torch 1 had written it: its identity is edited, and the checkpoint sealed anew."""
    run_dir = copy(stopped, tmp_path)
    folder = run_folder.checkpoint_path(run_dir, 2)
    state = json.loads((folder / TRAINER_STATE).read_text())
    state["identity"]["libraries"]["torch"] = "1"
    (folder / TRAINER_STATE).write_text(json.dumps(state))
    facts = manifest.read(folder)["facts"]
    for name in (manifest.MANIFEST, manifest.SUMS):
        (folder / name).unlink()
    payload, settings = files.list_files(folder), configuration.load(TrainConfig, path=folder / manifest.CONFIG)
    manifest.seal(folder, kind="checkpoint", final=folder, payload=payload, config=settings, facts=facts)
    code, output = start(fork_server, tiny, run_dir)
    assert (code, rows(output)) == (2, {"libraries.torch": ("1", "2")}), output
    assert start(fork_server, tiny, run_dir, "allow_drift=[libraries.torch]")[0] == 0


def test_a_name_that_is_no_key_stops_the_run_before_it_starts(fork_server, tiny, tmp_path):
    code, output = start(fork_server, tiny, tmp_path / "run", "allow_drift=[training.max_step]")
    assert code == 2
    assert "allow_drift: 'training.max_step': no such key. Did you mean 'training.max_steps'?" in output
    assert not run_folder.steps_saved(tmp_path / "run")
