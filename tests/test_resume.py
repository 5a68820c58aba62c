"""A killed run, started again, ends as if it had never been killed.

SIGKILL strikes the real `scripts/train.py` at random moments, and some of the time in a phase that it is aimed at. What
counts is a hit between the first and the last step: not one during a start, and not one after the end.

There are no DataLoader workers whose prefetched batches a kill could lose: a batch is a slice of a memory map, computed
from the step, so `num_workers` does not apply.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, ForkServer, metrics_of, train_argv
from transformers import AutoModelForCausalLM

from codex_accel import files, run_folder

AIMS_S = {"save": 0.02, "prune": 0.001, "evaluate": 0.04, "accumulation": 0.01}  # phases, less than they last
SOAK = ("evaluation.every_steps=6", "checkpoint={every_steps: 3, keep_last: 1, keep_best: 2}")


def outcome(run_dir: Path) -> tuple[str, list[dict]]:
    """Digest of the final weights, and all metrics."""
    return files.sha256_file(run_dir / "final" / "model.safetensors"), metrics_of(run_dir)


def last_step(run_dir: Path) -> int:
    """Last step with a whole line in metrics.ndjson, 0 if there is none."""
    path = run_dir / run_folder.METRICS
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def phase_of(path: Path) -> str:
    """What the first process was doing last."""
    first = path.with_name(f"{path.name}-0")
    return (first.exists() and first.read_text().strip()) or "start"


def wait_until(condition: Callable[[], bool], job) -> None:
    """Return when `condition` holds or a process of the job has ended."""
    while job.alive() and not condition():
        time.sleep(0.0003)


def kill_all(job, draws: random.Random) -> None:
    """SIGKILL to every process: in any order, sometimes the second a moment after the first, as launchers do it."""
    for pid in draws.sample(job.pids, len(job.pids)):
        os.kill(pid, signal.SIGKILL)
        time.sleep(draws.choice([0.0, draws.uniform(0.0, 0.02)]))


def kill_once(
    fork_server: ForkServer,
    argv: list[str],
    run_dir: Path,
    *,
    num_processes: int,
    aim: str | None,
    draws: random.Random,
) -> tuple[int, str] | None:
    """Start the run and kill it after some random steps, in the phase `aim` if given; (last logged step, phase).

    Steps and not seconds, so that the kills lie alike on a slow machine. None if the run has ended before.
    """
    phase = run_dir.with_name("phase")
    for rank in range(num_processes):
        phase.with_name(f"phase-{rank}").unlink(missing_ok=True)
    job = fork_server.start("train", argv, num_processes=num_processes, phase=phase)
    wait_until(lambda: phase_of(phase) != "start", job)
    goal = last_step(run_dir) + draws.randint(0, 6)
    wait_until(lambda: last_step(run_dir) >= goal, job)
    if aim:
        wait_until(lambda: phase_of(phase) == aim, job)
    time.sleep(draws.uniform(0.0, AIMS_S.get(aim, 0.05)))
    kill_all(job, draws)
    codes = job.wait()
    assert set(codes) <= ({0, -9} if num_processes == 1 else {0, -9, 1}), job.output  # 1: has lost the other process
    return (last_step(run_dir), phase_of(phase)) if -9 in codes else None


def hits_of(
    fork_server: ForkServer,
    argv_of: Callable[[Path], list[str]],
    root: Path,
    *,
    num_processes: int,
    num_kills: int,
    at_least: int,
) -> list[tuple[int, str]]:
    """Kill runs until `num_kills` hits count, and `at_least` in each phase of AIMS_S; all runs must end alike.

    Returns (last logged step, phase) of each counted hit.
    """
    unbroken = fork_server.run("train", argv_of(root / "unbroken"), num_processes=num_processes)
    assert unbroken.codes == [0] * num_processes, unbroken.output
    expected, stay = outcome(root / "unbroken"), run_folder.steps_saved(root / "unbroken")
    num_steps = last_step(root / "unbroken")
    draws, hits, chain = random.Random(num_processes), [], 0

    def phases_short() -> list[str]:
        found = Counter(where for _, where in hits)
        return [phase for phase in AIMS_S if found[phase] < at_least]

    while len(hits) < num_kills or phases_short():
        chain += 1
        run_dir = root / f"killed-{chain}"
        while not (run_dir / "final").exists() and (len(hits) < num_kills or phases_short()):
            short = phases_short()
            options = {"num_processes": num_processes, "aim": draws.choice(short) if short else None, "draws": draws}
            hit = kill_once(fork_server, argv_of(run_dir), run_dir, **options)
            if hit and 1 <= hit[0] < num_steps and hit[1] != "start":
                hits.append(hit)
        if not (run_dir / "final").exists():
            job = fork_server.run("train", argv_of(run_dir), num_processes=num_processes)
            assert job.codes == [0] * num_processes, job.output
        assert outcome(run_dir) == expected, f"differs after hits {hits}"
        assert run_folder.steps_saved(run_dir) == stay
        assert not [p.name for p in (run_dir / "checkpoints").iterdir() if p.name.startswith(".")]
    return hits


def tell(capsys, num_processes: int, hits: list[tuple[int, str]]) -> None:
    """The figures: every counted hit belongs to a run that was found equal."""
    phases, steps = dict(Counter(where for _, where in hits)), sorted(step for step, _ in hits)
    with capsys.disabled():
        print(
            f"\n{num_processes} process(es): {len(hits)}/{len(hits)} equal, steps {steps[0]}-{steps[-1]}, in {phases}"
        )


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_kills_end_in_the_same_weights_and_metrics(fork_server, tiny, tmp_path, num_processes):
    num_kills = 10 // num_processes  # two processes take longer, and the long form has 200 of each
    hits = hits_of(
        fork_server,
        lambda run_dir: train_argv(tiny, run_dir, *SOAK),
        tmp_path,
        num_processes=num_processes,
        num_kills=num_kills,
        at_least=1,
    )
    assert len(hits) >= num_kills


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_two_hundred_kills_end_in_the_same_weights_and_metrics(fork_server, tiny, tmp_path, num_processes, capsys):
    hits = hits_of(
        fork_server,
        lambda run_dir: train_argv(tiny, run_dir, *SOAK),
        tmp_path,
        num_processes=num_processes,
        num_kills=200,
        at_least=5,
    )
    assert len(hits) >= 200
    tell(capsys, num_processes, hits)


FAMILIES = {
    "gpt2 in bf16": ["training.mixed_precision=bf16"],
    "llama, tied": [
        "model.config={model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
        "num_attention_heads: 2, num_key_value_heads: 1, tie_word_embeddings: true, attention_dropout: 0.1}"
    ],
    "qwen3": [
        "model.config={model_type: qwen3, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, head_dim: 16, "
        "num_attention_heads: 2, num_key_value_heads: 1, tie_word_embeddings: false, attention_dropout: 0.1}"
    ],
    "mistral, sliding": [
        "model.config={model_type: mistral, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
        "num_attention_heads: 2, num_key_value_heads: 1, sliding_window: 8, attention_dropout: 0.1}"
    ],
}


def family_argv(tiny: Path, run_dir: Path, overrides: list[str]) -> list[str]:
    argv = train_argv(tiny, run_dir, *SOAK, "training.max_steps=12", *overrides)
    config = [argument for argument in argv if argument.startswith("model.config=")][-1]
    return [config, *(argument for argument in argv if not argument.startswith("model.config="))]


def logits_of(folder: Path) -> tuple[AutoModelForCausalLM, torch.Tensor]:
    """The model in a folder as transformers alone loads it, and its logits of 24 tokens (1, 24, V)."""
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        return model, model(torch.arange(24)[None] + 5).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_kills_end_alike_in_other_families_and_precision(fork_server, tiny, tmp_path, family):
    """GPT-2 in float32 is what the other tests run."""
    num_kills = 2
    hits = hits_of(
        fork_server,
        lambda run_dir: family_argv(tiny, run_dir, FAMILIES[family]),
        tmp_path,
        num_processes=1,
        num_kills=num_kills,
        at_least=0,
    )
    assert len(hits) >= num_kills
    facts = json.loads((tmp_path / "killed-1" / "run.json").read_text())
    assert facts["mixed_precision"] == ("bf16" if "bf16" in family else "no")
    final, final_logits = logits_of(tmp_path / "killed-1" / "final")
    saved, saved_logits = logits_of(run_folder.checkpoint_path(tmp_path / "killed-1", 12))
    assert torch.equal(final_logits, saved_logits)
    tied = "gpt2" in family or "tied" in family
    for model in (final, saved):
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
        assert getattr(model.config, "sliding_window", None) == (8 if "sliding" in family else None)


# --- true processes -------------------------------------------------------------------------------------------------


def true_process(argv: list[str], log: Path) -> subprocess.Popen:
    """What a user types, with one thread, as the fork server has it."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, "scripts/train.py", *argv], cwd=ROOT, stdout=stream, stderr=stream, env=os.environ.copy()
        )


def kill_true_processes(fork_server: ForkServer, tiny: Path, root: Path, *, kill_after_steps: list[int]) -> None:
    """Kill a true process once it has logged each of these steps and a random moment more; the end must be equal."""
    assert fork_server.run("train", train_argv(tiny, root / "unbroken", *SOAK)).codes == [0]
    argv, log, draws = train_argv(tiny, root / "killed", *SOAK), root / "log", random.Random(0)
    for step in kill_after_steps:
        process = true_process(argv, log)
        try:
            while last_step(root / "killed") < step:
                assert process.poll() is None, log.read_text()
                time.sleep(0.002)
            time.sleep(draws.uniform(0.0, 0.05))
        finally:
            process.kill()
        assert process.wait() == -9, log.read_text()
        assert last_step(root / "killed") < last_step(root / "unbroken")
    assert true_process(argv, log).wait() == 0, log.read_text()
    assert outcome(root / "killed") == outcome(root / "unbroken")


@pytest.mark.slow
def test_true_process_killed_six_times_ends_alike(fork_server, tiny, tmp_path):
    kill_true_processes(fork_server, tiny, tmp_path, kill_after_steps=[2, 6, 9, 13, 19, 24])


# --- another number of processes ------------------------------------------------------------------------------------


def trained_on(trace: Path, num_processes: int) -> dict[int, list[tuple[int, list[int]]]]:
    """For each step that an attempt began: (number of the micro-batch, its samples) over all processes, by number.

    What the processes said of themselves is checked: how many they are, and that two are joined by gloo.
    """
    steps: dict[int, list[tuple[int, list[int]]]] = {}
    for rank in range(num_processes):
        lines = [json.loads(line) for line in trace.with_name(f"{trace.name}-{rank}").read_text().splitlines()]
        assert lines, f"process {rank} of {num_processes} has trained on nothing"
        for line in lines:
            assert line["num_processes"] == num_processes
            assert line["backend"] == ("gloo" if num_processes > 1 else None)
            steps.setdefault(line["step"], []).append((line["number"], line["indices"]))
    return {step: sorted(micro_batches) for step, micro_batches in steps.items()}


def change_processes(fork_server: ForkServer, tiny: Path, root: Path, *, attempts: list[int], seed: int) -> None:
    """Train with as many processes as `attempts` say, one after the other; all but the last are killed."""
    job = fork_server.run("train", train_argv(tiny, root / "unbroken", *SOAK), trace=root / "unbroken-trace")
    assert job.codes == [0], job.output
    expected = trained_on(root / "unbroken-trace", 1)
    assert all([number for number, _ in micro_batches] == [0, 1, 2, 3] for micro_batches in expected.values())
    run_dir, draws, last_attempt = root / "run", random.Random(seed), {}
    for index, num_processes in enumerate(attempts):
        trace, phase = root / f"trace-{index}", root / f"phase-{index}"
        options = {"num_processes": num_processes, "trace": trace, "phase": phase}
        job = fork_server.start("train", train_argv(tiny, run_dir, *SOAK), **options)
        if index < len(attempts) - 1:
            wait_until(lambda phase=phase: phase_of(phase) != "start", job)
            goal = last_step(run_dir) + draws.randint(3, 24 // len(attempts))
            wait_until(lambda goal=goal: last_step(run_dir) >= goal, job)
            wait_until(lambda phase=phase: phase_of(phase) == "accumulation", job)
            kill_all(job, draws)
        codes = job.wait()
        assert (-9 in codes) if index < len(attempts) - 1 else codes == [0] * num_processes, job.output
        attempt = trained_on(trace, num_processes)
        assert index == 0 or min(attempt) in last_attempt or min(attempt) == max(last_attempt) + 1
        last_attempt |= attempt
    assert last_attempt == expected
    for told, wanted in zip(metrics_of(run_dir), metrics_of(root / "unbroken"), strict=True):
        assert (told["step"], told["split"]) == (wanted["step"], wanted["split"])
        assert told["num_target_tokens"] == wanted["num_target_tokens"]
        assert told["loss"] == pytest.approx(wanted["loss"], abs=1e-5)


@pytest.mark.distributed
def test_two_processes_see_the_same_samples_and_losses_as_one(fork_server, tiny, tmp_path):
    """1 process x accumulation 4 against 2 x 2: as many targets at each step, and losses equal to 1e-5."""
    overrides = ["training.max_steps=50", "checkpoint={every_steps: null}"]
    for num_processes in (1, 2):
        argv = train_argv(tiny, tmp_path / str(num_processes), *overrides)
        job = fork_server.run("train", argv, num_processes=num_processes)
        assert job.codes == [0] * num_processes, job.output
        assert f"engine  {num_processes} x cpu" in job.output
        assert f"accumulation {4 // num_processes}" in job.output
    one, two = metrics_of(tmp_path / "1"), metrics_of(tmp_path / "2")
    assert len(one) == len(two) == 50 + 10
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a.get("num_target_tokens")) == (b["step"], b.get("num_target_tokens"))
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.distributed
def test_two_then_one_then_two_processes_train_on_the_same_samples(fork_server, tiny, tmp_path):
    """Killed on 2 processes, resumed on 1, killed, resumed on 2: each sample once, in the order of one process."""
    change_processes(fork_server, tiny, tmp_path, attempts=[2, 1, 2], seed=0)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("attempts", [[2, 1], [1, 2], [4, 1, 2], [1, 2, 1, 4, 2]])
@pytest.mark.parametrize("seed", range(5))
def test_any_sequence_of_processes_trains_on_the_same_samples(fork_server, tiny, tmp_path, attempts, seed):
    change_processes(fork_server, tiny, tmp_path, attempts=attempts, seed=seed)


# --- told to stop, damaged, changed -----------------------------------------------------------------------------------


def test_a_signal_saves_and_the_next_start_ends_alike(fork_server, tiny, tmp_path):
    """SIGTERM: exit code 75, the `preempted` marker, and the same weights after going on."""
    assert fork_server.run("train", train_argv(tiny, tmp_path / "unbroken")).codes == [0]
    job = fork_server.start("train", train_argv(tiny, tmp_path / "told"))
    while last_step(tmp_path / "told") < 7:
        time.sleep(0.002)
    job.kill(15)
    assert job.wait() == [75], job.output
    assert (tmp_path / "told" / "preempted").exists()
    assert "stands. Run the same command again to go on." in job.output
    assert fork_server.run("train", train_argv(tiny, tmp_path / "told")).codes == [0]
    assert outcome(tmp_path / "told") == outcome(tmp_path / "unbroken")
    assert not (tmp_path / "told" / "preempted").exists()


def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(fork_server, tiny, tmp_path):
    run_dir = tmp_path / "run"
    argv = train_argv(tiny, run_dir, "training.max_steps=9", "evaluation.every_steps=null")
    assert fork_server.run("train", argv).codes == [0]
    expected = outcome(run_dir)
    files.remove_folder(run_dir / "final")
    weights = run_dir / "checkpoints" / "step-000000009" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    job = fork_server.run("train", argv)
    assert job.codes == [0], job.output
    assert "damaged checkpoint, stepping back" in job.output
    assert "step-000000009/model.safetensors" in job.output
    assert "step-000000006, step 6" in job.output
    assert outcome(run_dir) == expected


def test_other_settings_are_refused_unless_named(fork_server, tiny, tmp_path):
    argv = train_argv(tiny, tmp_path / "run", "training.max_steps=3")
    assert fork_server.run("train", argv).codes == [0]
    files.remove_folder(tmp_path / "run" / "final")
    longer = train_argv(tiny, tmp_path / "run", "training.max_steps=6", "optimizer.learning_rate=1e-3")
    job = fork_server.run("train", longer)
    assert job.codes == [2]
    assert re.search(r"training\.max_steps +3 +6", job.output), job.output
    assert re.search(r"optimizer\.learning_rate +0\.003 +0\.001", job.output), job.output
    job = fork_server.run("train", [*longer, "allow_drift=[training.max_steps, optimizer.learning_rate]"])
    assert job.codes == [0], job.output
    assert metrics_of(tmp_path / "run")[-1]["step"] == 6


@pytest.mark.distributed
def test_a_mistake_found_by_process_0_ends_all_with_one_line(fork_server, tiny, tmp_path):
    """`resume: never` where a run is: the others end too, and have nothing to add."""
    assert fork_server.run("train", train_argv(tiny, tmp_path / "run", "training.max_steps=3")).codes == [0]
    job = fork_server.run("train", [*train_argv(tiny, tmp_path / "run"), "resume=never"], num_processes=2)
    assert job.codes == [2, 2], job.output
    assert "Traceback" not in job.output
    assert job.output.count("error: ") == 1
