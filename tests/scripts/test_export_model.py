"""scripts/export_model.py: a plain folder whose logits are those of the adapted model, and a chain that verifies."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from conftest import metrics_of, train_argv
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from codex_accel import files, manifest


@pytest.fixture(scope="module")
def lora(chain, fork_server, tmp_path_factory) -> Path:
    """A run that trains an adapter on `chain`'s run."""
    run_dir = tmp_path_factory.mktemp("lora") / "lora"
    argv = [a for a in train_argv(chain, run_dir) if not a.startswith("model.config=")]
    settings = ["peft={r: 4, target_modules: [c_attn, c_fc], use_dora: true}", "training.max_steps=6"]
    job = fork_server.run("train", [*argv, f"model.path={chain}/run", *settings])
    assert job.codes == [0], job.output
    return run_dir


def export(fork_server, output_dir: Path, *argv: object) -> str:
    job = fork_server.run("export_model", [*map(str, argv), f"output_dir={output_dir}"])
    assert job.codes == [0], job.output
    return job.output


@pytest.fixture(scope="module")
def exported(lora, fork_server, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "python-model"
    export(fork_server, folder, f"checkpoint={lora}")
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Of every id of the vocabulary, in rows of 32 (16, 32, V)."""
    return model.eval()(input_ids=torch.arange(512).reshape(16, 32)).logits.float()


def test_the_logits_are_those_of_the_adapted_model(exported, lora, chain):
    """The reference is peft's own, of base and adapter side by side; both loaded without this toolkit."""
    base = AutoModelForCausalLM.from_pretrained(chain / "run" / "final")
    before = logits(base)
    adapted = logits(peft.PeftModel.from_pretrained(base, lora / "final"))
    plain = logits(AutoModelForCausalLM.from_pretrained(exported))
    assert float((plain - adapted).abs().max() / adapted.abs().max()) < 1e-5
    assert float((plain - before).abs().max() / before.abs().max()) > 1e-2


def test_the_folder_is_a_plain_one(exported, chain):
    assert {path.name for path in exported.iterdir()} == {
        "README.md", "SHA256SUMS", "config.json", "config.yaml", "generation_config.json", "manifest.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert AutoTokenizer.from_pretrained(exported).vocab_size == 512
    generation = GenerationConfig.from_pretrained(exported)
    assert (generation.pad_token_id, generation.bos_token_id, generation.eos_token_id) == (0, 1, 2)
    assert "adapter" not in (exported / "config.json").read_text()


def num_parameters(chain: Path) -> int:
    """Of the base, as its run counted them before there was an adapter."""
    return manifest.read(chain / "run" / "final")["facts"]["num_parameters"]


def test_the_chain_verifies_back_to_the_raw_files(exported, lora, chain, fork_server):
    job = fork_server.run("verify", [f"path={exported}", "recursive=true"])
    assert job.codes == [0], job.output
    document = manifest.read(exported)
    assert document["kind"] == "model"
    assert document["facts"] == {"num_parameters": num_parameters(chain), "dtype": "float32", "num_merged": 1}
    [parent] = document["parents"]
    assert parent["manifest_digest"] == files.sha256_file(lora / "final" / manifest.MANIFEST)


def test_the_card_holds_what_the_manifests_hold(exported, lora, chain):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"# python-model\n\nA gpt2 model with {num_parameters(chain):,} parameters in float32" in card
    for kind, folder in (
        ("adapter", lora / "final"),
        ("base", chain / "run" / "final"),
        ("dataset", chain / "dataset"),
    ):
        assert f"| {kind} | " in card
        assert manifest.read(folder)["content_digest"] in card
    assert "- lora/final: 6 steps\n" in card
    assert f"validation at step 6: loss {metrics_of(lora)[-1]['loss']:.4f}, perplexity" in card
    splits = manifest.read(chain / "dataset")["facts"]["splits"]
    assert f"dataset, train: {splits['train']['num_records']} records, {splits['train']['num_tokens']:,} tokens" in card
    assert "Not stated." in card
    assert str(chain) not in card


def test_equal_adapters_are_exported_to_equal_content(exported, lora, fork_server, tmp_path):
    """From the last checkpoint, which holds the adapter that `final` holds."""
    export(fork_server, tmp_path / "e", f"checkpoint={lora}/checkpoints/step-000000006")
    assert manifest.read(tmp_path / "e")["content_digest"] == manifest.read(exported)["content_digest"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_type_is_the_rounded_sum(exported, lora, fork_server, tmp_path, dtype):
    export(fork_server, tmp_path / "e", f"checkpoint={lora}", f"dtype={dtype}")
    wanted, found = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (exported, tmp_path / "e"))
    for name, tensor in wanted.items():
        assert found[name].dtype == getattr(torch, dtype)
        assert torch.equal(found[name], tensor.to(getattr(torch, dtype))), name
    assert json.loads((tmp_path / "e" / "config.json").read_text())["dtype"] == dtype


def test_a_plain_model_is_exported_too(chain, fork_server, tmp_path):
    export(fork_server, tmp_path / "e", f"checkpoint={chain}/run")
    first, second = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (chain / "run" / "final", tmp_path / "e")
    )
    assert torch.equal(logits(first), logits(second))


def test_the_card_names_what_training_started_from(exported, lora, chain, fork_server, tmp_path):
    """Of an export of an export as well."""
    argv = [a for a in train_argv(chain, tmp_path / "full") if not a.startswith("model.config=")]
    job = fork_server.run("train", [*argv, f"model.path={exported}", "training.max_steps=1"])
    assert job.codes == [0], job.output
    export(fork_server, tmp_path / "first", f"checkpoint={tmp_path}/full")
    export(fork_server, tmp_path / "second", f"checkpoint={tmp_path}/first", "dtype=bfloat16")
    for folder, starts in (("first", 3), ("second", 4)):
        card = (tmp_path / folder / "README.md").read_text()
        assert card.count("| start | ") == starts  # full/final of the second, the exported, its adapter, its base
        for name in (exported, lora / "final", chain / "run" / "final"):
            assert manifest.read(name)["content_digest"] in card
        assert "- full/final: 1 steps\n" in card
        assert "- lora/final: 6 steps\n" in card
        assert card.count("| dataset | ") == 1
        assert card.count(manifest.read(chain / "tokenizer")["content_digest"]) == 0


def test_weights_too_large_for_float16_are_refused(chain, fork_server, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(chain / "run" / "final")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = 1e5
    model.save_pretrained(tmp_path / "large")
    argv = [f"checkpoint={tmp_path}/large", f"output_dir={tmp_path}/e"]
    job = fork_server.run("export_model", [*argv, "dtype=float16"])
    assert job.codes == [2]
    assert "c_fc.weight holds values that are not finite in float16. Take bfloat16." in job.output
    export(fork_server, tmp_path / "e", *argv, "dtype=bfloat16")


@pytest.mark.parametrize(
    ("settings", "kept", "says"),
    [
        ({"eos_token_id": [2, 5], "do_sample": True}, {"eos_token_id": [2, 5], "do_sample": True}, ""),
        ({"eos_token_id": [7, 5]}, {"eos_token_id": 2}, ""),
        ({"do_sample": False}, {"eos_token_id": 2}, "generation_config.json holds special ids alone"),
    ],
)  # fmt: skip
def test_the_generation_settings_of_a_base_stay_where_they_can(chain, fork_server, tmp_path, settings, kept, says):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(chain / "run" / "final" / name, base)
    temperature = {"temperature": 0.6} if "do_sample" in settings else {}
    (base / "generation_config.json").write_text(json.dumps(settings | temperature))
    assert says in export(fork_server, tmp_path / "e", f"checkpoint={base}")
    written = json.loads((tmp_path / "e" / "generation_config.json").read_text())
    assert {name: written[name] for name in kept} == kept
    assert ("temperature" in written) == ("do_sample" in kept)


def test_what_is_read_is_not_replaced(exported, chain, fork_server, tmp_path):
    shutil.copytree(exported, tmp_path / "e")
    job = fork_server.run("export_model", [f"checkpoint={tmp_path}/e", f"output_dir={tmp_path}/e", "overwrite=true"])
    assert job.codes == [2]
    assert f"output_dir = '{tmp_path}/e': is read, or holds what is" in job.output
    assert manifest.problems_of(tmp_path / "e") == []


def test_a_base_for_what_is_no_adapter_is_refused(exported, chain, fork_server, tmp_path):
    job = fork_server.run("export_model", [f"checkpoint={exported}", f"base={chain}/run", f"output_dir={tmp_path}/e"])
    assert job.codes == [2]
    assert f"command line: base: '{exported}' is no adapter, so it has no base. Remove it." in job.output


def test_a_moved_base_is_given(exported, lora, chain, fork_server, tmp_path):
    shutil.copytree(lora / "final", tmp_path / "over" / "there" / "adapter")
    shutil.copytree(chain / "run" / "final", tmp_path / "base")
    argv = [f"checkpoint={tmp_path}/over/there/adapter", f"output_dir={tmp_path}/e"]
    job = fork_server.run("export_model", argv)
    assert job.codes == [2]
    assert "its base is no longer at" in job.output
    assert "--base FOLDER" in job.output
    export(fork_server, tmp_path / "e", *argv, f"base={tmp_path}/base")
    assert manifest.read(tmp_path / "e")["content_digest"] == manifest.read(exported)["content_digest"]
    assert [Path(p["path"]).name for p in manifest.read(tmp_path / "e")["parents"]] == ["adapter", "base"]


def test_a_foreign_adapter_and_its_base_are_both_recorded(chain, fork_server, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(chain / "run" / "final")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_fc"], fan_in_fan_out=True)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "foreign")
    export(fork_server, tmp_path / "e", f"checkpoint={tmp_path}/foreign")
    parents = manifest.read(tmp_path / "e")["parents"]
    assert [parent["kind"] for parent in parents] == ["unverified", "model"]
    assert (tmp_path / "e" / "tokenizer.json").exists()


def test_what_stands_is_not_replaced_unasked(exported, lora, fork_server):
    job = fork_server.run("export_model", [f"checkpoint={lora}", f"output_dir={exported}"])
    assert job.codes == [2]
    assert "exists. Choose another folder, or say overwrite=true" in job.output


def test_a_damaged_adapter_is_refused(lora, fork_server, tmp_path):
    shutil.copytree(lora / "final", tmp_path / "final")
    with open(tmp_path / "final" / "adapter_model.safetensors", "ab") as stream:
        stream.write(b"x")
    job = fork_server.run("export_model", [f"checkpoint={tmp_path}/final", f"output_dir={tmp_path}/e"])
    assert job.codes == [2]
    assert "adapter_model.safetensors: has" in job.output
    assert not (tmp_path / "e").exists()
