"""Matrices decay; biases, norms and embeddings do not; every parameter that trains is updated once, at its rate."""

import pytest
import torch
from conftest import train_argv
from test_resume import outcome
from test_run import config
from transformers import AutoConfig, AutoModelForCausalLM

from codex_accel import optim
from codex_accel.errors import UserError
from codex_accel.train_schema import Optimizer

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
    groups = optim.build(config(optimizer=settings), small("gpt2")).param_groups
    for group, decay in zip(groups, (0.3, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-2, (0.8, 0.9), 1e-6, decay)


def test_first_step_of_adamw_is_the_published_one():
    """Loshchilov and Hutter 2019, algorithm 2: w - lr (wd w + m / (sqrt(v) + eps)); m / sqrt(v) is sign(g) at first."""
    model = torch.nn.Linear(3, 2)
    before = [p.detach().clone() for p in (model.weight, model.bias)]
    optimizer = optim.build(config(optimizer=Optimizer(learning_rate=0.1, weight_decay=0.5)), model)
    model(torch.tensor([[1.0, -2.0, 3.0]])).sum().backward()
    optimizer.step()
    sign = torch.tensor([1.0, -1.0, 1.0]).expand(2, 3)
    torch.testing.assert_close(model.weight, before[0] - 0.1 * (0.5 * before[0] + sign))
    torch.testing.assert_close(model.bias, before[1] - 0.1)


def test_first_steps_of_sgd_are_the_documented_ones():
    """torch.optim.SGD, by hand: d = g + wd w; v = d at first, then momentum v + d; w = w - lr v."""
    model = torch.nn.Linear(3, 2)
    weight, bias = (p.detach().clone() for p in (model.weight, model.bias))
    settings = Optimizer(name="sgd", learning_rate=0.1, momentum=0.5, weight_decay=0.25)
    optimizer = optim.build(config(optimizer=settings), model)
    gradient, buffers = torch.tensor([[1.0, -2.0, 3.0]]).expand(2, 3), [torch.zeros(2, 3), torch.zeros(2)]
    for _ in range(3):
        optimizer.zero_grad()
        model(gradient[:1]).sum().backward()
        optimizer.step()
        buffers = [0.5 * buffers[0] + gradient + 0.25 * weight, 0.5 * buffers[1] + 1.0]
        weight, bias = weight - 0.1 * buffers[0], bias - 0.1 * buffers[1]
    torch.testing.assert_close(model.weight, weight)
    torch.testing.assert_close(model.bias, bias)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_one_kernel_updates_all(name):
    optimizer = optim.build(config(optimizer=Optimizer(name=name)), small("gpt2"))
    assert all(group["fused"] for group in optimizer.param_groups)


def test_parameters_without_a_fused_kernel_are_updated_all_the_same():
    """A type that the fused kernel refuses at the first step."""
    parameter = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))
    model = torch.nn.Module()
    model.register_parameter("weight", parameter)
    optimizer = optim.build(config(optimizer=Optimizer(name="sgd", learning_rate=0.5, weight_decay=0.0)), model)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(parameter, torch.full_like(parameter, 0.5))


def test_keys_of_another_optimizer_are_told():
    def problems(**settings) -> list[str]:
        with pytest.raises(UserError) as caught:
            optim.require(config(optimizer=Optimizer(**settings)))
        return [problem.partition("optimizer.")[2] for problem in caught.value.problems]

    assert problems(name="sgd", betas=[0.9, 0.99], eps=1e-6, momentum=0.9) == [
        "betas: [0.9, 0.99] is a key of adamw, not of sgd. Remove it.",
        "eps: 1e-06 is a key of adamw, not of sgd. Remove it.",
    ]
    assert problems(momentum=0.9) == ["momentum: 0.9 is a key of sgd, not of adamw. Remove it."]
    assert problems(options={"rho": 1}) == ["options.rho: unknown key. It takes no settings."]
    saved = config(optimizer=Optimizer(name="sgd")).model_dump()["optimizer"]  # every key, as config.yaml has them
    assert optim.require(config(optimizer=Optimizer(**saved)))


# --- rates by name --------------------------------------------------------------------------------------------------


def scales_of(model, rate_scales) -> dict[str, float]:
    """Factor on the learning rate of each parameter, by name."""
    optimizer = optim.build(config(optimizer=Optimizer(rate_scales=rate_scales)), model)
    found = {id(p): group["rate_scale"] for group in optimizer.param_groups for p in group["params"]}
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


def test_the_first_pattern_that_matches_gives_the_rate():
    found = scales_of(small("gpt2"), {"*.wte.*": 0.0, "*.h.0.*.bias": 2.0, "*.h.0.*": 0.5})
    for name, scale in found.items():
        expected = 0.0 if ".wte." in name else 1.0 if ".h." not in name else 2.0 if name.endswith("bias") else 0.5
        assert scale == expected, name
    assert set(found.values()) == {0.0, 0.5, 1.0, 2.0}


def test_rates_do_not_change_what_decays():
    model = small("gpt2")
    plain = decaying(model)
    assert decaying(model, rate_scales={"*.c_attn.*": 0.5, "*wte*": 0.1}) == plain
    groups = optim.decay_groups(model, weight_decay=0.5, decay_embeddings=False, rate_scales={"*.c_attn.*": 0.5})
    assert [(group["weight_decay"], group["rate_scale"]) for group in groups] == [
        (0.5, 0.5), (0.5, 1.0), (0.0, 1.0), (0.0, 0.5)
    ]  # fmt: skip


def test_a_pattern_without_effect_is_told():
    model = small("gpt2")
    with pytest.raises(
        UserError, match=r"rate_scales\.\*embed\*: matches no parameter that trains\. The nearest names: "
    ):
        scales_of(model, {"*embed*": 0.5})
    with pytest.raises(UserError, match=r"transformer\.wte\.weight"):
        scales_of(model, {"transformer.wpe_.weight": 0.5})
    with pytest.raises(
        UserError, match=r"\*\.wte\.\*: an earlier pattern matches all .* such as transformer\.wte\.weight\."
    ):
        scales_of(model, {"*": 0.5, "*.wte.*": 0.1})
    model.transformer.wte.requires_grad_(False)
    with pytest.raises(UserError, match="matches no parameter that trains"):
        scales_of(model, {"*.wte.*": 0.5})


# --- in a run -------------------------------------------------------------------------------------------------------


def test_a_resumed_run_with_momentum_and_rates_ends_in_the_same_weights(fork_server, tiny, tmp_path):
    settings = "optimizer={name: sgd, learning_rate: 0.1, momentum: 0.9, rate_scales: {'*.wpe.*': 0.0, '*.h.0.*': 0.5}}"
    for name, stops in (("unbroken", []), ("stopped", [75, 0])):
        argv = [*train_argv(tiny, tmp_path / name, "training.max_steps=9", "evaluation.every_steps=null"), settings]
        for code in stops or [0]:
            job = fork_server.run("train", [*argv, "training.stop_at_step=4"] if code else argv)
            assert job.codes == [code], job.output
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "unbroken")
    folder = tmp_path / "unbroken" / "checkpoints"
    early, late = (AutoModelForCausalLM.from_pretrained(folder / f"step-00000000{n}") for n in (6, 9))
    assert torch.equal(early.transformer.wpe.weight, late.transformer.wpe.weight)
    assert not torch.equal(early.transformer.wte.weight, late.transformer.wte.weight)
