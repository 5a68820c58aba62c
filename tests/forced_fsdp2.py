"""scripts/train.py with Accelerate made to take FSDP2 on two processes of a CPU, where it would take DDP.

Rule: only the choice of the engine is changed, right after Accelerate has made it; what FSDP2 then does, in Accelerate
and in torch, with gloo, is what it does on GPUs with NCCL. The variables are those that accelerate_configs/fsdp2.yaml
sets, given as the first argument in JSON.
"""

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

TRAIN = Path(__file__).parent.parent / "scripts" / "train.py"
choose = Accelerator.__init__


def choose_fsdp2(accelerator: Accelerator, *arguments: Any, **settings: Any) -> None:
    """What `AcceleratorState` does where the processes have GPUs."""
    choose(accelerator, *arguments, **settings)
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    assert accelerator.is_fsdp2


def main(argv: Sequence[str]) -> int:
    """`VARIABLES ARGUMENTS...`: the run that `accelerate launch` would start."""
    os.environ.update(json.loads(argv[0]))
    Accelerator.__init__ = choose_fsdp2
    spec = importlib.util.spec_from_file_location("train", TRAIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(argv[1:])
