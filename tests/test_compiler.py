"""A compiled step: the numbers of the plain one, the plain names, and no silent way back."""

import json
import math
from pathlib import Path

import pytest
from conftest import ROOT, metrics_of, train_argv
from safetensors import safe_open

from codex_accel import compiler, files, run_folder
from codex_accel.errors import UserError
from codex_accel.train_schema import Data, Model, TrainConfig, Training

DRIVER = ROOT / "tests" / "compiled.py"
PLAIN, TWO_DOCUMENTS = (2, 16), 7  # shape of a batch; where a second document begins


def config_of(**training) -> TrainConfig:
    return TrainConfig(
        output_dir="out",
        model=Model(config={"model_type": "gpt2"}),
        data=Data(dataset="data", block_size=16),
        training=Training(**{"max_steps": 1, **training}),
    )


@pytest.fixture(scope="module")
def cache(request) -> dict[str, str]:
    """The environment of a compiling process: code is kept between sessions, as it is for people."""
    return {compiler.CACHE: str(request.config.cache.mkdir("inductor"))}


@pytest.fixture(scope="module")
def compare(fork_server, cache):
    def compare(kind: str, batches: list, *, num_processes: int = 1, **asked) -> dict:
        argv = [json.dumps({"kind": kind, "batches": batches, **asked})]
        job = fork_server.run(DRIVER, argv, num_processes=num_processes, environment=cache, timeout_s=580)
        assert job.codes == [0] * num_processes, job.output
        return json.loads(job.output[job.output.rindex('{"loss"') :])

    return compare


def require_equal(told: dict, *, bound: float = 1e-5) -> None:
    assert told["loss"]["compiled"] == pytest.approx(told["loss"]["eager"], rel=bound)
    for ours, theirs in zip(told["gradient"]["compiled"], told["gradient"]["eager"], strict=True):
        assert ours == pytest.approx(theirs, rel=100 * bound)


# --- what is compiled -----------------------------------------------------------------------------------------------


def test_compiled_loss_is_the_plain_one_and_the_model_stays_plain(compare):
    """The short form of what follows, with the least model: one graph without a break, bare names, plain evaluation."""
    told = compare("words", [(0, PLAIN, 0), (1, PLAIN, 0)])
    require_equal(told)
    assert (told["graphs"], told["breaks"]) == (1, 0)
    assert told["graphs_of_evaluation"] == 0
    assert told["logits"] == [1, 8, 64]
    assert told["same_names"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("precision", "bound"), [("no", 1e-5), ("bf16", 2e-4)])
def test_batches_with_and_without_a_boundary_have_a_graph_each(compare, kind, precision, bound):
    """Documents of a block stay apart: the plain model, which the start-up probe has tried, gives the same loss."""
    batches = [(0, PLAIN, 0), (1, PLAIN, TWO_DOCUMENTS), (2, PLAIN, 0), (3, PLAIN, TWO_DOCUMENTS)]
    told = compare(kind, batches, precision=precision)
    require_equal(told, bound=bound)
    assert (told["graphs"], told["breaks"], told["graphs_of_evaluation"]) == (2, 0, 0)


@pytest.mark.slow
def test_rows_of_many_lengths_share_a_graph(compare):
    shapes = [(2, 16), (2, 9), (2, 31), (2, 12), (2, 25), (2, 17), (2, 28), (2, 11), (2, 20), (2, 23)]
    told = compare("gpt2", [(number, shape, 0) for number, shape in enumerate(shapes)], packing="group_by_length")
    require_equal(told)
    assert told["graphs"] == 1


@pytest.mark.slow
def test_too_many_graphs_are_an_error_and_not_slow_code(fork_server, cache):
    batches = [(number, (2, 8 + number), 0) for number in range(10)]
    argv = [json.dumps({"kind": "words", "batches": batches})]
    job = fork_server.run(DRIVER, argv, environment=cache, timeout_s=580)
    assert job.codes == [2], job.output
    assert "training.compile: true, but torch cannot compile this model (FailOnRecompileLimitHit:" in job.output
    assert "Traceback" not in job.output


@pytest.mark.slow
def test_loss_by_chunks_is_the_plain_one(compare):
    told = compare("llama", [(0, PLAIN, 0), (1, PLAIN, TWO_DOCUMENTS)], chunk_rows=5)
    require_equal(told)
    assert told["logits"] == [1, 8, 64]


@pytest.mark.slow
def test_compiled_dropout_is_a_function_of_the_seed(compare):
    """Compiled code draws other numbers than plain code, but the same ones for the same seed."""
    told = compare("gpt2", [(0, PLAIN, 0), (1, PLAIN, 0), (0, PLAIN, 0)], dropout=0.3)
    first, other, again = told["loss"]["compiled"]
    assert first == again != other
    assert first != compare("gpt2", [(0, PLAIN, 0)])["loss"]["compiled"][0]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_two_processes_compile_what_one_does(compare, gradient_checkpointing):
    batches = [(0, PLAIN, 0), (1, PLAIN, 0)]
    told = compare("gpt2", batches, num_processes=2, gradient_checkpointing=gradient_checkpointing)
    require_equal(told)
    assert (told["graphs"], told["breaks"]) == (1, 0)


# --- in a run -------------------------------------------------------------------------------------------------------

RUN = ("training.max_steps=6", "training.compile=true", "evaluation={every_steps: 3, max_windows: 16}")
RUN += ("checkpoint={every_steps: 2, keep_last: 9}",)


def names_in(checkpoint: Path) -> set[str]:
    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        return set(weights.keys())


@pytest.mark.slow
def test_killed_compiled_run_ends_in_the_same_weights(tiny, fork_server, cache, tmp_path):
    """With dropout; killed after step 4, by taking the later files away and starting in a new process."""
    first, second = tmp_path / "first", tmp_path / "second"
    job = fork_server.run("train", train_argv(tiny, first, *RUN), environment=cache, timeout_s=580)
    assert job.codes == [0], job.output
    assert "compile " in job.output
    assert not any("_orig_mod" in name for name in names_in(run_folder.checkpoint_path(first, 6)))
    phase = tmp_path / "phase"
    job = fork_server.start("train", train_argv(tiny, second, *RUN), environment=cache, phase=phase)
    while job.alive() and len(list((second / "checkpoints").glob("step-*"))) < 2:
        pass
    job.kill()
    job.wait()
    assert run_folder.steps_saved(second)[0] < 6, "killed too late"
    job = fork_server.run("train", train_argv(tiny, second, *RUN), environment=cache, timeout_s=580)
    assert job.codes == [0], job.output
    digests = [files.sha256_file(each / "final" / "model.safetensors") for each in (first, second)]
    assert digests[0] == digests[1]
    assert metrics_of(first) == metrics_of(second)


@pytest.mark.slow
def test_dynamo_of_accelerate_config_is_training_compile(tiny, fork_server, cache, tmp_path):
    argv = train_argv(tiny, tmp_path / "run", *RUN, "training.compile=false")
    asked = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "default"}
    job = fork_server.run("train", argv, environment=cache | asked, timeout_s=580)
    assert job.codes == [0], job.output
    assert "compile " in job.output
    newest = run_folder.checkpoint_path(tmp_path / "run", 6)
    assert not any("_orig_mod" in name for name in names_in(newest))
    assert "compile: true" in (newest / "config.yaml").read_text()
    job = fork_server.run("train", argv, environment=cache | asked)
    assert "is complete" in job.output


@pytest.mark.slow
def test_second_start_uses_the_code_of_the_first(tiny, fork_server, tmp_path):
    """Half the time at most; the cache is where XDG_CACHE_HOME says."""
    times = []
    for name in ("first", "second"):
        argv = train_argv(tiny, tmp_path / name, *RUN, "training.max_steps=1", "schedule.warmup=0")
        job = fork_server.run("train", argv, environment={"XDG_CACHE_HOME": str(tmp_path / "cache")}, timeout_s=580)
        assert job.codes == [0], job.output
        told = [line for line in job.output.splitlines() if line.startswith("compile ")]
        assert told
        assert all(line.endswith(f"kept in {tmp_path}/cache/codex_accel/inductor") for line in told)
        times.append(sum(float(line.split()[1]) for line in told))
    assert times[1] <= 0.5 * times[0]


# --- what is refused ------------------------------------------------------------------------------------------------


def test_missing_compiler_is_told_before_the_model_is_built(tiny, fork_server, tmp_path):
    argv = train_argv(tiny, tmp_path / "run", "training.compile=true")
    job = fork_server.run("train", argv, environment={"PATH": str(tmp_path), compiler.CACHE: str(tmp_path)})
    assert job.codes == [2], job.output
    assert job.output.strip() == (
        "error: command line: training.compile: true, but the C++ compiler g++ is not there. Install g++ or name one "
        "in CXX. Or say training.compile=false."
    )


def test_accelerate_config_turns_compile_on(monkeypatch):
    config = config_of()
    assert compiler.resolve(config) is config
    for given in ("no", "NO"):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", given)
        assert compiler.resolve(config) is config
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    resolved = compiler.resolve(config)
    assert resolved.training.compile
    assert resolved.model_copy(update={"training": config.training}) == config


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("BACKEND", "CUDAGRAPHS", "training.compile takes inductor only"),
        ("MODE", "max-autotune", "is not taken over by training.compile. Set it to default"),
        ("USE_REGIONAL_COMPILATION", "True", "is not taken over by training.compile. Set it to false"),
    ],
)
def test_other_ways_of_accelerate_config_are_refused(monkeypatch, name, value, what):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", value)
    with pytest.raises(UserError, match=f"environment: ACCELERATE_DYNAMO_{name} = {value}: {what}"):
        compiler.resolve(config_of())


def test_code_is_kept_where_it_lasts(monkeypatch, tmp_path):
    """In the user's cache, unless a place is given; the default of torch, which its import sets, is not one."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(compiler.CACHE, default_cache_dir())
    assert compiler.cache_folder() == tmp_path / "codex_accel" / "inductor"
    monkeypatch.delenv(compiler.CACHE)
    assert compiler.cache_folder() == tmp_path / "codex_accel" / "inductor"
    monkeypatch.setenv(compiler.CACHE, str(tmp_path / "mine"))
    assert compiler.cache_folder() == tmp_path / "mine"


def test_forward_is_the_plain_one_again_whatever_happens():
    import torch

    model = torch.nn.Linear(2, 2)
    own = torch.ones(1, 2)
    before = model(own)
    with compiler.in_place_of_forward(model, lambda given: given * 5, config_of()):
        assert torch.equal(model(own), own * 5)
    with (
        pytest.raises(UserError, match=r"training\.compile: true, but torch cannot compile this model \(Unsupported"),
        compiler.in_place_of_forward(model, lambda given: given, config_of()),
    ):
        raise torch._dynamo.exc.Unsupported("of this kind")
    assert torch.equal(model(own), before)
    assert "forward" not in vars(model)
    assert math.isclose(float(before.sum().detach()), float(model(own).sum().detach()))
