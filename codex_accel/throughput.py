"""Tokens a second, and the share of the device's peak that the model's arithmetic uses (MFU).

Rule: a share of an unknown peak, or of arithmetic that cannot be counted, is not made up: there is no `mfu` then.
"""

import math
import re
import time
from typing import Any

import torch
from torch import nn

from codex_accel import processes

# Peak FLOP/s of dense products (without sparsity) by the product's type, from NVIDIA's data sheets and architecture
# papers. Half is float16 and bfloat16 with float32 sums; a card without the type has no entry. First match wins.
PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    # a slice of a card, and boards of several names whose published figures disagree
    (r"MIG|NVL", {}),
    # H100 data sheet; the H200 and the GH200 have the same chip
    (r"H100 PCIe", {"bfloat16": 756e12, "float16": 756e12, "tf32": 378e12, "float32": 51e12}),
    (r"H100|G?H200", {"bfloat16": 989e12, "float16": 989e12, "tf32": 494e12, "float32": 67e12}),
    # A100 data sheet
    (r"A100", {"bfloat16": 312e12, "float16": 312e12, "tf32": 156e12, "float32": 19.5e12}),
    # A10G: half of the A10's tensor throughput (AWS g5 page)
    (r"A10G", {"bfloat16": 70e12, "float16": 70e12, "tf32": 35e12, "float32": 31.5e12}),
    (r"A10", {"bfloat16": 125e12, "float16": 125e12, "tf32": 62.5e12, "float32": 31.2e12}),
    # L40S and L4 data sheets, which print the figures with sparsity: half of those
    (r"L40S", {"bfloat16": 362e12, "float16": 362e12, "tf32": 183e12, "float32": 91.6e12}),
    (r"L4", {"bfloat16": 121e12, "float16": 121e12, "tf32": 60e12, "float32": 30.3e12}),
    # Ada architecture paper, appendix: float16 with float32 sums
    (r"RTX 4090(?! (?:D|Laptop))", {"bfloat16": 165e12, "float16": 165e12, "tf32": 82.6e12, "float32": 82.6e12}),
    # Volta and Turing architecture papers; no bfloat16, no TF32
    (r"V100-SXM2", {"float16": 125e12, "float32": 15.7e12}),
    (r"V100-PCIE", {"float16": 112e12, "float32": 14e12}),
    (r"T4", {"float16": 65e12, "float32": 8.1e12}),
)


class Meter:
    """Counts tokens between two lines of metrics."""

    def __init__(self, model: Any, accelerator: Any, *, block_size: int):
        self.accelerator, self.num_tokens, self.since_s = accelerator, 0, time.monotonic()
        self.flops_per_token = flops_per_token(model, block_size=block_size)
        self.peak = None
        if accelerator.device.type == "cuda":
            kind = product_type(model, accelerator.mixed_precision, tf32=torch.backends.cuda.matmul.allow_tf32)
            self.peak = peak_flops_per_s(torch.cuda.get_device_name(accelerator.device), kind)

    def start(self) -> float:
        """Begin to count now; returns the time, of `time.monotonic`."""
        self.num_tokens, self.since_s = 0, time.monotonic()
        return self.since_s

    def add(self, num_tokens: int) -> None:
        """Count tokens that this process has fed."""
        self.num_tokens += num_tokens

    def rates(self) -> dict[str, float]:
        """tokens_per_s over all processes since the last call, and `mfu` from 0 to 1 where it is known.

        Evaluations and saves in between count as time. Every process must call this.
        """
        now = time.monotonic()
        tokens_per_s = processes.sum_int(self.accelerator, self.num_tokens) / (now - self.since_s)
        self.num_tokens, self.since_s = 0, now
        if self.peak is None or self.flops_per_token is None:
            return {"tokens_per_s": tokens_per_s}
        used = tokens_per_s * self.flops_per_token / self.accelerator.num_processes
        return {"tokens_per_s": tokens_per_s, "mfu": used / self.peak}


def flops_per_token(model: nn.Module, *, block_size: int) -> float | None:
    """Floating-point operations that training takes per token, forward and backward; None if they cannot be counted.

    4 N + 2 N_trainable + 12 L H Q T: Chowdhery et al. 2022 (PaLM), appendix B, is 6 N + 12 L H Q T with L layers, H
    heads of size Q and T = block_size, and says that a gradient checkpoint's second forward pass does not count. N are
    the parameters that multiply: all but embedding tables, unless tied to the head. A frozen weight needs no gradient
    of its own, 2 of its 6 operations, but passes one on. Attention counts whole, as in PaLM, though half of it is
    masked, and more where documents do not see each other.

    A token of a mixture of experts uses some of them, and other layers than attention are not in the formula: None.
    """
    config = getattr(model, "config", None)
    layers, heads, width = (
        getattr(config, name, None) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    experts = any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    other_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if experts or other_layers or not (layers and heads and width):
        return None
    head_size = getattr(config, "head_dim", None) or width // heads
    sizes = _multiplied(model)
    trained = sum(size for parameter, size in sizes if parameter.requires_grad)
    return 4 * sum(size for _, size in sizes) + 2 * trained + 12 * layers * heads * head_size * block_size


def _multiplied(model: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Parameters that activations are multiplied with, each once, and their whole sizes."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tied = getattr(head, "weight", None)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - {id(tied)}
    return [(parameter, _size(parameter)) for parameter in model.parameters() if id(parameter) not in tables]


def _size(parameter: nn.Parameter) -> int:
    """Numbers in a whole parameter: bitsandbytes packs two into a byte, and DeepSpeed leaves none here."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else getattr(parameter, "ds_numel", parameter.numel())


def product_type(model: nn.Module, mixed_precision: str, *, tf32: bool) -> str:
    """Type in which the products are made, as PEAKS names it."""
    under_autocast = {"bf16": "bfloat16", "fp16": "float16"}.get(mixed_precision)
    stored = str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")
    kind = under_autocast or stored
    return "tf32" if kind == "float32" and tf32 else kind


def peak_flops_per_s(device_name: str, product: str) -> float | None:
    """Peak of one device for products of a type, as `torch.cuda.get_device_name` calls it; None if not known."""
    for pattern, peaks in PEAKS:
        if re.search(rf"\b(?:{pattern})\b", device_name):
            return peaks.get(product)
    return None
