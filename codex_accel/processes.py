"""What the processes of a run do together.

Rule: every process calls these at the same place; sums of counts are taken here, and divided by the caller, once.
"""

import importlib.util
import os
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list

from codex_accel.errors import UserError
from codex_accel.evaluation import Scores
from codex_accel.train_schema import TrainConfig

T = TypeVar("T")


def require_installed_engine() -> None:
    """Raise UserError if the environment asks for DeepSpeed and it is not there: Accelerate ends in a traceback."""
    asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if asked and importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "environment: ACCELERATE_USE_DEEPSPEED = true: deepspeed is not installed. Run `pip install deepspeed` on "
            "a machine with a GPU, or choose another launch config."
        )


def require_engine(accelerator: Accelerator) -> None:
    """Raise UserError if Accelerate has not taken the processes or the engine that the environment asks for.

    It says nothing then: each process would train alone into one run folder, or FSDP would be plain DDP.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise UserError(
            f"environment: WORLD_SIZE = {asked}: the launcher started {asked} processes, but accelerate has joined "
            f"{accelerator.num_processes}. On a CPU set ACCELERATE_USE_CPU=true before the launch command."
        )
    for variable, engine in (
        ("ACCELERATE_USE_FSDP", DistributedType.FSDP),
        ("ACCELERATE_USE_DEEPSPEED", DistributedType.DEEPSPEED),
    ):
        if os.environ.get(variable, "false").lower() == "true" and accelerator.distributed_type != engine:
            raise UserError(
                f"environment: {variable} = true: asks for {engine.value}, but {accelerator.distributed_type.value} is "
                "in use. It needs a GPU; choose another launch config."
            )


def fit_engine(accelerator: Accelerator, config: TrainConfig) -> None:
    """`require_engine`, then tell it what it would take from a prepared loader, or decide by itself. Before `prepare`.

    FSDP2: gradients meet in float32, and the model gives what it has made. Accelerate's own policy rounds both to
    bfloat16, and with them a loss that is made in the head (measured with 1.15: 6e-4 of the loss, 4e-3 of the gradient
    norm). DeepSpeed: sizes and clipping as configured; Accelerate's own is a norm of 1.

    Raises: UserError as `require_engine`, and for what DeepSpeed cannot do: it takes the step within the backward pass
    of the last micro-batch, before the loop has seen the gradient.
    """
    require_engine(accelerator)
    training, precision = config.training, accelerator.mixed_precision
    if accelerator.is_fsdp2 and precision != "no":
        from torch.distributed.fsdp import MixedPrecisionPolicy  # takes a second to import

        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    problems = []
    if precision == "fp16":
        what = "fp16 does not go with DeepSpeed, whose overflows would look like a diverging run. Take bf16, or FSDP2."
        problems.append(config.problem("training.mixed_precision", what))
    if training.on_nonfinite == "skip":
        what = "skip does not go with DeepSpeed, which takes the step before the gradient is seen. Take stop, or FSDP2."
        problems.append(config.problem("training.on_nonfinite", what))
    if problems:
        raise UserError(*problems)
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    settings["train_micro_batch_size_per_gpu"] = training.micro_batch_size
    settings["gradient_clipping"] = training.max_grad_norm or 0.0  # 0.0: never


def from_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` gives on the main process, on all; the others do not run it.

    Raises: its UserError on the main process, and SystemExit(2) on the others, which have nothing to add.
    """
    result, problems = None, []
    if accelerator.is_main_process:
        try:
            result = work()
        except UserError as error:
            problems = error.problems
    [(result, problems)] = broadcast_object_list([(result, problems)])
    if problems and accelerator.is_main_process:
        raise UserError(*problems)
    if problems:
        raise SystemExit(2)
    return result


def sum_int(accelerator: Accelerator, value: int) -> int:
    """Sum of a whole number over processes."""
    if accelerator.num_processes == 1:
        return value
    return int(accelerator.reduce(torch.tensor(value, device=accelerator.device), reduction="sum").item())


def sum_float(accelerator: Accelerator, value: torch.Tensor) -> float:
    """Sum of a scalar tensor over processes."""
    return float(value if accelerator.num_processes == 1 else accelerator.reduce(value, reduction="sum"))


def sum_over_processes(accelerator: Accelerator, scores: Scores) -> Scores:
    """Per-document sums over processes."""
    if accelerator.num_processes == 1:
        return scores
    arrays = (scores.nll, scores.num_targets, scores.num_correct)
    tensors = [torch.from_numpy(array).to(accelerator.device) for array in arrays]
    return Scores(*(accelerator.reduce(tensor, reduction="sum").cpu().numpy() for tensor in tensors))


def pass_over_gradient(accelerator: Accelerator) -> None:
    """Take the gradient scaler of fp16, if there is one, to the next step without an update, its scale as it is.

    It refuses the next gradients otherwise, because it has unscaled these.
    """
    if accelerator.scaler is not None:
        accelerator.scaler.update(accelerator.scaler.get_scale())


def settle(accelerator: Accelerator) -> None:
    """Give gloo's threads the interpreter for a moment, so that they can drop the tensors of the last collective.

    Measured with torch 2.13: `~ProcessGroupGloo`, run while this thread holds the interpreter lock, waits for a thread
    that waits for the same lock to drop its tensor. Without it 3 of 6 repetitions of tests/test_resume.py hung at a
    run's end, with it none of 6.
    """
    if accelerator.num_processes > 1:
        time.sleep(0.2)


def end(accelerator: Accelerator) -> None:
    """Wait for all processes, then take the process group down."""
    accelerator.wait_for_everyone()
    settle(accelerator)
    accelerator.end_training()


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether `flag` is set on any process; every process must call this."""
    if accelerator.num_processes == 1:
        return flag
    total = accelerator.reduce(torch.tensor(int(flag), device=accelerator.device), reduction="sum")
    return bool(total.item())
