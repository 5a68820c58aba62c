"""A model is what its configuration says, and documents of one block are isolated in fact."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from codex_accel import model as models
from codex_accel import probes, tokenizer
from codex_accel.errors import UserError
from codex_accel.packing import Batch
from codex_accel.train_schema import Data, Model, TrainConfig, Training

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32}
QWEN3 = {**LLAMA, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16}
OPT = {
    "model_type": "opt",
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "word_embed_proj_dim": 32,
    "max_position_embeddings": 32,
}
BLOOM = {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2}
MAMBA = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
LFM2 = {**LLAMA, "model_type": "lfm2", "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}


def config(architecture=None, *, path=None, block_size=16, seed=0, attention="sdpa") -> TrainConfig:
    return TrainConfig(
        output_dir="out",
        seed=seed,
        model=Model(config=architecture, path=None if path is None else str(path), attention=attention),
        data=Data(dataset="data", block_size=block_size),
        training=Training(max_steps=1),
    )


@pytest.fixture(scope="module")
def loaded(tiny):
    return tokenizer.load(tiny / "tokenizer")


@pytest.fixture
def saved(loaded, tmp_path):
    """A small Llama as a from_pretrained folder."""
    models.build(config(LLAMA), loaded, start=None).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def problem(architecture, loaded, **options) -> str:
    with pytest.raises(UserError) as caught:
        models.build(config(architecture, **options), loaded, start=options.get("path"))
    assert all("\n" not in line for line in caught.value.problems)
    return "\n".join(caught.value.problems)


# --- building -----------------------------------------------------------------------------------------------------


def test_vocabulary_and_special_ids_come_from_the_tokenizer(loaded):
    built = models.build(config(LLAMA), loaded, start=None)
    assert built.config.vocab_size == built.get_input_embeddings().num_embeddings == 512
    assert (built.config.pad_token_id, built.config.bos_token_id, built.config.eos_token_id) == (0, 1, 2)
    assert (built.generation_config.bos_token_id, built.generation_config.eos_token_id) == (1, 2)


def test_there_is_no_cache_and_weights_are_float32(loaded):
    built = models.build(config(LLAMA), loaded, start=None)
    assert built.config.use_cache is False
    assert {parameter.dtype for parameter in built.parameters()} == {torch.float32}


def test_weights_depend_on_the_seed_and_on_no_draw_before(loaded):
    first = models.build(config(LLAMA), loaded, start=None).state_dict()
    torch.manual_seed(99)
    torch.rand(7)
    same, other = (models.build(config(LLAMA, seed=seed), loaded, start=None).state_dict() for seed in (0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_unknown_keys_are_all_told_with_a_near_one(loaded):
    told = problem({**LLAMA, "hiden_size": 3, "num_atention_heads": 2}, loaded).splitlines()
    assert len(told) == 2
    assert "model.config.hiden_size: unknown key of a llama configuration. Did you mean 'hidden_size'?" in told[0]
    assert "Did you mean 'num_attention_heads'?" in told[1]


def test_unknown_key_is_told_with_its_origin(loaded, tmp_path):
    from codex_accel import config as configuration

    path = tmp_path / "train.yaml"
    path.write_text(
        "output_dir: out\ndata: {dataset: d, block_size: 16}\ntraining: {max_steps: 1}\n"
        "model:\n  config:\n    model_type: gpt2\n    n_layers: 2\n"
    )
    loaded_config = configuration.load(TrainConfig, path=path)
    with pytest.raises(UserError, match=r"train\.yaml:7: model\.config\.n_layers: .*Did you mean 'n_layer'\?"):
        models.build(loaded_config, loaded, start=None)


def test_unknown_model_type_is_told_with_a_near_one(loaded):
    assert "model.config.model_type: unknown model type 'lama'. Did you mean 'llama'?" in problem(
        {"model_type": "lama"}, loaded
    )


@pytest.mark.parametrize("key", models.SET_BY_US)
def test_key_that_the_toolkit_sets_is_refused(loaded, key):
    assert f"model.config.{key}: is set from the tokenizer" in problem({**LLAMA, key: 1}, loaded)


@pytest.mark.parametrize(
    "architecture",
    [
        {**LLAMA, "hidden_size": "32"},
        {**LLAMA, "num_hidden_layers": 2.5},
        {**LLAMA, "num_attention_heads": 5},
        {**GPT2, "n_head": 5},
        {**GPT2, "resid_pdrop": 3.0},
        {**LLAMA, "hidden_act": "sillu"},
        {"model_type": "clip"},
        MAMBA,  # has no sdpa attention
    ],
    ids=["text", "fraction", "heads", "gpt2 heads", "dropout", "activation", "no language model", "sdpa"],
)
def test_value_that_does_not_fit_is_one_line(loaded, architecture):
    assert "model.config" in problem(architecture, loaded)


def test_block_beyond_the_positions_is_refused(loaded):
    assert "data.block_size: 33 is more than the model's max_position_embeddings = 32" in problem(
        GPT2, loaded, block_size=33
    )


def test_parameters_are_counted_once():
    """By hand, tied: embedding 512 x 32; a layer: attention 4 x 32 x 32, mlp 3 x 32 x 48, norms 2 x 32; one 32."""
    built = AutoModelForCausalLM.from_config(
        models.AutoConfig.for_model(**LLAMA, vocab_size=512, tie_word_embeddings=True)
    )
    num = 512 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert models.count_parameters(built) == {"num_parameters": num, "num_trainable_parameters": num}
    built.model.embed_tokens.requires_grad_(False)
    assert models.count_parameters(built)["num_trainable_parameters"] == num - 512 * 32


# --- loading ------------------------------------------------------------------------------------------------------


def test_saved_model_loads_with_its_weights(saved, loaded):
    before, after = (
        models.build(config(LLAMA), loaded, start=None),
        models.build(config(path=saved), loaded, start=Path(saved)),
    )
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_weights_in_half_precision_are_loaded_as_float32(saved):
    models.load(saved).bfloat16().save_pretrained(saved)
    assert {parameter.dtype for parameter in models.load(saved).parameters()} == {torch.float32}


@pytest.mark.security
def test_pickled_weights_are_not_loaded(saved):
    torch.save(models.load(saved).state_dict(), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(UserError, match="Pickled weights are not loaded"):
        models.load(saved)


@pytest.mark.security
def test_pickled_weights_beside_safe_ones_are_not_read(saved):
    (saved / "pytorch_model.bin").write_bytes(b"not a pickle")
    models.load(saved)


@pytest.mark.security
def test_code_of_a_model_folder_does_not_run(saved, tmp_path):
    text = (saved / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "mine"')
    text = text.replace("{", '{"auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"},', 1)
    (saved / "config.json").write_text(text)
    (saved / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        models.load(saved)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched", "damaged"])
def test_weights_that_do_not_fit_are_refused(saved, change):
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights["model.extra"] = torch.zeros(2)
    else:
        weights[name] = torch.zeros(3, 3)
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    if change == "damaged":
        (saved / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match=r"do not fit|cannot be loaded"):
        models.load(saved)


def test_folder_without_a_configuration_is_told(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint = '.*': has no config\.json"):
        models.load(tmp_path)


# --- isolation ----------------------------------------------------------------------------------------------------


def two_documents(size: int = 16) -> Batch:
    """A block of two documents, the second the longer one."""
    half = size // 2
    positions = np.concatenate([np.arange(half), np.arange(size - half)])[None]
    return Batch(np.arange(size)[None] % 512, np.full((1, size), -100), positions)


@pytest.mark.parametrize("architecture", [LLAMA, GPT2, QWEN3], ids=lambda a: a["model_type"])
def test_architecture_that_isolates_is_accepted(loaded, architecture):
    settings = config(architecture)
    probes.require_isolation(models.build(settings, loaded, start=None), settings, two_documents())


@pytest.mark.parametrize("architecture", [OPT, BLOOM, MAMBA, LFM2], ids=lambda a: a["model_type"])
def test_architecture_that_cannot_isolate_is_refused(loaded, architecture):
    """OPT and Bloom pass no positions to the mask, Mamba has a state, and LFM2's convolutions reach two tokens back."""
    settings = config(architecture, attention="sdpa" if architecture in (OPT, LFM2) else "eager")
    with pytest.raises(UserError, match=r"data.isolate_documents: this architecture cannot keep the documents"):
        probes.require_isolation(models.build(settings, loaded, start=None), settings, two_documents())


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01])
def test_small_weights_do_not_hide_a_leak(loaded, scale):
    settings = config({**OPT, "init_std": 0.02 * scale})
    with pytest.raises(UserError, match="cannot keep the documents"):
        probes.require_isolation(models.build(settings, loaded, start=None), settings, two_documents())


@pytest.mark.parametrize("block_size", [2, 3, 16, 1024])
def test_isolation_is_tried_at_any_block_size(loaded, block_size):
    built = models.build(config(LLAMA), loaded, start=None)
    probes.require_isolation(built, config(LLAMA, block_size=block_size), two_documents(block_size))


def test_trying_isolation_leaves_the_mode_as_it_was(loaded):
    built = models.build(config(GPT2), loaded, start=None)
    for training in (True, False):
        probes.require_isolation(built.train(training), config(GPT2), two_documents())
        assert built.training is training
