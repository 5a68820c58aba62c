"""torch.compile for a training step: the forward pass of the model and the loss as one graph.

Rule: the weights keep their names, evaluation and saving see the plain model, a step gives the same bits in every
process that compiles it, and nothing falls back to slower code without a word.
"""

import contextlib
import os
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codex_accel import cli, redaction
from codex_accel import config as configuration
from codex_accel.errors import UserError
from codex_accel.train_schema import TrainConfig

if TYPE_CHECKING:
    import torch

CACHE = "TORCHINDUCTOR_CACHE_DIR"  # torch's own variable; its default is a folder in /tmp, which does not last
BY_ACCELERATE = {
    "MODE": "default",
    "USE_FULLGRAPH": "false",
    "USE_DYNAMIC": "false",
    "USE_REGIONAL_COMPILATION": "false",
}


def resolve(config: TrainConfig) -> TrainConfig:
    """`config` with `training.compile` on if `accelerate config` asks for it, so that what is recorded is what is done.

    Raises: UserError if it asks for another backend than inductor, or for options of its own.
    """
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() == "no":
        return config
    if backend.lower() != "inductor":
        what = f"{backend}: training.compile takes inductor only. Choose it, or no."
        raise UserError(f"environment: ACCELERATE_DYNAMO_BACKEND = {what}")
    for name, only in BY_ACCELERATE.items():
        if (asked := os.environ.get(f"ACCELERATE_DYNAMO_{name}", only)).lower() != only:
            what = f"{asked}: is not taken over by training.compile. Set it to {only}."
            raise UserError(f"environment: ACCELERATE_DYNAMO_{name} = {what}")
    values = config.model_dump(exclude_unset=True)
    values["training"]["compile"] = True
    return configuration.build(TrainConfig, values, config._origins, [])


def cache_folder() -> Path:
    """Where compiled code is kept from run to run; TORCHINDUCTOR_CACHE_DIR and XDG_CACHE_HOME are heeded."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    asked = os.environ.get(CACHE)
    if asked and asked != default_cache_dir():  # which the import of inductor sets
        return Path(asked)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "codex_accel" / "inductor"


def set_up(config: TrainConfig, device: "torch.device") -> None:
    """Make torch.compile ready: a cache that lasts, the same bits every time, the time that it takes told.

    Raises: UserError if what makes the code (a C++ compiler, Python's headers, triton) is missing.
    """
    import torch
    from torch._dynamo.callback import CallbackArgs, callback_handler

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[CACHE] = str(folder)
    if problem := _missing(device):
        raise UserError(config.problem("training.compile", f"true, but {problem} Or say training.compile=false."))
    # beyond eight graphs torch would run plain code, telling it by a warning only
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if device.type == "cpu" and not config.training.deterministic:
        # else threads add up the gradients of embeddings in any order (torch 2.13), and resuming would not be exact
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    started = [0.0]

    def start(_: CallbackArgs) -> None:
        started[0] = time.monotonic()

    def end(arguments: CallbackArgs) -> None:
        part = "backward pass" if arguments.callback_trigger.name == "LAZY_BACKWARD" else "forward pass"
        print(f"compile {time.monotonic() - started[0]:.1f} s, {part}, kept in {folder}", flush=True)

    if cli.is_main_process() and not callback_handler.start_callbacks:
        callback_handler.register_start_callback(start)
        callback_handler.register_end_callback(end)


def _missing(device: "torch.device") -> str | None:
    """What torch.compile lacks on this machine, as a sentence with what to do; None if it can work."""
    if device.type != "cpu":
        import importlib.util

        there = importlib.util.find_spec("triton") is not None
        return None if there else "triton is not installed. Run `pip install triton`."
    from torch._inductor import config, cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return f"the C++ compiler {config.cpp.cxx[-1]} is not there. Install g++ or name one in CXX."
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.is_file() else f"{header} is missing. Install Python's headers (python3-dev)."


def compiled(forward: Callable[..., Any], config: TrainConfig) -> Callable[..., Any]:
    """`forward`, compiled when it is first called.

    Shapes are part of the graph, except with `group_by_length`, where they differ from one micro-batch to the next. It
    is settled here, not by what comes first, so that a run that goes on uses the graphs of the run that was killed.
    """
    import torch

    return torch.compile(forward, dynamic=config.data.packing == "group_by_length")


@contextlib.contextmanager
def in_place_of_forward(model: "torch.nn.Module", forward: Callable[..., Any], config: TrainConfig) -> Iterator[None]:
    """Within this, `model` calls `forward` instead of its own; what an engine wraps around the model stays in use.

    Raises: UserError if the code cannot be made.
    """
    import torch

    own = vars(model).get("forward")  # of Accelerate, which puts autocast around the class's
    vars(model)["forward"] = forward
    try:
        yield
    except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
        raise refused(config, error) from error
    finally:
        if own is None:
            del model.forward
        else:
            vars(model)["forward"] = own


def refused(config: TrainConfig, error: Exception) -> UserError:
    """The line for an error of torch.compile."""
    reason = redaction.words(error, 200)
    what = f"true, but torch cannot compile this model ({type(error).__name__}: {reason}). Say training.compile=false."
    return UserError(config.problem("training.compile", what))


def seconds_spent() -> float:
    """Time that torch has compiled for in this process."""
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent().get("total_wall_time", 0.0)
