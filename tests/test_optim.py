"""Matrices decay; biases, norms and embeddings do not; every parameter that trains is updated once."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from codex_accel import optim
from codex_accel.schema import Optimizer

SIZES = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
}


def small(model_type: str, **options):
    config = AutoConfig.for_model(model_type, vocab_size=50, **SIZES[model_type], **options)
    return AutoModelForCausalLM.from_config(config)


def decaying(model, **options) -> set[str]:
    """Names of the parameters that decay, each under its first name."""
    options = {"decay_embeddings": False, **options}
    groups = optim.decay_groups(model, weight_decay=0.5, **options)
    ids = {id(p) for group in groups if group["weight_decay"] == 0.5 for p in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_gpt2_decays_its_four_matrices_a_layer():
    """All that is left of GPT-2 without embeddings, biases and norms; the tied head is the embedding."""
    names = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert decaying(small("gpt2")) == {f"transformer.h.0.{name}.weight" for name in names}


def test_embeddings_decay_only_when_told():
    model = small("gpt2")
    more = decaying(model, decay_embeddings=True) - decaying(model)
    assert more == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_head_of_its_own_decays_and_a_tied_one_does_not():
    untied = decaying(small("llama", tie_word_embeddings=False))
    assert "lm_head.weight" in untied
    assert untied - decaying(small("llama", tie_word_embeddings=True)) == {"lm_head.weight"}


def test_norms_and_biases_never_decay():
    model = small("llama", attention_bias=True, mlp_bias=True)
    found = decaying(model, decay_embeddings=True)
    assert not [name for name in found if "norm" in name or name.endswith("bias")]


@pytest.mark.parametrize("model_type", SIZES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_group_once(model_type, tied):
    model = small(model_type, tie_word_embeddings=tied)
    groups = optim.decay_groups(model, weight_decay=0.1, decay_embeddings=False)
    found = [id(p) for group in groups for p in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in model.parameters()}


def test_frozen_parameters_are_left_out():
    model = small("gpt2")
    model.transformer.requires_grad_(False)
    groups = optim.decay_groups(model, weight_decay=0.1, decay_embeddings=False)
    assert [p for group in groups for p in group["params"]] == []


def test_settings_reach_the_optimizer():
    settings = Optimizer(learning_rate=1e-2, betas=[0.8, 0.9], eps=1e-6, weight_decay=0.3)
    for group, decay in zip(optim.build(settings, small("gpt2")).param_groups, (0.3, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-2, (0.8, 0.9), 1e-6, decay)


def test_first_step_of_adamw_is_the_published_one():
    """Loshchilov and Hutter 2019, algorithm 2: w - lr (wd w + m / (sqrt(v) + eps)); m / sqrt(v) is sign(g) at first."""
    model = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in (model.weight, model.bias)]
    optimizer = optim.build(Optimizer(learning_rate=0.1, weight_decay=0.5), model)
    model(torch.tensor([[1.0, -2.0, 3.0]])).sum().backward()
    optimizer.step()
    sign = torch.tensor([1.0, -1.0, 1.0]).expand(2, 3)
    torch.testing.assert_close(model.weight, before[0] - 0.1 * (0.5 * before[0] + sign))
    torch.testing.assert_close(model.bias, before[1] - 0.1)
