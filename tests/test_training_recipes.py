"""The recipes for people's own data, each from its raw files to a generated text, with a tiny model and few steps.

The files of configs/ are run as they stand, in a folder that holds real data where they look for it; the command line
changes sizes and step counts alone. The base model is stories260K, so numbers of ids and losses mean something.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, ForkServer, metrics_of

from codex_accel import manifest, tokenizer
from codex_accel.tokens import Document, TokenStore

FEW = (
    "training={micro_batch_size: 2, global_batch_size: 4, max_epochs: null, max_steps: 8}",
    "data.block_size=256",
    "log.every_steps=1",
    "evaluation.every_steps=4",
    "checkpoint.every_steps=4",
)


class Place:
    """A folder from which a user works: recipes, data, base model, and the runs that they make."""

    def __init__(self, server: ForkServer, folder: Path, shared: Path):
        self.server, self.folder, self.shared = server, folder, shared
        for name in ("configs", "scripts"):
            (folder / name).symlink_to(ROOT / name)
        shutil.copytree(shared / "models" / "stories260K", folder / "models" / "base")

    def run(self, recipe: str, stage: str, *overrides: str) -> str:
        """Run a stage by its recipe; returns what it printed."""
        return self.do(stage, "--config", f"configs/{recipe}/{stage}.yaml", *overrides)

    def do(self, stage: str, *argv: str) -> str:
        job = self.server.run(stage, list(argv), cwd=self.folder)
        assert job.codes == [0], job.output
        return job.output

    def path(self, name: str) -> Path:
        return self.folder / "runs" / name

    def losses(self, run: str, split: str) -> list[float]:
        return [line["loss"] for line in metrics_of(self.path(run)) if line["split"] == split]

    def loss_of(self, report: str) -> float:
        return json.loads((self.path(report) / "report.json").read_text())["metrics"]["loss"]

    def documents(self, dataset: str, split: str = "train") -> list[Document]:
        return list(TokenStore(self.path(dataset), split))

    def texts(self, folder: str, document: Document) -> tuple[str, str]:
        """The text of what is no target, and of what is one, as a tokenizer of that folder reads them."""
        loaded = tokenizer.load(self.folder / folder)
        is_target = document.is_target()
        rest, targets = document.input_ids[~is_target], document.input_ids[is_target]
        return loaded.decode(rest.tolist()), loaded.decode(targets.tolist())


def place(fork_server, shared, folder: Path) -> Place:
    return Place(fork_server, folder, shared)


def require_whole_chain(there: Place, report: str, *raw: str) -> None:
    """The report and all that it came from verify, back to these raw files."""
    told = there.do("verify", f"runs/{report}", "--recursive")
    assert "all ticks" in told
    for name in raw:
        assert name in told


# --- pretrain -------------------------------------------------------------------------------------------------------

SHAPE = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2"


@pytest.fixture(scope="module")
def pretrained(fork_server, shared, tmp_path_factory) -> Place:
    """Forty files of 12,000 characters of Shakespeare, and one of them twice."""
    there = place(fork_server, shared, tmp_path_factory.mktemp("pretrain"))
    text = (shared / "text" / "tinyshakespeare.txt").read_text()
    folder = there.folder / "data" / "text"
    folder.mkdir(parents=True)
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(text[12_000 * number :][:12_000])
    shutil.copyfile(folder / "07.txt", folder / "again.txt")
    there.run("pretrain", "train_tokenizer", "vocab_size=512")
    there.run("pretrain", "prepare_data", "split.ratios={train: 0.8, validation: 0.1, test: 0.1}")
    batch = ("micro_batch_size=4", "global_batch_size=8", "max_epochs=null", "max_steps=60")
    there.run(
        "pretrain",
        "train",
        f"model.config={{model_type: llama, {SHAPE}, max_position_embeddings: 64, tie_word_embeddings: true}}",
        "data.block_size=64",
        *(f"training.{setting}" for setting in batch),
        "evaluation={every_steps: 30, max_windows: 64}",
        "checkpoint.every_steps=30",
        "log.every_steps=1",
    )
    there.run("pretrain", "evaluate", "context_length=64", "stride=32")
    return there


def test_pretraining_learns_from_plain_text_files(pretrained):
    """From the loss of a guess, ln 512 = 6.24, by 0.3 at least, and on text that it has not seen."""
    losses = pretrained.losses("pretrain/train", "train")
    assert losses[0] == pytest.approx(np.log(512), abs=0.1)
    validation = pretrained.losses("pretrain/train", "validation")
    assert len(validation) == 2
    assert validation[1] < validation[0] < losses[0]
    assert pretrained.loss_of("pretrain/test") < losses[0] - 0.3


def test_pretraining_feeds_every_token_once_an_epoch_and_a_double_file_once(pretrained):
    splits = manifest.read(pretrained.path("pretrain/dataset"))["facts"]["splits"]
    assert sum(split["num_records"] for split in splits.values()) == 40
    plan = json.loads((pretrained.path("pretrain/train") / "run.json").read_text())["blocks"]
    assert plan["num_tokens"] == splits["train"]["num_tokens"]
    assert plan["num_blocks"] == -(-(plan["num_tokens"] - 1) // 64)


def test_pretraining_holds_its_rate_and_then_lowers_it_to_nothing(pretrained):
    """The warm-up of 2 % is one of these 60 steps, the decay the last 12."""
    rates = [
        line["learning_rate"] for line in metrics_of(pretrained.path("pretrain/train")) if line["split"] == "train"
    ]
    assert rates[1:48] == [1e-3] * 47
    assert rates[48:] == sorted(set(rates[48:]), reverse=True)
    assert rates[-1] < 1e-4


def test_a_pretrained_model_generates(pretrained):
    said = pretrained.do("generate", "checkpoint=runs/pretrain/train", "prompt=KING", "max_new_tokens=8")
    assert re.fullmatch(r"KING.+\n", said, re.DOTALL)


def test_the_report_of_a_pretrained_model_leads_back_to_the_text(pretrained):
    require_whole_chain(pretrained, "pretrain/test", "runs/pretrain/tokenizer", "00.txt", "39.txt")
    report = json.loads((pretrained.path("pretrain/test") / "report.json").read_text())
    assert set(report["metrics"]["compression"]) == {"zlib -9", "lzma"}


# --- sft ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(fork_server, shared, tmp_path_factory) -> Place:
    """The 175 seed tasks of Self-Instruct."""
    there = place(fork_server, shared, tmp_path_factory.mktemp("sft"))
    folder = there.folder / "data" / "instruct"
    folder.mkdir(parents=True)
    shutil.copy(shared / "instruct" / "self_instruct_seed_prompt_completion.jsonl", folder)
    there.run("sft", "prepare_data", "split.ratios={train: 0.8, validation: 0.1, test: 0.1}")
    there.run("sft", "train", *FEW)
    there.run("sft", "evaluate", "context_length=256")
    there.do(
        "evaluate", "checkpoint=models/base", "dataset=runs/sft/dataset", "output_dir=runs/base", "context_length=256"
    )
    return there


def test_completions_alone_are_targets(pretrained, tuned):
    """Each with the end of its document, whatever stands in the prompt."""
    path = tuned.folder / "data" / "instruct" / "self_instruct_seed_prompt_completion.jsonl"
    records = {record["prompt"]: record["completion"] for record in map(json.loads, path.read_text().splitlines())}
    documents = [each for split in ("train", "validation", "test") for each in tuned.documents("sft/dataset", split)]
    assert len(documents) == len(records)
    for document in documents:
        prompt, completion = tuned.texts("models/base", document)
        assert records[prompt.strip()].strip() == completion.strip()
        assert document.input_ids[-1] == 2  # </s>
        assert document.is_target()[-1]


def test_fine_tuning_lowers_the_loss_of_completions_that_it_has_not_seen(tuned):
    assert tuned.loss_of("sft/test") < tuned.loss_of("base")
    first, last = tuned.losses("sft/train", "validation")
    assert last < first


def test_fine_tuning_drops_what_does_not_fit_and_counts_it(tuned):
    lengths = [len(document.input_ids) for document in tuned.documents("sft/dataset")]
    plan = json.loads((tuned.path("sft/train") / "run.json").read_text())["blocks"]
    assert plan["num_over_long"] == sum(length > 256 for length in lengths) > 0
    assert plan["tokens_dropped"] == sum(length for length in lengths if length > 256)
    assert plan["documents_cut"] == 0


def test_a_fine_tuned_model_generates_and_its_report_leads_back(tuned):
    said = tuned.do("generate", "checkpoint=runs/sft/train", "prompt=Write a story", "max_new_tokens=8")
    assert re.fullmatch(r"Write a story.+\n", said, re.DOTALL)
    require_whole_chain(tuned, "sft/test", "models/base", "self_instruct_seed_prompt_completion.jsonl")


# --- lora -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(tuned) -> Place:
    """On the records of `tuned`."""
    tuned.run("lora", "train", *FEW)
    tuned.run("lora", "export_model")
    tuned.run("lora", "evaluate", "context_length=256")
    return tuned


def test_an_adapter_is_small_and_its_base_stays_as_it_was(adapted):
    base = adapted.folder / "models" / "base" / "model.safetensors"
    assert base.read_bytes() == (adapted.shared / "models" / "stories260K" / "model.safetensors").read_bytes()
    adapter = adapted.path("lora/train") / "final" / "adapter_model.safetensors"
    facts = json.loads((adapted.path("lora/train") / "run.json").read_text())
    rows = 64 + 32  # a key or value projection of stories260K has 4 of 8 heads
    assert facts["num_trainable_parameters"] == 5 * 8 * (2 * (64 + 64) + 2 * rows)
    assert adapter.stat().st_size == pytest.approx(4 * facts["num_trainable_parameters"], rel=0.1)


def test_a_merged_adapter_scores_better_than_its_base_and_needs_no_peft(adapted):
    assert adapted.loss_of("lora/test") < adapted.loss_of("base")
    assert not (adapted.path("lora/model") / "adapter_config.json").exists()
    said = adapted.do("generate", "checkpoint=runs/lora/model", "prompt=Write a story", "max_new_tokens=8")
    assert re.fullmatch(r"Write a story.+\n", said, re.DOTALL)


def test_the_report_of_a_merged_adapter_leads_back_to_base_and_records(adapted):
    require_whole_chain(adapted, "lora/test", "runs/lora/train", "models/base", "self_instruct_seed_prompt_completion")


# --- chat -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatting(fork_server, shared, tmp_path_factory) -> Place:
    """Two hundred questions of Dolly with their answers, as messages."""
    there = place(fork_server, shared, tmp_path_factory.mktemp("chat"))
    folder = there.folder / "data" / "chat"
    folder.mkdir(parents=True)
    lines = (shared / "instruct" / "dolly15k_part0.jsonl").read_text().splitlines()[:200]
    with open(folder / "dolly.jsonl", "w") as output:
        for record in map(json.loads, lines):
            question = "\n".join(part for part in (record["context"], record["instruction"]) if part)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": record["response"]}]
            output.write(json.dumps({"messages": turns}) + "\n")
    there.run("chat", "train_tokenizer")
    there.run("chat", "prepare_data", "split.ratios={train: 0.8, validation: 0.1, test: 0.1}")
    there.run("chat", "train", *FEW)
    there.run("chat", "evaluate", "context_length=256")
    return there


def test_the_words_of_the_assistant_alone_are_targets(chatting):
    """And the two tokens that end its turn and the document."""
    lines = (chatting.folder / "data" / "chat" / "dolly.jsonl").read_text().splitlines()
    answers = {json.loads(line)["messages"][1]["content"].strip() for line in lines}
    documents = chatting.documents("chat/dataset")
    assert len(documents) > 100
    for document in documents:
        _, targets = chatting.texts("runs/chat/tokenizer", document)
        assert targets.strip() in answers
        assert sorted(set(document.input_ids[document.input_ids > 511].tolist())) == [512, 513]
        assert np.flatnonzero(document.input_ids == 513).size == 2  # a turn each
        assert np.flatnonzero((document.input_ids == 513) & document.is_target()).size == 1


def test_chat_training_gives_the_new_tokens_rows_and_lowers_the_loss(chatting):
    """From a base of 512 ids; the first evaluation comes after four steps, the report is of another split."""
    config = json.loads((chatting.path("chat/train") / "final" / "config.json").read_text())
    assert config["vocab_size"] == 514
    first, last = chatting.losses("chat/train", "validation")
    assert last < first < chatting.losses("chat/train", "train")[0]


def test_chat_rows_are_whole_or_cut_at_the_end_and_counted(chatting):
    lengths = [len(document.input_ids) for document in chatting.documents("chat/dataset")]
    plan = json.loads((chatting.path("chat/train") / "run.json").read_text())["blocks"]
    assert plan["num_over_long"] == sum(length > 256 for length in lengths) > 0
    assert plan["tokens_dropped"] == sum(max(0, length - 256) for length in lengths)


def test_a_chat_model_generates_and_its_report_leads_back(chatting):
    said = chatting.do("generate", "checkpoint=runs/chat/train", "prompt=Who are you?", "max_new_tokens=8")
    assert re.fullmatch(r"Who are you\?.+\n", said, re.DOTALL)
    template = chatting.path("chat/train") / "final" / "chat_template.jinja"
    assert template.read_bytes() == (ROOT / "configs" / "chat" / "chatml.jinja").read_bytes()
    require_whole_chain(chatting, "chat/test", "runs/chat/tokenizer", "models/base", "dolly.jsonl")
