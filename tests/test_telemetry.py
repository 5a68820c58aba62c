"""What the machine does is sampled beside the run, and ends with it."""

import datetime
import json
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import train_argv

from codex_accel import cli, telemetry
from codex_accel.train_schema import TrainConfig

KEYS = {"cpu_percent", "machine_cpu_percent", "rss_bytes", "machine_memory_bytes", "disk_free_bytes"}


@pytest.fixture
def sampling(tiny, tmp_path):
    """Samples into tmp_path every 10 ms or as told; `tracked` are the lines that the trackers would get."""
    tracked: list = []

    def start(every_s: float = 0.01, *, track=tracked.append, enabled: bool = True):
        argv = train_argv(tiny, tmp_path, f"log={{system_metrics: true, system_every_s: {every_s}}}")
        config = cli.parse(TrainConfig, argv, doc="", stage="train")
        return telemetry.sampling(config, tmp_path, track, step=lambda: 7, enabled=enabled)

    start.tracked = tracked
    return start


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "system.ndjson").read_text().splitlines()]


def sampling_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "system metrics"]


def test_there_is_a_line_at_the_start_and_at_the_end(sampling, tmp_path):
    with sampling(every_s=3600):
        assert sampling_threads()
    first, last = lines_of(tmp_path)
    assert first.keys() >= KEYS
    assert first["cpu_percent"] is None  # there is no sample before it
    assert last["cpu_percent"] >= 0.0
    assert (first["step"], last["step"]) == (7, 7)
    assert datetime.datetime.fromisoformat(first["time"]) <= datetime.datetime.fromisoformat(last["time"])


def test_trackers_get_each_line_as_split_system(sampling, tmp_path):
    with sampling():
        pass
    assert sampling.tracked == [{**line, "split": "system"} for line in lines_of(tmp_path)]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_thread_is_gone_after_an_error_which_comes_out(sampling, error):
    with pytest.raises(error), sampling(every_s=3600):
        raise error
    assert sampling_threads() == []


def test_trouble_inside_is_told_and_does_not_reach_the_run(sampling, tmp_path, capsys):
    def broken(line):
        raise OSError("no such driver")

    with sampling(track=broken):
        pass
    assert capsys.readouterr().out.count("warning: system metrics have stopped (OSError: no such driver)") == 1
    assert sampling_threads() == []
    assert len(lines_of(tmp_path)) == 1


def test_missing_nvml_is_said_once(sampling, capsys):
    """This machine has no GPU; where there is one, its figures are in the lines instead."""
    with sampling():
        pass
    gpus = any(key.startswith("gpu0_") for key in sampling.tracked[0])
    assert capsys.readouterr().out.count("note    system metrics without GPUs: ") == (0 if gpus else 1)


def test_nothing_is_sampled_where_it_is_not_wanted(sampling, tmp_path):
    with sampling(enabled=False):
        assert sampling_threads() == []
    assert not (tmp_path / "system.ndjson").exists()


def test_figures_are_of_the_process_and_its_children(tmp_path):
    """A child that holds 64 MB and works for half a second shows in both."""
    sampler = telemetry.Sampler(tmp_path)
    before, start_s = sampler.sample(), time.monotonic()
    work = "import time; data = b'x' * (1 << 26); t = time.process_time()\nwhile time.process_time() < t + 0.5: pass\n"
    child = subprocess.Popen([sys.executable, "-c", f"{work}print(len(data), flush=True); input()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert child.stdout.readline() == f"{1 << 26}\n"
    after, passed_s = sampler.sample(), time.monotonic() - start_s
    child.communicate("\n")
    assert after["rss_bytes"] - before["rss_bytes"] > 1 << 26
    assert 0.45 <= after["cpu_percent"] / 100 * passed_s <= passed_s * os.cpu_count() * 1.05
    assert 0 < after["machine_cpu_percent"] <= 100
    assert after["machine_memory_bytes"] == pytest.approx(psutil.virtual_memory().used, rel=0.5)


def test_a_sample_costs_less_than_a_hundredth_of_the_default_interval(tmp_path):
    sampler = telemetry.Sampler(tmp_path)
    sampler.sample()
    before = psutil.Process().cpu_times()
    for _ in range(20):
        sampler.sample()
    after = psutil.Process().cpu_times()
    seconds = (after.user + after.system - before.user - before.system) / 20
    assert seconds < 0.01 * TrainConfig.model_fields["log"].default.system_every_s


def test_resumed_run_appends(fork_server, tiny, tmp_path):
    argv = train_argv(tiny, tmp_path / "run", "training.max_steps=6", "log={system_metrics: true}")
    assert fork_server.run("train", [*argv, "training.stop_at_step=3"]).codes == [75]
    stopped = lines_of(tmp_path / "run")
    job = fork_server.run("train", argv)
    assert job.codes == [0], job.output
    both = lines_of(tmp_path / "run")
    assert both[: len(stopped)] == stopped
    assert [stopped[0]["step"], stopped[-1]["step"], both[-1]["step"]] == [0, 3, 6]
