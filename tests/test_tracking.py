"""Each tracker holds what metrics.ndjson holds, as its own reader reads it, and the network stays shut."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script, train_argv

from codex_accel import cli, tracking
from codex_accel.errors import UserError
from codex_accel.events import LineLog
from codex_accel.train_schema import TrainConfig

Values = dict[tuple[str, int], list[float]]
STRAY = {"WANDB_PROJECT": "stray", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_EXPERIMENT_NAME": "stray"}


def of_ndjson(run_dir: Path) -> Values:
    """{("train/loss", step): [value]} of metrics.ndjson."""
    found: Values = {}
    for text in (run_dir / "metrics.ndjson").read_text().splitlines():
        line = json.loads(text)
        for name in line.keys() - {"step", "split"}:
            if line[name] is not None:
                found.setdefault((f"{line['split']}/{name}", line["step"]), []).append(line[name])
    return found


def of_tensorboard(run_dir: Path) -> Values:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [file] = (run_dir / "tensorboard").iterdir()
    reader = EventAccumulator(str(file), size_guidance={"scalars": 0})
    reader.Reload()
    found: Values = {}
    for tag in reader.Tags()["scalars"]:
        for event in reader.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    return found


def as_float32(values: Values) -> Values:
    """What TensorBoard's format holds of numbers."""
    return {key: [float(np.float32(value)) for value in several] for key, several in values.items()}


def records_of_wandb(run_dir: Path, home: Path) -> list[dict]:
    [folder] = (run_dir / "wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    environment = os.environ | {"HOME": str(home), "WANDB_ERROR_REPORTING": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_wandb(run_dir: Path, home: Path) -> Values:
    found: Values = {}
    for record in records_of_wandb(run_dir, home):
        if record["type"] == "history":
            for name, value in record["history"]["item"].items():
                if not name.startswith("_"):
                    found.setdefault((name, record["history"]["item"]["_step"]), []).append(float(value))
    return found


def mlflow_client(store: Path):
    os.environ |= {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store.as_uri())


def mlflow_runs(run_dir: Path, store: str = "mlflow") -> list:
    client = mlflow_client(run_dir / store)
    experiments = [e.experiment_id for e in client.search_experiments(filter_string="name = 'codex-accel'")]
    return client.search_runs(experiments)


def of_mlflow(run_dir: Path) -> Values:
    [run] = mlflow_runs(run_dir)
    found: Values = {}
    for name in run.data.metrics:
        for metric in mlflow_client(run_dir / "mlflow").get_metric_history(run.info.run_id, name):
            found.setdefault((name, metric.step), []).append(metric.value)
    return found


def without_system(values: Values) -> Values:
    return {key: value for key, value in values.items() if not key[0].startswith("system/")}


@pytest.fixture(scope="module")
def tracked(tiny, fork_server, tmp_path_factory) -> Path:
    """A run with every tracker, killed between two checkpoints and finished; beside it what it had for a home."""
    root = tmp_path_factory.mktemp("tracked")
    for name in ("home", "cwd"):
        (root / name).mkdir()
    argv = train_argv(
        tiny,
        root / "run",
        "training.max_steps=12",
        "checkpoint.every_steps=4",
        "log={every_steps: 1, system_metrics: true, system_every_s: 0.05}",
        "tracking.log_with=[tensorboard, wandb, mlflow]",
    )
    environment = {"HOME": str(root / "home"), **STRAY}
    job = fork_server.start("train", argv, cwd=root / "cwd", environment=environment)
    metrics = root / "run" / "metrics.ndjson"
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 7:  # six steps and an evaluation
        assert job.alive(), job.output
        assert time.monotonic() < deadline, job.output
        time.sleep(0.002)
    job.kill()
    assert job.wait() == [-9]
    (root / "before.json").write_text((root / "run" / "tracking.json").read_text())
    job = fork_server.run("train", argv, cwd=root / "cwd", environment=environment)
    assert job.codes == [0], job.output
    assert "resume" in job.output
    (root / "output.txt").write_text(job.output)
    return root


def test_tensorboard_holds_what_metrics_ndjson_holds(tracked):
    assert without_system(of_tensorboard(tracked / "run")) == as_float32(of_ndjson(tracked / "run"))


def test_wandb_holds_what_metrics_ndjson_holds(tracked):
    values = of_wandb(tracked / "run", tracked / "home")
    assert without_system(values) == of_ndjson(tracked / "run")
    assert ("system/rss_bytes", 12) in values


def test_mlflow_holds_what_metrics_ndjson_holds(tracked):
    assert without_system(of_mlflow(tracked / "run")) == of_ndjson(tracked / "run")


def test_resumed_run_is_the_same_run_of_each_tracker(tracked):
    ids = json.loads((tracked / "before.json").read_text())
    assert json.loads((tracked / "run" / "tracking.json").read_text()) == ids
    [run] = mlflow_runs(tracked / "run")
    assert (run.info.run_id, run.info.status) == (ids["mlflow"], "FINISHED")
    [folder] = (tracked / "run" / "wandb").glob("offline-run-*")
    assert folder.name.endswith(ids["wandb"])


def test_configuration_and_identity_are_hyperparameters(tracked):
    [run] = mlflow_runs(tracked / "run")
    assert run.data.params["training.max_steps"] == "12"
    assert json.loads(run.data.params["model.config"])["model_type"] == "gpt2"
    parents = json.loads((tracked / "run" / "run.json").read_text())["parents"]
    assert run.data.params["run.parent.dataset"] == parents[0]["manifest_digest"]
    config = [r["config"]["update"] for r in records_of_wandb(tracked / "run", tracked / "home") if "config" in r]
    assert any(update.get("optimizer.learning_rate") == 3e-3 for update in config)


def test_nothing_is_written_outside_of_the_run_folder(tracked):
    assert list((tracked / "home").iterdir()) == []
    assert list((tracked / "cwd").iterdir()) == []


def test_environment_does_not_steer_trackers_and_this_is_said(tracked):
    names = "MLFLOW_EXPERIMENT_NAME, MLFLOW_TRACKING_URI, WANDB_PROJECT"
    assert f"tracking ignores {names} of the environment" in (tracked / "output.txt").read_text()


@pytest.mark.parametrize(("name", "package"), tracking.PACKAGES.items())
def test_missing_package_is_an_error_with_the_pip_command(tiny, tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, name, None)  # Python's own way to hide a module
    argv = train_argv(tiny, tmp_path / "run", f"tracking.log_with=[{name}]")
    with pytest.raises(UserError, match=rf"tracking.log_with: {name} is not installed. Run `pip install {package}`"):
        run_script("train", *argv)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ("{log_with: [mlflow], mlflow_uri: 'https://mlflow.example.org'}", "tracking.mlflow_uri"),
        ("{log_with: [mlflow], mlflow_uri: databricks}", "tracking.mlflow_uri"),
        ("{log_with: [mlflow], mlflow_uri: 'postgresql://db/mlflow'}", "tracking.mlflow_uri"),
        ("{log_with: [mlflow], mlflow_uri: 'file://other.example.org/runs'}", "tracking.mlflow_uri"),
        ("{log_with: [wandb], wandb_mode: online}", "tracking.wandb_mode"),
    ],
)
def test_network_is_refused_without_allow_network(tiny, tmp_path, settings, key):
    with pytest.raises(UserError, match=rf"{key}: .*allow_network is false"):
        run_script("train", *train_argv(tiny, tmp_path / "run", f"tracking={settings}"))


@pytest.mark.parametrize("uri", ["mlruns", "/data/mlruns", "file:/data/mlruns", "file:///data", "sqlite:///a.db"])
def test_folders_and_sqlite_files_are_local(uri):
    assert tracking.is_local(uri)


def test_online_wandb_needs_a_key_before_it_asks_for_one(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    argv = train_argv(tiny, tmp_path / "run", "allow_network=true", "tracking={log_with: [wandb], wandb_mode: online}")
    with pytest.raises(UserError, match="WANDB_API_KEY is not set"):
        run_script("train", *argv)


@pytest.fixture
def open_run(tiny, chain, tmp_path):
    """Starts the trackers of a run in tmp_path, in this process; the environment is put back afterwards."""
    from accelerate import Accelerator

    before = dict(os.environ)
    shutil.copy(chain / "run" / "run.json", tmp_path)
    (tmp_path / "metrics.ndjson").touch()
    events = LineLog(tmp_path / "events.ndjson")

    def start(*overrides: str, step: int = 0):
        config = cli.parse(TrainConfig, train_argv(tiny, tmp_path, *overrides), doc="", stage="train")
        tracking.require(config)
        return tracking.started(config, Accelerator(cpu=True), tmp_path, events, step=step)

    yield start
    os.environ.clear()
    os.environ.update(before)


def test_tracker_that_breaks_is_told_once_and_the_run_goes_on(open_run, tmp_path, capsys):
    with open_run("tracking.log_with=[mlflow, tensorboard]") as track:
        shutil.rmtree(tmp_path / "mlflow")
        for step in range(1, 4):
            track({"step": step, "split": "train", "loss": 0.5**step})
    assert of_tensorboard(tmp_path) == {("train/loss", step): [0.5**step] for step in range(1, 4)}
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "events.ndjson").read_text().splitlines()]
    assert kinds == ["failed tracking", "lost tracking"]
    printed = capsys.readouterr().out
    assert printed.count("warning: mlflow") == 2
    assert "mlflow lacks 3 lines that metrics.ndjson has" in printed


def test_tracker_that_does_not_start_stops_a_fresh_run(open_run, tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    with (
        pytest.raises(UserError, match=r"tracking\.log_with: tensorboard does not start"),
        open_run("tracking.log_with=[tensorboard, mlflow]"),
    ):
        raise AssertionError("started")
    [run] = mlflow_runs(tmp_path)
    assert run.info.status == "KILLED"


def test_run_that_goes_on_does_so_without_a_tracker_that_does_not_start(open_run, tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")
    (tmp_path / "system.ndjson").write_bytes(b"\0\0\n{half")  # as a power cut can leave it
    with open_run("tracking.log_with=[tensorboard]", step=2) as track:
        track({"step": 3, "split": "train", "loss": 1.0})
    assert "warning: tensorboard lacks 1 lines that metrics.ndjson has" in capsys.readouterr().out


def test_run_that_is_stopped_is_not_marked_as_finished(open_run, tmp_path):
    with pytest.raises(KeyError), open_run("tracking.log_with=[mlflow]"):
        raise KeyError
    [run] = mlflow_runs(tmp_path)
    assert run.info.status == "KILLED"


def test_values_that_are_no_numbers_come_through(open_run, tmp_path):
    with open_run("tracking.log_with=[tensorboard, mlflow]") as track:
        track({"step": 1, "split": "train", "loss": math.nan, "grad_norm": math.inf, "bits_per_byte": None})
    for values in (of_tensorboard(tmp_path), of_mlflow(tmp_path)):
        assert values.keys() == {("train/loss", 1), ("train/grad_norm", 1)}
        assert math.isnan(values["train/loss", 1][0])
        assert values["train/grad_norm", 1] == [math.inf]


def test_store_that_is_shared_keeps_the_run_and_its_last_value_wins(open_run, tmp_path):
    settings = f"tracking={{log_with: [mlflow], mlflow_uri: {tmp_path}/shared}}"
    with open_run(settings) as track:
        for step in (1, 2, 3):
            track({"step": step, "split": "train", "loss": 1.0})
    with open_run(settings, step=2) as track:
        track({"step": 3, "split": "train", "loss": 0.5})
    [run] = mlflow_runs(tmp_path, "shared")
    assert run.data.metrics == {"train/loss": 0.5}


def test_sample_that_comes_late_is_not_lost(open_run, tmp_path):
    """Another thread samples the machine: its line can follow that of a later step, which wandb would throw away."""
    (tmp_path / "home").mkdir()
    with open_run("tracking.log_with=[wandb]") as track:
        track({"step": 2, "split": "train", "loss": 1.0})
        track({"step": 1, "split": "system", "time": "2026-11-22T16:00:00+00:00", "cpu_percent": 90.0})
    assert of_wandb(tmp_path, tmp_path / "home") == {("train/loss", 2): [1.0], ("system/cpu_percent", 2): [90.0]}


@pytest.mark.distributed
def test_only_the_main_process_tracks(tiny, fork_server, tmp_path):
    argv = train_argv(tiny, tmp_path / "run", "training.max_steps=3", "tracking.log_with=[tensorboard]")
    job = fork_server.run("train", argv, num_processes=2)
    assert job.codes == [0, 0], job.output
    assert of_tensorboard(tmp_path / "run") == as_float32(of_ndjson(tmp_path / "run"))
