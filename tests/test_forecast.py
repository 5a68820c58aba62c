"""The dry run: what it prints, beside the run that follows."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, train_argv
from hypothesis import given
from hypothesis import strategies as st

from codex_accel import forecast
from codex_accel.forecast import Figures
from codex_accel.train_schema import Checkpoint, Data, Evaluation, Model, TrainConfig, Training

MB = 1_000_000
# activations outweigh weights; 9 steps, so that the last evaluation and the last save are of no round step
SHAPE = (
    "model.config={model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 64, n_positions: 32}",
    "training={micro_batch_size: 256, global_batch_size: 256, max_steps: 9, mixed_precision: 'no'}",
    "checkpoint={every_steps: 2, keep_last: 2}",
)
RUN_AND_TELL = f"""
import importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("train", {str(ROOT / "scripts" / "train.py")!r})
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)
def main(argv):
    Path("/proc/self/clear_refs").write_text("5")
    code = train.main(argv)
    print(Path("/proc/self/status").read_text())
    return code
"""


def shown(output: str) -> str:
    """What the dry run has printed."""
    return output[output.index("dry run ") :]


def numbers(pattern: str, output: str) -> list[float]:
    """The numbers of the line that `pattern` finds, with # for each."""
    found = re.search(pattern.replace("#", r"([\d,.]+)"), shown(output))
    assert found, f"{pattern}\n{output}"
    return [float(text.replace(",", "")) for text in found.groups()]


@pytest.fixture(scope="module")
def both(tiny, fork_server, tmp_path_factory) -> tuple[str, str, Path]:
    """Output of a dry run and of the run itself, which tells its peak; and its folder."""
    root = tmp_path_factory.mktemp("dry_run")
    argv = train_argv(tiny, root / "run", *SHAPE)
    dry = fork_server.run("train", [*argv, "--dry-run"])
    assert dry.codes == [0], dry.output
    assert not (root / "run").exists()
    script = root / "run_and_tell.py"
    script.write_text(RUN_AND_TELL)
    job = fork_server.run(script, argv)
    assert job.codes == [0], job.output
    return dry.output, job.output, root / "run"


def test_counts_are_those_of_the_run(both):
    output, _, run_dir = both
    facts = json.loads((run_dir / "run.json").read_text())
    assert numbers("parameters +#, of which # train", output) == [
        facts["num_parameters"],
        facts["num_trainable_parameters"],
    ]
    assert numbers("length +# steps, # an epoch", output) == [9, round(facts["steps_per_epoch"], 2)]
    assert numbers("step +# tokens: # x # sequences", output) == [256 * 32, facts["accumulation_steps"], 256]
    lines = [json.loads(line) for line in (run_dir / "metrics.ndjson").read_text().splitlines()]
    num_evaluations = sum(line["split"] == "validation" for line in lines)
    assert numbers("with # evaluations", output) == [num_evaluations]


def test_disk_is_what_the_run_takes(both):
    """At its fullest, which is after a save and before the pruning that follows."""
    output, _, run_dir = both
    num, checkpoint, final = numbers("disk .*: # checkpoints of # MB, final # MB", output)
    sizes = [
        sum(path.stat().st_size for path in folder.iterdir()) / MB
        for folder in (run_dir / "checkpoints" / "step-000000009", run_dir / "final")
    ]
    assert [checkpoint, final] == pytest.approx(sizes, rel=0.02)
    assert num == 3
    assert numbers("disk +# MB", output)[0] == pytest.approx(3 * checkpoint + final, rel=0.01)


def test_memory_is_what_the_run_takes(both):
    output, run_output, _ = both
    [peak, evaluation] = numbers("memory +# MB at the peak of a step, # MB in an evaluation", output)
    [program] = numbers("# MB  program and data", output)
    taken = int(re.search(r"VmHWM:\s+(\d+) kB", run_output).group(1)) * 1024 / MB
    assert max(peak, evaluation) == pytest.approx(taken, rel=0.25)
    assert max(peak, evaluation) - program == pytest.approx(taken - program, rel=0.25)
    assert taken - program > 100, "the activations are to be seen"


def test_components_add_up_to_the_peak(both):
    output, _, run_dir = both
    [peak] = numbers("memory +# MB", output)
    parts = [
        numbers(f"# MB  {name}", output)[0]
        for name in ("program and data", "weights", "gradients", "optimizer state", "activations and the rest")
    ]
    assert sum(parts) == pytest.approx(peak, rel=0.01)
    parameters = json.loads((run_dir / "run.json").read_text())["num_parameters"]
    assert parts[1:4] == pytest.approx([parameters * size / MB for size in (4, 4, 8)], rel=0.01)


def test_adapter_by_chunks_is_forecast(both, tiny, fork_server, tmp_path):
    """Of an adapter on GPT-2's attention only the adapter has gradients and is saved."""
    argv = [
        *(argument for argument in train_argv(tiny, tmp_path / "run") if not argument.startswith("model.config")),
        f"model.path={both[2]}/final",
        "training.loss_chunk_rows=64",
        "peft={r: 2, target_modules: [c_attn]}",
        "--dry-run",
    ]
    job = fork_server.run("train", argv)
    assert job.codes == [0], job.output
    total, trained = numbers("parameters +#, of which # train", job.output)
    assert trained == 2 * 2 * (64 + 192)
    assert numbers("# MB  gradients", job.output) == pytest.approx([trained * 4 / MB], abs=0.001)
    assert numbers("# MB  optimizer state", job.output) == pytest.approx([trained * 8 / MB], abs=0.001)
    [_, checkpoint, _] = numbers("disk .*: # checkpoints of # MB, final # MB", job.output)
    assert checkpoint * MB < total * 4


@pytest.mark.distributed
def test_two_processes_with_rows_of_many_lengths_are_forecast_once(tiny, fork_server, tmp_path):
    argv = train_argv(tiny, tmp_path / "run", "data.packing=group_by_length", "--dry-run")
    job = fork_server.run("train", argv, num_processes=2)
    assert job.codes == [0, 0], job.output
    assert job.output.count("dry run ") == 1
    assert "step        8 rows of at most 32 tokens: 2 x 2 sequences, on each of 2 processes" in job.output
    assert "of the process that takes the most" in job.output
    assert not (tmp_path / "run").exists()


def test_run_of_one_step_is_forecast(tiny, fork_server, tmp_path):
    argv = train_argv(tiny, tmp_path / "run", "training.max_steps=1", "data.validation_split=null", "--dry-run")
    job = fork_server.run("train", [*argv, "evaluation.every_steps=null", "schedule.warmup=0"])
    assert job.codes == [0], job.output
    assert "dry run     1 step; nothing was written" in job.output
    expected, each, first = numbers("time +# s: # s a step, first # s", job.output)
    assert expected == each == first
    assert "with no evaluation" in job.output


def test_where_the_run_would_be_stopped_the_dry_run_is_not(tiny, fork_server, tmp_path):
    job = fork_server.run("train", train_argv(tiny, tmp_path / "run", "training.stop_at_step=1", "--dry-run"))
    assert job.codes == [0], job.output
    assert "dry run     3 steps; nothing was written" in job.output


def test_evaluation_that_does_not_fit_into_memory_is_one_line(tiny, fork_server, tmp_path):
    """400 MiB of address space are left, and the logits of a batch take 512 MiB."""
    size = Path(f"/proc/{fork_server.process.pid}/status").read_text().split("VmSize:")[1].split()[0]
    large = ["data.validation_split=train", "evaluation={batch_size: 8192}", "--dry-run"]
    limits = {"RLIMIT_AS": int(size) * 1024 + (400 << 20)}
    job = fork_server.run("train", train_argv(tiny, tmp_path / "run", *large), limits=limits)
    assert job.codes == [2], job.output
    assert "If it was in an evaluation, lower evaluation.batch_size." in job.output.splitlines()[-1]


# --- arithmetic -----------------------------------------------------------------------------------------------------


def config_of(
    *, micro=2, total=8, every_steps=None, keep_last=2, keep_best=0, evaluate_every=None, output_dir="out"
) -> TrainConfig:
    return TrainConfig(
        output_dir=output_dir,
        model=Model(config={"model_type": "gpt2"}),
        data=Data(dataset="data", block_size=16),
        training=Training(micro_batch_size=micro, global_batch_size=total, max_steps=10),
        evaluation=Evaluation(every_steps=evaluate_every),
        checkpoint=Checkpoint(every_steps=every_steps, keep_last=keep_last, keep_best=keep_best),
    )


@given(
    sequences=st.integers(1, 48), one=st.integers(1, 1000), room=st.integers(0, 50_000), num_processes=st.integers(1, 3)
)
def test_largest_micro_batch_fits_and_the_next_does_not(sequences, one, room, num_processes):
    """Of those that share the batch evenly; `one` byte count a sequence, measured with two of them."""
    fixed = 5000
    free = round((room + fixed) / 0.9) - fixed
    figures = Figures(program_bytes=fixed, step_peak_bytes=fixed + 2 * one, held_bytes=fixed, free_bytes=free)
    config = config_of(total=2 * sequences * num_processes)
    found = forecast.largest_micro_batch(config, figures, num_processes=num_processes)
    whole = 2 * sequences
    fitting = [size for size in range(1, whole + 1) if whole % size == 0 and size * one <= room]
    near = [size for size in range(1, whole + 1) if abs(size * one - room) <= 1]  # rounding decides
    assert found == (fitting[-1] if fitting else None) or near


@given(every=st.none() | st.integers(1, 12), max_steps=st.integers(1, 40))
def test_what_is_due_is_counted_as_the_loop_does_it(every, max_steps):
    due = {step for step in range(1, max_steps + 1) if every and step % every == 0} | {max_steps}
    assert forecast.num_due(every, max_steps=max_steps) == len(due)


@pytest.mark.parametrize(
    ("settings", "max_steps", "num"),
    [
        ({"every_steps": 2}, 10, 3),  # two kept and the new one
        ({"every_steps": 2, "keep_last": 9}, 10, 5),  # no more than are made
        ({"every_steps": None}, 10, 1),
        ({"every_steps": 1, "keep_last": 1, "keep_best": 2, "evaluate_every": 1}, 10, 4),
    ],
)
def test_disk_holds_all_that_stand_at_once(settings, max_steps, num):
    figures = Figures(saved_bytes=100, final_bytes=40)
    assert forecast.disk_bytes(config_of(**settings), figures, max_steps=max_steps) == (num, num * 100 + 40)


def test_expected_time_is_that_of_all_its_parts():
    """By hand: 1 s first, 5 s compiling, 9 further steps of 0.5 s, 4 evaluations of 2 s."""
    figures = Figures(step_s=[1.0, 0.4, 0.6], compile_s=[4.0, 1.0, 0.0], evaluation_s=2.0)
    config = config_of(evaluate_every=3)
    assert forecast.expected_s(config, figures, max_steps=10) == pytest.approx(1 + 5 + 9 * 0.5 + 4 * 2)


def test_processes_show_the_largest_memory_and_the_slowest_step():
    first = Figures(step_s=[2.0, 1.0], compile_s=[0.0, 0.0], step_peak_bytes=10, free_bytes=5, saved_bytes=7)
    second = Figures(step_s=[1.0, 3.0], compile_s=[1.0, 0.0], step_peak_bytes=20, free_bytes=6, saved_bytes=8)
    together = forecast.largest([first, second], engine="FSDP")
    assert (together.step_s, together.compile_s) == ([2.0, 3.0], [1.0, 0.0])
    assert (together.step_peak_bytes, together.free_bytes, together.saved_bytes) == (20, 5, 15)


def test_large_figures_fit_80_columns(tmp_path):
    figures = Figures(
        step_s=[812.0, 93.21, 93.34], compile_s=[1234.0, 0.0, 0.0], evaluation_s=8123.0, saved_bytes=840_000 * MB,
        program_bytes=4321 * MB, weights_bytes=140_000 * MB, gradient_bytes=140_000 * MB, optimizer_bytes=280_000 * MB,
        step_peak_bytes=700_000 * MB, evaluation_peak_bytes=710_000 * MB, free_bytes=90_000 * MB,
        final_bytes=280_000 * MB,
    )  # fmt: skip
    facts = {"max_steps": 1_000_000, "steps_per_epoch": 123_456.78, "num_processes": 1024, "accumulation_steps": 16}
    facts |= {"num_parameters": 70_000_000_000, "num_trainable_parameters": 70_000_000_000, "device": "cuda:7"}
    config = config_of(
        micro=16, total=262_144, every_steps=1000, evaluate_every=1000, output_dir=str(tmp_path / "a" / "b")
    )
    lines = forecast.lines(config, facts, figures)
    assert max(map(len, lines)) <= 80, "\n".join(lines)
    assert any("NOT ENOUGH" in line for line in lines)
