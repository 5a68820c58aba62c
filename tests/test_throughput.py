"""Arithmetic per token and peaks of devices, from which MFU comes."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MambaConfig, MixtralConfig

from codex_accel import throughput

LLAMA = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
# By hand: of each layer q and o 16x16, k and v 16x8, three of 16x24, two norms of 16; the last norm; the head.
LAYER = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24 + 2 * 16
HEAD = 64 * 16
ATTENTION = 12 * 3 * 4 * 4 * 32  # 12 L H Q T, of forward and backward


def model_of(config) -> nn.Module:
    return AutoModelForCausalLM.from_config(config)


def test_flops_are_those_of_palm_counted_by_hand():
    model = model_of(LlamaConfig(**LLAMA, tie_word_embeddings=False))
    assert throughput.flops_per_token(model, block_size=32) == 6 * (3 * LAYER + 16 + HEAD) + ATTENTION


def test_tied_embedding_counts_once_as_the_head():
    tied = model_of(LlamaConfig(**LLAMA, tie_word_embeddings=True))
    assert throughput.flops_per_token(tied, block_size=32) == 6 * (3 * LAYER + 16 + HEAD) + ATTENTION


def test_position_table_does_not_multiply():
    few, many = (
        model_of(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=positions))
        for positions in (32, 512)
    )
    assert throughput.flops_per_token(few, block_size=32) == throughput.flops_per_token(many, block_size=32)


def test_frozen_weight_needs_four_of_its_six_operations():
    model = model_of(LlamaConfig(**LLAMA, tie_word_embeddings=False)).requires_grad_(False)
    frozen = throughput.flops_per_token(model, block_size=32)
    assert frozen == 4 * (3 * LAYER + 16 + HEAD) + ATTENTION
    model.lm_head.weight.requires_grad_(True)
    assert throughput.flops_per_token(model, block_size=32) == frozen + 2 * HEAD


def test_formula_matches_the_operations_that_torch_counts():
    """torch.utils.flop_counter counts the products of a real step; norms, which are in N, are none."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = {"hidden_size": 64, "intermediate_size": 192, "num_key_value_heads": 4}
    config = LlamaConfig(**(LLAMA | shape), tie_word_embeddings=False, attn_implementation="eager")
    model, input_ids = model_of(config), torch.arange(32).reshape(1, 32)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    formula = throughput.flops_per_token(model, block_size=32) * 32
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1),
        MixtralConfig(**LLAMA, num_local_experts=2),
    ],
    ids=["mamba", "mixture of experts"],
)
def test_no_figure_where_the_formula_does_not_hold(config):
    assert throughput.flops_per_token(model_of(config), block_size=32) is None


@pytest.mark.parametrize(
    ("name", "product", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "float16", 989e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("NVIDIA A10G", "bfloat16", 70e12),
        ("NVIDIA A10", "bfloat16", 125e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("Tesla V100-SXM2-16GB", "float16", 125e12),
        ("Tesla T4", "float16", 65e12),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165e12),
    ],
)
def test_peak_of_a_known_card(name, product, peak):
    """Published by NVIDIA, dense."""
    assert throughput.peak_flops_per_s(name, product) == peak


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16"),
        ("NVIDIA H100 NVL", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA L40", "bfloat16"),
        ("Tesla T4", "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "float64"),
        ("Some Future Card", "bfloat16"),
    ],
)
def test_peak_that_is_not_known_is_not_guessed(name, product):
    assert throughput.peak_flops_per_s(name, product) is None


@pytest.mark.parametrize(
    ("mixed_precision", "stored", "tf32", "product"),
    [
        ("bf16", torch.float32, False, "bfloat16"),
        ("fp16", torch.float32, True, "float16"),
        ("no", torch.float32, False, "float32"),
        ("no", torch.float32, True, "tf32"),
        ("no", torch.bfloat16, True, "bfloat16"),
    ],
)
def test_products_are_made_in_the_type_of_autocast_or_of_the_weights(mixed_precision, stored, tf32, product):
    model = model_of(LlamaConfig(**LLAMA)).to(stored)
    assert throughput.product_type(model, mixed_precision, tf32=tf32) == product


def test_cpu_has_tokens_per_s_and_no_mfu(chain):
    lines = (chain / "run" / "metrics.ndjson").read_text()
    assert '"tokens_per_s"' in lines
    assert '"mfu"' not in lines


def test_mfu_is_flops_over_peak_and_processes(monkeypatch):
    """One second, 1000 tokens of 2 GFLOP, a peak of 8 TFLOP/s: a quarter."""
    from accelerate import Accelerator

    meter = throughput.Meter(model_of(LlamaConfig(**LLAMA)), Accelerator(cpu=True), block_size=32)
    meter.flops_per_token, meter.peak = 2e9, 8e12
    meter.add(600)
    meter.add(400)
    monkeypatch.setattr(throughput.time, "monotonic", lambda: meter.since_s + 1.0)
    assert meter.rates() == {"tokens_per_s": pytest.approx(1000.0), "mfu": pytest.approx(0.25)}
