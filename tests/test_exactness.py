"""A step is the same however its batch is shared out: over micro-batches, processes, packed blocks, chunks of the loss.

`scripts/train.py` itself runs, copied with one line more that notes loss and gradient before each update. Each step
takes all documents, so a bare loop over them, in float64 and without any module of ours, says what is right. They are
ragged: prompts and completions of self-instruct, of which some have more than ten times the targets of others.
"""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from codex_accel import packing_plan, tokenizer

BLOCKS, SIZE, RATE, IGNORE = 16, 256, 0.5, -100
TOLERANCE = 1e-6
LINE = "grad_norm = float(accelerator.clip_grad_norm_(parameters, max_grad_norm))"
NOTE = (
    "torch.save((processes.sum_float(accelerator, loss_sum) / num_targets, "
    'torch.cat([p.grad.flatten() for p in parameters])), f"{run_dir}-{state.step}-{accelerator.process_index}.pt")'
)


class Run(NamedTuple):
    packing: str
    accumulation_steps: int
    num_processes: int
    loss_chunk_rows: int = 0

    @property
    def name(self) -> str:
        chunked = f"-chunks-of-{self.loss_chunk_rows}" if self.loss_chunk_rows else ""
        return f"{self.packing}-accumulation-{self.accumulation_steps}-processes-{self.num_processes}{chunked}"


RUNS = [
    *(Run("best_fit", steps, num) for num in (1, 2) for steps in (1, 2, 8)),
    Run("best_fit", 8, 1, 16),
    Run("concat", 2, 1, 16),
    Run("group_by_length", 8, 1),
]


# --- what is trained on -------------------------------------------------------------------------------------------


class Document(NamedTuple):
    ids: list[int]  # BOS, prompt, completion, EOS
    num_prompt: int  # ids before the first target


def num_blocks(packing: str, documents: list[Document]) -> int:
    """Sequences that an epoch of these documents has."""
    lengths = np.array([len(document.ids) for document in documents])
    if packing == "concat":
        return -(-(int(lengths.sum()) - 1) // SIZE)
    if packing == "group_by_length":
        return len(documents)
    pieces, counts = packing_plan.cut(lengths, block_size=SIZE, overlong="error")
    return len(packing_plan.best_fit(pieces, block_size=SIZE, counts=counts))


def pieces_of(packing: str, documents: list[Document]) -> list[tuple[list[int], list[int]]]:
    """(input ids, labels) of what is fed together: documents, or for concat what the ends of blocks make of them."""
    pieces, place = [], 0
    for ids, num_prompt in documents:
        labels = [token if index >= num_prompt else IGNORE for index, token in enumerate(ids)][1:]
        cuts = [cut - place for cut in range(0, place + len(ids), SIZE) if cut > place] if packing == "concat" else []
        edges = [0, *cuts, len(ids) - 1]
        pieces += [(ids[a:b], labels[a:b]) for a, b in itertools.pairwise(edges) if a < b]
        place += len(ids)
    return pieces


@pytest.fixture(scope="module")
def documents(shared, tiny) -> dict[str, list[tuple[dict, Document]]]:
    """For each packing, so many records of self-instruct, with their ids, that an epoch is `BLOCKS` sequences."""
    loaded = tokenizer.load(tiny / "tokenizer")
    lines = (shared / "instruct" / "self_instruct_seed_prompt_completion.jsonl").read_text().splitlines()
    found = []
    for record in map(json.loads, lines):
        prompt, completion = loaded.encode([record["prompt"], record["completion"]])
        document = Document([loaded.bos_id, *prompt, *completion, loaded.eos_id], 1 + len(prompt))
        if len(document.ids) <= SIZE:
            found.append((record, document))
    result = {}
    for packing in {run.packing for run in RUNS}:
        sizes = [num for num in range(1, 100) if num_blocks(packing, [d for _, d in found[:num]]) == BLOCKS]
        result[packing] = found[: sizes[-1]]
    return result


# --- the runs and the bare loop -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tiny, tmp_path_factory) -> Path:
    """A GPT-2 of random weights without dropout, with its tokenizer."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    sizes = GPT2Config(vocab_size=512, n_layer=2, n_head=2, n_embd=32, n_positions=SIZE, bos_token_id=1, eos_token_id=2)
    sizes.resid_pdrop = sizes.embd_pdrop = sizes.attn_pdrop = 0.0
    GPT2LMHeadModel(sizes).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / "tokenizer" / name, folder)
    return folder


@pytest.fixture(scope="module")
def steps(fork_server, documents, start, tiny, tmp_path_factory) -> dict[Run, list[tuple[float, torch.Tensor]]]:
    """(loss, gradient) of the first two steps of each run."""
    root = tmp_path_factory.mktemp("exactness")
    source = (ROOT / "scripts" / "train.py").read_text()
    assert source.count(LINE) == 1
    (root / "train.py").write_text(source.replace(LINE, f"{NOTE}\n{' ' * 16}{LINE}"))
    for packing, records in documents.items():
        (root / f"{packing}.jsonl").write_text("".join(json.dumps(record) + "\n" for record, _ in records))
        given = f"path: {root}/{packing}.jsonl, prompt: prompt, completion: completion, split: train"
        options = [f"tokenizer={tiny}/tokenizer", f"sources=[{{{given}}}]", "split={method: given}"]
        run_script("prepare_data", f"output_dir={root}/{packing}", *options)
    jobs = []
    for run in RUNS:
        argv = [
            f"output_dir={root}/{run.name}",
            f"model.path={start}",
            f"data={{dataset: {root}/{run.packing}, validation_split: null}}",
            f"data.block_size={SIZE}",
            f"data.packing={run.packing}",
            "training={max_steps: 2, max_grad_norm: null, mixed_precision: 'no'}",
            f"training.micro_batch_size={BLOCKS // run.accumulation_steps // run.num_processes}",
            f"training.global_batch_size={BLOCKS}",
            f"training.loss_chunk_rows={run.loss_chunk_rows}",
            f"optimizer={{name: sgd, learning_rate: {RATE}, weight_decay: 0.0}}",
            "schedule.name=constant",
        ]
        jobs.append(fork_server.start(root / "train.py", argv, num_processes=run.num_processes))
    for job in jobs:
        assert set(job.wait()) == {0}, job.output
    noted = {run: [[torch.load(root / f"{run.name}-{step}-{rank}.pt") for rank in range(run.num_processes)]
                   for step in (0, 1)] for run in RUNS}  # fmt: skip
    for run, step in itertools.product(RUNS, (0, 1)):
        assert all(torch.equal(noted[run][step][0][1], gradient) for _, gradient in noted[run][step])
    return {run: [step[0] for step in noted[run]] for run in RUNS}


@pytest.fixture(scope="module")
def expected(documents, start) -> dict[str, list[tuple[float, torch.Tensor]]]:
    """(loss, gradient) of the first two steps by torch alone: one forward pass, sum of losses / number of targets."""
    result = {}
    for packing, records in documents.items():
        pieces = pieces_of(packing, [document for _, document in records])
        input_ids = torch.zeros(len(pieces), SIZE, dtype=torch.int64)
        labels = torch.full((len(pieces), SIZE), IGNORE)
        for row, (ids, wanted) in enumerate(pieces):
            input_ids[row, : len(ids)], labels[row, : len(ids)] = torch.tensor(ids), torch.tensor(wanted)
        model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float64).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        result[packing] = []
        for _ in range(2):
            optimizer.zero_grad()
            logits = model(input_ids=input_ids, use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
            loss.backward()
            result[packing].append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
            optimizer.step()
    return result


def distance(gradient: torch.Tensor, other: torch.Tensor) -> float:
    """Norm of the difference as a share of the norm."""
    return float((gradient.double() - other.double()).norm() / other.double().norm())


# --- what must hold -----------------------------------------------------------------------------------------------


def test_the_targets_are_ragged(documents):
    for records in documents.values():
        counts = [len(document.ids) - document.num_prompt for _, document in records]
        assert max(counts) > 10 * min(counts)


@pytest.mark.distributed
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_loss_and_gradient_are_those_of_a_bare_loop_over_the_whole_batch(steps, expected, run):
    for (loss, gradient), (loss_, gradient_) in zip(steps[run], expected[run.packing], strict=True):
        assert math.isclose(loss, loss_, rel_tol=TOLERANCE)
        assert distance(gradient, gradient_) <= TOLERANCE


@pytest.mark.distributed
@pytest.mark.parametrize("run", [run for run in RUNS if run.packing == "best_fit"], ids=lambda run: run.name)
def test_loss_and_gradient_do_not_depend_on_how_a_step_is_shared_out(steps, run):
    for (loss, gradient), (loss_, gradient_) in zip(steps[run], steps[RUNS[0]], strict=True):
        assert math.isclose(loss, loss_, rel_tol=TOLERANCE)
        assert distance(gradient, gradient_) <= TOLERANCE


def test_the_usual_mean_of_means_is_another_gradient(documents, start):
    """So that the data can tell: micro-batches of one document each, their mean losses averaged (DESIGN, section 6)."""
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float64)
    gradients = []
    for reduction in ("sum", "mean"):
        model.zero_grad()
        for ids, labels in pieces_of("best_fit", [document for _, document in documents["best_fit"]]):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            cross_entropy(logits, torch.tensor(labels), ignore_index=IGNORE, reduction=reduction).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    first, second = (gradient / gradient.norm() for gradient in gradients)
    assert distance(second, first) > 0.05
