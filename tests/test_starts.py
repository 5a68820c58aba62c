"""A run starts from random weights, a folder, an alias or another run, and what is recorded is what was used."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, metrics_of, run_script, train_argv
from safetensors.torch import load_file, save_file
from secret_grammar import secret_of

from codex_accel import added_tokens, config, files, manifest, run, run_folder, starts, tokenizer
from codex_accel import model as models
from codex_accel.errors import UserError
from codex_accel.train_schema import Data, Model, TrainConfig, Training

MINIMAL = ["output_dir=out", "data={dataset: d, block_size: 16}", "training.max_steps=1"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IM = '["<|im_start|>", "<|im_end|>"]'


def given(*overrides: str, path: Path | None = None) -> TrainConfig:
    pairs = [tuple(override.split("=", 1)) for override in (*MINIMAL, *overrides)]
    return config.load(TrainConfig, path=path, overrides=pairs)


def problems(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return "\n".join(caught.value.problems)


@pytest.fixture
def aliases(tmp_path):
    """A function that writes a file of aliases and gives the configuration that names the alias `mine` of it."""

    def write(text: str, *overrides: str) -> TrainConfig:
        (tmp_path / "models.yaml").write_text(text)
        return given("model.alias=mine", f"model.aliases={tmp_path}/models.yaml", *overrides)

    return write


# --- aliases ------------------------------------------------------------------------------------------------------


def test_an_alias_gives_what_its_entry_says(aliases):
    text = "mine: {path: here, dtype: bfloat16, attention: eager, quantization: 4bit, notes: of my own}\n"
    found = starts.resolve(aliases(text, "peft={r: 2}")).model
    assert (found.path, found.alias) == ("here", None)
    assert (found.dtype, found.attention, found.quantization) == ("bfloat16", "eager", "4bit")


def test_keys_that_are_given_win_over_the_alias(aliases):
    found = starts.resolve(aliases("mine: {path: here, dtype: bfloat16, attention: eager}\n", "model.dtype=float32"))
    assert (found.model.dtype, found.model.attention) == ("float32", "eager")


def test_a_default_that_is_given_wins_too_from_a_file(aliases, tmp_path):
    aliases("mine: {path: here, attention: eager}\n")
    path = tmp_path / "train.yaml"
    path.write_text(f"model:\n  alias: mine\n  aliases: {tmp_path}/models.yaml\n  attention: sdpa\n")
    assert starts.resolve(given(path=path)).model.attention == "sdpa"


def test_the_resolved_configuration_is_itself_one(aliases, tmp_path):
    resolved = starts.resolve(aliases("mine: {path: ~/here}\n"))
    (tmp_path / "saved.yaml").write_text(config.to_yaml(resolved.model_dump(mode="json")))
    again = config.load(TrainConfig, path=tmp_path / "saved.yaml")
    assert again.model_dump() == resolved.model_dump() == starts.resolve(again).model_dump()
    assert again.model.path == str(Path.home() / "here")


def test_a_value_of_an_alias_has_its_line_there_as_its_origin(aliases, tmp_path):
    resolved = starts.resolve(aliases("other: {path: x}\nmine:\n  path: here\n"))
    assert resolved.problem("model.path", "x").startswith(f"{tmp_path}/models.yaml:3: model.path: ")
    assert resolved.problem("training.max_steps", "x").startswith("command line: ")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("mine:\n  path: here\n  dtyp: float32\n", 3, "mine.dtyp: unknown key of a model. Did you mean 'dtype'?"),
        ("mine:\n  path: here\n  dtype: float33\n", 3, "model.dtype = 'float33': is not a choice. Did you mean"),
        ("mine:\n  path: here\nother:\n  dtype: float32\n", 3, "other: has no path."),
        ("mine:\n  path: 3\n", 1, "mine: has no path."),
        ("mine:\n  path: here\n  config: {}\n", 3, "mine.config: unknown key of a model."),
        ("mine: here\n", 1, "mine: must be a mapping with a path, not str."),
        ("mine: {path: a}\nmine: {path: b}\n", 2, "mine: duplicate key"),
        ("- mine\n", 1, "must be a mapping of names to models."),
        ("mine: {path: a\n", 2, "is not valid YAML"),
        ("mine: {path: a, quantization: 4bit}\n", 1, ""),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_told_with_its_line(aliases, tmp_path, text, line, words):
    told = problems(starts.resolve, aliases(text))
    assert words in told
    if words:
        assert told.startswith(f"{tmp_path}/models.yaml:{line}: ")
    else:  # the check of the whole configuration
        assert "model.quantization = 4bit needs an adapter" in told


def test_an_unknown_alias_is_told_with_a_near_one(aliases):
    told = problems(starts.resolve, aliases("mina: {path: a}\nother: {path: b}\n"))
    assert told.startswith("command line: model.alias: 'mine' is no model of '")
    assert "Did you mean 'mina'?" in told


def test_a_missing_file_of_aliases_is_told():
    told = problems(starts.resolve, given("model.alias=gpt2", "model.aliases=nowhere/models.yaml"))
    assert told.startswith("command line: model.aliases: 'nowhere/models.yaml' cannot be read")


def shipped() -> dict:
    return starts.aliases(given("model.alias=x", f"model.aliases={ROOT}/configs/models.yaml"))[0]


@pytest.mark.parametrize("alias", shipped())
def test_every_shipped_alias_resolves_and_says_what_to_copy_where(alias, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    entry = shipped()[alias]
    assert entry["path"] == f"models/{alias}"
    assert "license" in entry["notes"]
    told = problems(starts.find, starts.resolve(given(f"model.alias={alias}", "peft={r: 2}")))
    assert told.startswith("configs/models.yaml:")
    for words in ("is no folder", "config.json, *.safetensors and tokenizer.json", f"{tmp_path}/models/{alias}"):
        assert words in told


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (["config.json"], "has no config.json. Copy"),
        (["model-1.safetensors", "model-2.safetensors"], "has no *.safetensors (pickled weights, *.bin or *.pt,"),
        (["model-2.safetensors"], "lacks model-2.safetensors, named in model.safetensors.index.json. Copy there all 2"),
    ],
)  # fmt: skip
def test_a_missing_file_of_a_model_is_named_with_what_to_copy(tmp_path, lost, words):
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for name in {"config.json", "pytorch_model.bin", *weight_map.values()} - set(lost):
        (tmp_path / name).write_text("{}")
    (tmp_path / starts.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    told = problems(starts.find, given(f"model.path={tmp_path}"))
    assert f"model.path: '{tmp_path}' {words}" in told
    assert f"Looked for {tmp_path}." in told


def test_a_run_that_has_not_ended_is_told(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "is a run that has not ended. Name one of its checkpoints" in problems(
        starts.find, given(f"model.path={tmp_path}/run")
    )


def without_model(argv: list[str]) -> list[str]:
    return [argument for argument in argv if not argument.startswith("model.")]


@pytest.mark.parametrize("place", ["", "checkpoints/latest"])
def test_a_run_starts_from_the_weights_of_another(fork_server, chain, tmp_path, place):
    """Of a run its `final`. The learning rate is as good as zero, so the weights are still those of the start."""
    argv = without_model(train_argv(chain, tmp_path / "run", "training.max_steps=1", "optimizer.learning_rate=1e-30"))
    more = ["evaluation.every_steps=null", "optimizer.weight_decay=0"]
    job = fork_server.run("train", [*argv, *more, f"model.path={chain}/run/{place}"])
    assert job.codes == [0], job.output
    before, after = (load_file(folder / "final" / "model.safetensors") for folder in (chain / "run", tmp_path / "run"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    document = manifest.read(tmp_path / "run" / "final")
    assert [record["kind"] for record in document["parents"]] == [
        "dataset",
        "tokenizer",
        "checkpoint" if place else "model",
    ]
    assert document["facts"]["step"] == 1


# --- types and devices --------------------------------------------------------------------------------------------


def test_weights_of_bfloat16_are_saved_so_and_resume_exactly(fork_server, chain, tmp_path):
    def argv(name: str) -> list[str]:
        options = ["training.max_steps=6", "evaluation.every_steps=null", "evaluation.max_windows=8"]
        return train_argv(chain, tmp_path / name, "model.dtype=bfloat16", *options)

    for job in (
        fork_server.run("train", argv("unbroken")),
        fork_server.run("train", [*argv("broken"), "training.stop_at_step=5"]),
        fork_server.run("train", argv("broken")),
    ):
        assert job.codes in ([0], [75]), job.output
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "unbroken")
    digests = set()
    for folder in ("broken/final", "unbroken/final", "unbroken/checkpoints/latest"):
        weights = load_file(tmp_path / folder / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
        digests.add(files.sha256_file(tmp_path / folder / "model.safetensors"))
    assert json.loads((tmp_path / "broken" / "final" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (
        len({files.sha256_file(tmp_path / name / "final" / "model.safetensors") for name in ("broken", "unbroken")})
        == 1
    )


def test_weights_of_a_start_are_loaded_in_the_type_asked_for(chain):
    start = chain / "run" / "final"
    settings = given(f"model.path={start}", "model.dtype=bfloat16")
    built = models.build(settings, tokenizer.load(start), start=start)
    assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in models.load(start).parameters()} == {torch.float32}


@pytest.mark.parametrize("by_launcher", [False, True])
def test_fp16_does_not_go_with_weights_of_bfloat16(monkeypatch, by_launcher):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16" if by_launcher else "no")
    settings = given("model.config={model_type: gpt2}", "model.dtype=bfloat16")
    if not by_launcher:
        settings = given("model.config={model_type: gpt2}", "model.dtype=bfloat16", "training.mixed_precision=fp16")
    told = problems(starts.resolve, settings)
    assert told.startswith("command line: model.dtype: bfloat16, but mixed precision is fp16")


@pytest.mark.parametrize("precision", ["'no'", "bf16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_precisions_go_together(precision, dtype):
    settings = given("model.config={model_type: gpt2}", f"model.dtype={dtype}", f"training.mixed_precision={precision}")
    assert starts.resolve(settings) == settings


@pytest.mark.parametrize(
    ("key", "others"), [("model.config", "model_type: gpt2"), ("peft", "target_modules: [c_attn]")]
)
def test_a_secret_that_a_library_would_write_is_refused(key, others):
    _, secret = secret_of("github personal", random.Random(0))
    started = "model.path=here" if key == "peft" else "seed=1"
    told = problems(starts.resolve, given(started, f"{key}={{{others}, revision: {secret}}}"))
    assert told.startswith(f"command line: {key}: holds a secret")
    assert secret not in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_device_that_is_not_there_is_told(fork_server, chain, tmp_path):
    job = fork_server.run("train", train_argv(chain, tmp_path / "run", "training.device=cuda"))
    assert job.codes == [2], job.output
    assert "error: command line: training.device: cuda, but torch" in job.output


# --- new tokens ---------------------------------------------------------------------------------------------------


def extend(base: Path, out: Path, *options: str) -> tokenizer.Tokenizer:
    argv = [f"base={base}", f"output_dir={out}", f"special_tokens.additional={IM}", *options]
    assert run_script("train_tokenizer", *argv) == 0
    return tokenizer.load(out)


TEXTS = ["Hello  world, it's <|im_end|>\n\tx é 漢字", " born free", "</s><s>[EOS]<|endoftext|>", ""]


@pytest.mark.parametrize(
    ("name", "engine"),
    [("models/stories260K", "tokenizers"), ("tokenizers/gpt2", "tiktoken"), ("tokenizers/mistral_v1", "sentencepiece")],
)
def test_tokens_come_after_all_ids_of_a_foreign_base(shared, tmp_path, name, engine):
    base, extended = tokenizer.load(shared / name), extend(shared / name, tmp_path / "out")
    size = base.vocab_size
    assert {id_: name for name, id_ in extended.special_ids.items() if id_ >= size} == {
        size: "<|im_start|>", size + 1: "<|im_end|>"
    }  # fmt: skip
    assert extended.vocab_size == size + 2
    assert extended.encode(TEXTS) == base.encode(TEXTS)
    ids = base.encode(TEXTS[:2])
    assert [extended.decode(each) for each in ids] == [base.decode(each) for each in ids]
    assert (extended.bos_id, extended.eos_id, extended.unk_id) == (base.bos_id, base.eos_id, base.unk_id)
    assert added_tokens.num_new(base, extended) == 2
    document = manifest.read(tmp_path / "out")
    assert document["facts"]["engine"] == engine
    assert [record["kind"] for record in document["parents"]] == ["unverified"]
    assert manifest.problems_of(tmp_path / "out") == []


@pytest.mark.parametrize("type_", ["bpe", "unigram", "sentencepiece", "char"])
def test_tokens_come_after_all_ids_of_a_base_of_ours(tmp_path, type_):
    (tmp_path / "raw.txt").write_text("All human beings are born free and equal\n" * 5)
    source = f"sources=[{{path: {tmp_path}/raw.txt}}]"
    run_script("train_tokenizer", f"output_dir={tmp_path}/base", source, f"type={type_}", "vocab_size=320")
    base, extended = tokenizer.load(tmp_path / "base"), extend(tmp_path / "base", tmp_path / "out")
    assert list(extended.special_ids.items())[-2:] == [
        ("<|im_start|>", base.vocab_size), ("<|im_end|>", base.vocab_size + 1)
    ]  # fmt: skip
    assert extended.encode(TEXTS) == base.encode(TEXTS)
    [parent] = manifest.read(tmp_path / "out")["parents"]
    assert (parent["kind"], parent["path"]) == ("tokenizer", "../base")


def test_transformers_reads_an_extended_tokenizer_with_its_template(shared, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "chatml.jinja").write_text(CHATML)
    ours = extend(shared / "models" / "stories260K", tmp_path / "out", f"chat_template={tmp_path}/chatml.jinja")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = theirs.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)["input_ids"]
    assert [id_ for id_ in ids if id_ >= 512] == [512, 513, 512]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


def test_the_template_of_a_base_comes_along(shared, tmp_path):
    (tmp_path / "chatml.jinja").write_text(CHATML)
    extend(shared / "models" / "stories260K", tmp_path / "first", f"chat_template={tmp_path}/chatml.jinja")
    argv = [f"base={tmp_path}/first", f"output_dir={tmp_path}/second", "special_tokens.additional=[<|x|>]"]
    run_script("train_tokenizer", *argv)
    assert tokenizer.load(tmp_path / "second").chat_template == CHATML


def test_an_extension_is_made_once_and_another_base_or_template_is_told(shared, tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(shared / "models" / "stories260K", base)
    extend(base, out)
    extend(base, out)
    assert "nothing to do" in capsys.readouterr().out
    (tmp_path / "chatml.jinja").write_text(CHATML)
    assert "chat_template is another" in problems(extend, base, out, f"chat_template={tmp_path}/chatml.jinja")
    (base / "tokenizer_config.json").write_text("{}")
    assert "base is another" in problems(extend, base, out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["special_tokens.additional=['</s>']"], "'</s>' is a token of"),
        (["special_tokens.additional=[he]"], "'he' is a token of"),
        (["vocab_size=600"], "vocab_size cannot be changed in a base"),
        (["special_tokens.eos=<end>"], "special_tokens.eos cannot be changed in a base"),
        (["special_tokens.additional=[]"], "base alone changes nothing"),
        (["base=nowhere"], "base: 'nowhere' is no folder"),
        (["sources=[{path: x}]"], "give either sources to train on, or base"),
        (["chat_template=nowhere"], "chat_template: 'nowhere' cannot be read"),
        (["base=null"], "give either sources to train on, or base"),
    ],
)
def test_a_mistake_with_a_base_is_told_and_leaves_no_folder(shared, tmp_path, options, words):
    told = problems(extend, shared / "models" / "stories260K", tmp_path / "out", *options)
    assert words in told
    assert not (tmp_path / "out").exists()


def test_a_base_is_not_replaced_by_what_is_made_of_it(shared, tmp_path):
    shutil.copytree(shared / "models" / "stories260K", tmp_path / "base")
    extend(tmp_path / "base", tmp_path / "out")
    argv = [f"base={tmp_path}/out", "special_tokens.additional=[<|x|>]", f"output_dir={tmp_path}/out", "overwrite=true"]
    told = problems(lambda: run_script("train_tokenizer", *argv))
    assert (
        told == f"output_dir = '{tmp_path}/out': is read, or holds what is ('{tmp_path}/out'). Choose another folder."
    )


def test_a_template_that_is_none_is_told(shared, tmp_path):
    (tmp_path / "bad.jinja").write_text("{% for %}")
    told = problems(extend, shared / "models" / "stories260K", tmp_path / "out", f"chat_template={tmp_path}/bad.jinja")
    assert "bad.jinja:1: is not a chat template" in told


@pytest.mark.parametrize("change", ["normalizer", "token", "order", "vocabulary"])
def test_a_tokenizer_whose_old_ids_mean_other_text_is_no_extension(shared, tmp_path, change):
    base = shared / "models" / "stories260K"
    extend(base, tmp_path / "out")
    path = tmp_path / "out" / "tokenizer.json"
    settings = json.loads(path.read_text())
    if change == "normalizer":
        settings["normalizer"] = None
    elif change == "token":
        settings["added_tokens"][1]["lstrip"] = True
    elif change == "order":
        settings["model"]["vocab"] |= {"r": settings["model"]["vocab"]["t"], "t": settings["model"]["vocab"]["r"]}
    else:
        settings["model"]["vocab"]["zebra"] = 514
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"differs|not the same"):
        added_tokens.num_new(tokenizer.load(base), tokenizer.load(tmp_path / "out"))


def test_a_sentencepiece_model_with_another_piece_is_no_extension(shared):
    first, second = (
        tokenizer.load(shared / "tokenizers" / name) for name in ("mistral_v1", "sentencepiece_unigram_botchan.model")
    )
    with pytest.raises(ValueError, match="pieces or the normalizer differ"):
        added_tokens.num_new(first, second)


def test_a_tokenizer_that_transformers_has_extended_is_accepted(shared, tmp_path):
    """By `add_special_tokens` and `save_pretrained`, which write another form of the same tokenizer.json."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    theirs.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    theirs.save_pretrained(tmp_path)
    base = tokenizer.load(shared / "models" / "stories260K")
    assert added_tokens.num_new(base, tokenizer.load(tmp_path)) == 1


# --- new embeddings -----------------------------------------------------------------------------------------------


def start_config(path: Path, *, seed: int = 0, dtype: str = "float32") -> TrainConfig:
    model = Model(path=str(path), dtype=dtype)
    data, training = Data(dataset="data", block_size=16), Training(max_steps=1)
    return TrainConfig(output_dir="out", seed=seed, model=model, data=data, training=training)


@pytest.fixture(scope="module")
def extended(shared, tmp_path_factory):
    return extend(shared / "models" / "stories260K", tmp_path_factory.mktemp("extended") / "tokenizer")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_new_tokens_get_rows_and_old_rows_stay(shared, extended, capsys, dtype):
    start = shared / "models" / "stories260K"
    before = models.load(start, dtype=getattr(torch, dtype)).get_input_embeddings().weight
    built = models.build(start_config(start, dtype=dtype), extended, start=start)
    after = built.get_input_embeddings().weight
    assert "note    2 new tokens: embeddings resized from 512 to 514" in capsys.readouterr().out
    assert after.shape == (514, 64)
    assert torch.equal(after[:512], before)
    assert torch.allclose(after[512:].float(), before.float().mean(0), atol=1e-2)
    assert built.config.vocab_size == 514
    assert built.get_output_embeddings().weight is after


def test_new_rows_depend_on_the_seed_and_on_no_draw_before(shared, extended):
    start = shared / "models" / "stories260K"

    def rows(seed: int) -> torch.Tensor:
        torch.rand(7)
        return models.build(start_config(start, seed=seed), extended, start=start).get_input_embeddings().weight[512:]

    assert torch.equal(rows(0), rows(0))
    assert not torch.equal(rows(0), rows(1))


def test_an_untied_head_gets_rows_too(shared, extended, tmp_path):
    shutil.copytree(shared / "models" / "stories260K", tmp_path / "start")
    settings = json.loads((tmp_path / "start" / "config.json").read_text())
    (tmp_path / "start" / "config.json").write_text(json.dumps(settings | {"tie_word_embeddings": False}))
    weights = load_file(tmp_path / "start" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 2
    save_file(weights, tmp_path / "start" / "model.safetensors", metadata={"format": "pt"})
    built = models.build(start_config(tmp_path / "start"), extended, start=tmp_path / "start")
    head, embeddings = built.get_output_embeddings().weight, built.get_input_embeddings().weight
    assert head.shape == embeddings.shape == (514, 64)
    assert torch.equal(head[:512], embeddings[:512] * 2)
    assert not torch.equal(head[512:], embeddings[512:])


def test_rows_that_the_model_has_already_are_used(shared, extended, tmp_path, capsys):
    """Vocabularies that were padded to a multiple of 64, say."""
    start = shared / "models" / "stories260K"
    larger = models.load(start)
    larger.resize_token_embeddings(576)
    larger.save_pretrained(tmp_path)
    shutil.copy(start / "tokenizer.json", tmp_path)
    assert models.build(start_config(tmp_path), extended, start=tmp_path).config.vocab_size == 576
    assert "new tokens" not in capsys.readouterr().out


def test_more_ids_than_embeddings_without_a_tokenizer_beside_is_refused(shared, extended, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(shared / "models" / "stories260K" / name, tmp_path)
    with pytest.raises(UserError, match="has 512 embeddings, the dataset's tokenizer 514 ids"):
        models.build(start_config(tmp_path), extended, start=tmp_path)


def test_data_of_another_tokenizer_is_refused(tiny, shared):
    """It has 512 ids, as many as the model, but they mean other text."""
    start = shared / "models" / "stories260K"
    told = problems(lambda: run.require_fitting_tokenizer(start, tiny / "dataset", key="data.dataset"))
    assert f"data.dataset = '{tiny}/dataset': was made with the tokenizer in '{tiny}/tokenizer'" in told
    assert "differs), so its ids mean other text to the model" in told


def test_a_chat_is_learned_with_new_tokens_and_resumes_exactly(fork_server, shared, tmp_path, capsys):
    """stories260K, Dolly as messages, ChatML: a run that is killed and one that is not end in the same weights."""
    start = shared / "models" / "stories260K"
    (tmp_path / "chatml.jinja").write_text(CHATML)
    extend(start, tmp_path / "tokenizer", f"chat_template={tmp_path}/chatml.jinja")
    with open(tmp_path / "chat.jsonl", "w") as stream:
        for line in (shared / "instruct" / "dolly15k_part0.jsonl").read_text().splitlines()[:60]:
            record = json.loads(line)
            turns = [("user", record["instruction"]), ("assistant", record["response"])]
            stream.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    source = f"sources=[{{path: {tmp_path}/chat.jsonl, messages: messages}}]"
    run_script("prepare_data", f"output_dir={tmp_path}/data", f"tokenizer={tmp_path}/tokenizer", source)

    def argv(name: str) -> list[str]:
        argv = without_model(train_argv(tmp_path, tmp_path / name, f"data.dataset={tmp_path}/data"))
        data = ["data.block_size=128", "data.packing=best_fit", "data.validation_split=null"]
        return [*argv, *data, f"model.path={start}", "training.max_steps=8", "evaluation.every_steps=null"]

    killed = fork_server.start("train", argv("broken"))
    while not run_folder.steps_saved(tmp_path / "broken"):
        assert killed.alive(), killed.output
    killed.kill()
    assert killed.wait() == [-9]
    for job in [fork_server.run("train", argv(name)) for name in ("broken", "unbroken")]:
        assert job.codes == [0], job.output
        assert "note    2 new tokens: embeddings resized from 512 to 514" in job.output
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "unbroken")
    finals = [tmp_path / name / "final" for name in ("broken", "unbroken")]
    assert len({files.sha256_file(folder / "model.safetensors") for folder in finals}) == 1
    losses = [line["loss"] for line in metrics_of(tmp_path / "unbroken")]
    assert losses[-1] < losses[0] - 0.3
    assert json.loads((finals[0] / "config.json").read_text())["vocab_size"] == 514
    assert tokenizer.load(finals[0]).chat_template == CHATML
    capsys.readouterr()
    generate = ["--prompt", "Once", "--max-new-tokens", "8"]
    assert load_script("generate").main(["--checkpoint", str(tmp_path / "broken"), *generate]) == 0
    assert len(capsys.readouterr().out) > len("Once") + 1
