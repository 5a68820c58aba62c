"""A driver for tests/test_compiler.py, run through the fork server: the loss of some micro-batches, eager and compiled.

Rule: prints one line of JSON; what it may be is in the tests.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from codex_accel import compiler, loss
from codex_accel.packing import IGNORE
from codex_accel.train_schema import Data, Model, TrainConfig, Training

VOCAB_SIZE = 64
SHAPES = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    "gpt2": {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0},
}


class Words(torch.nn.Module):
    """The least that has logits: a product of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(VOCAB_SIZE, 8), torch.nn.Linear(8, VOCAB_SIZE)

    def forward(self, input_ids: torch.Tensor, position_ids: Any = None, use_cache: bool = False) -> Any:
        return CausalLMOutput(logits=self.head(self.embedding(input_ids)))


def made(kind: str, *, dropout: float, gradient_checkpointing: bool) -> torch.nn.Module:
    """The same weights at each call."""
    torch.manual_seed(0)
    if kind == "words":
        return Words()
    values = SHAPES[kind] | (
        dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout) if kind == "gpt2" else {}
    )
    architecture = AutoConfig.for_model(kind, vocab_size=VOCAB_SIZE, use_cache=False, **values)
    model = AutoModelForCausalLM.from_config(architecture)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def parts(model: torch.nn.Module) -> list[list[torch.nn.Parameter]]:
    """Vectors and matrices."""
    parameters = list(model.parameters())
    return [[p for p in parameters if p.ndim == 1], [p for p in parameters if p.ndim > 1]]


def batch(number: int, *, shape: tuple[int, int], cut: int) -> dict[str, Any]:
    """Inputs with a few ignored labels; with `cut`, a second document begins there."""
    generator = torch.Generator().manual_seed(number)
    input_ids, labels = (torch.randint(0, VOCAB_SIZE, shape, generator=generator) for _ in range(2))
    labels[0, :3] = IGNORE
    position_ids = torch.arange(shape[1]).repeat(shape[0], 1)
    position_ids[:, cut:] -= cut
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids if cut else None}


def main(argv: Sequence[str]) -> int:
    """`argv` holds one JSON object: kind, batches [(number, shape, cut)] and the settings below."""
    asked = {"precision": "no", "chunk_rows": 0, "dropout": 0.0, "gradient_checkpointing": False, "packing": "concat"}
    asked |= json.loads(argv[0])
    config = TrainConfig(
        output_dir="run",
        model=Model(config={"model_type": "gpt2"}),
        data=Data(dataset="data", block_size=16, packing=asked["packing"]),
        training=Training(max_steps=1, compile=True),
    )
    accelerator = Accelerator(cpu=True, mixed_precision=asked["precision"], dynamo_backend="no")
    compiler.set_up(config, accelerator.device)
    told: dict[str, Any] = {"loss": {}, "gradient": {}}
    for name, training in (("eager", {"compile": False}), ("compiled", {"compile": True})):
        model = made(asked["kind"], dropout=asked["dropout"], gradient_checkpointing=asked["gradient_checkpointing"])
        names = list(model.state_dict())
        prepared = accelerator.prepare(model)
        settings = config.model_copy(update={"training": config.training.model_copy(update=training)})
        sum_of_losses = loss.of(model, settings, chunk_rows=asked["chunk_rows"])
        losses, norms = [], []
        for number, shape, cut in asked["batches"]:
            model.zero_grad()
            torch.manual_seed(number)
            value = sum_of_losses(prepared, **batch(number, shape=shape, cut=cut), use_cache=False)
            accelerator.backward(value)
            losses.append(float(value.detach()))
            norms.append(
                [float(torch.cat([p.grad.flatten().double() for p in group]).norm()) for group in parts(model)]
            )
        told["loss"][name], told["gradient"][name] = losses, norms
    graphs = counters["stats"]["unique_graphs"]
    prepared.eval()
    logits = model(input_ids=torch.arange(8)[None], use_cache=False).logits
    told |= {
        "graphs": graphs,
        "graphs_of_evaluation": counters["stats"]["unique_graphs"] - graphs,
        "logits": list(logits.shape),
        "same_names": list(model.state_dict()) == names,
        "breaks": sum(counters["graph_break"].values()),
    }
    if accelerator.is_main_process:
        print(json.dumps(told))
    accelerator.end_training()
    return 0
