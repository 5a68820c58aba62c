"""scripts/train.py with fp16 on a CPU as Accelerate has it on a GPU: autocast and a gradient scaler.

Rule: only what Accelerate leaves out on a CPU is added, right after it has been made.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

TRAIN = Path(__file__).parent.parent / "scripts" / "train.py"
make = Accelerator.__init__


def make_with_scaler(accelerator: Accelerator, *arguments: Any, **settings: Any) -> None:
    """What Accelerate does where there is a GPU."""
    make(accelerator, *arguments, **settings)
    assert accelerator.mixed_precision == "fp16"
    assert accelerator.scaler is None
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True


def main(argv: Sequence[str]) -> int:
    """The run."""
    Accelerator.__init__ = make_with_scaler
    spec = importlib.util.spec_from_file_location("train", TRAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(argv)
