"""scripts/train.py with the gradient scaler that Accelerate gives to fp16 on a GPU, on a CPU, where it gives none.

Rule: only the scaler is added, right after Accelerate has been made; the arithmetic stays float32.
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
    """As Accelerate does with fp16 on a GPU."""
    make(accelerator, *arguments, **settings)
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu"), True
    accelerator.state._mixed_precision = "fp16"
    accelerator.autocast_handler = None


def main(argv: Sequence[str]) -> int:
    """The run."""
    Accelerator.__init__ = make_with_scaler
    spec = importlib.util.spec_from_file_location("train", TRAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(argv)
