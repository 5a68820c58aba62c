"""Speed of greedy text beside transformers' `generate` and its continuous batching, in one run on 200 GSM8K questions.

    python benchmarks/generation_speed.py [--repeats 3] [--prompts 200] [--only 'ours*'] [--quick]

A Llama of 12M parameters, trained on GSM8K for some minutes by `scripts/train.py` (`--train-minutes`, kept in
`--folder`). So small a model repeats itself instead of coming to an end, so each text ends where the question's true
answer would, in tokens, or at EOS. Nobody knows those lengths beforehand: batches are planned for 256 new tokens each,
and a text's own length only ends it, as EOS would. Every contender in a process of its own, in turns. Printed:
- tokens a second: new tokens, by the time from ids to ids, after two short texts for warming up
- ratios: medians of the ratios within a turn, beside the bars
- texts that differ from those of batch 1, and how many of these have no near-tie

float32 on the CPU. Needs two quiet cores and ../shared/data.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import contenders

MAX_NEW_TOKENS = 256
LABELS = {
    "batch1": "`generate`, batch 1",
    "batch16": "`generate`, batch 16, in the order of the file",
    "batch16-sorted": "`generate`, batch 16, by length of the prompts",
    "continuous": "`generate_batch` (continuous batching)",
    "ours16": "ours, 16 rows",
    "ours": "ours, 8192 tokens a batch",
}
QUOTED = {"batch1": 84, "batch16": 399, "batch16-sorted": 442, "continuous": 177}  # tokens/s of these elsewhere
BARS = [("ours", "batch1", 6.0), ("ours", "batch16-sorted", 1.2)]
Texts = list[list[int]]  # ids of each prompt's continuation, EOS included


def trained(folder: Path, *, minutes: float) -> Path:
    """The folder of the model, trained unless it stands."""
    final = folder / "gsm8k_run" / "final"
    if not final.is_dir():
        shutil.rmtree(final.parent, ignore_errors=True)
        shape = {key: value for key, value in contenders.SHAPE.items() if key != "vocab_size"}
        command = [
            *(sys.executable, str(contenders.ROOT / "scripts" / "train.py"), f"output_dir={final.parent}"),
            f"model.config={json.dumps({'model_type': 'llama', **shape})}",
            f"data={{dataset: {folder}/gsm8k, block_size: 512, packing: group_by_length, validation_split: null}}",
            "training={micro_batch_size: 8, global_batch_size: 8, mixed_precision: bf16, max_steps: 100000,"
            f" max_time_s: {minutes * 60:.0f}}}",
            "optimizer.learning_rate=1e-3",
            "schedule={name: constant, warmup: 20}",
        ]
        subprocess.run(command, check=True, cwd=contenders.ROOT)
    return final


@dataclass(frozen=True)
class Question:
    """Ids of a prompt, and how many tokens its text has at most."""

    ids: tuple[int, ...]
    num_new: int


def questions_of(tokenizer: Any, number: int) -> list[Question]:
    """The first questions of the file; the length is that of the true answer with EOS."""
    from codex_accel import prompts

    path = contenders.SHARED / "instruct" / "gsm8k_train.jsonl"
    with open(path, encoding="utf-8") as lines:
        records = [json.loads(line) for line, _ in zip(lines, range(number), strict=False)]
    lengths = [len(ids) + 1 for ids in tokenizer.encode([record["answer"] for record in records])]
    return [
        Question(prompts.encode_prompt(tokenizer, record["question"]), min(length, MAX_NEW_TOKENS))
        for record, length in zip(records, lengths, strict=True)
    ]


# --- contenders, each in a process of its own ----------------------------------------------------------------------


def settings_for(tokenizer: Any) -> Any:
    """Greedy, with the end and the padding of the tokenizer."""
    from transformers import GenerationConfig

    ids = {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, do_sample=False, **ids)


def by_generate(model: Any, tokenizer: Any, asked: list[Question], *, batch_size: int, by_length: bool) -> Texts:
    """transformers' `generate` over padded batches, with a stopping criterion for each row."""
    import torch

    order = sorted(range(len(asked)), key=lambda n: -len(asked[n].ids)) if by_length else list(range(len(asked)))
    found: dict[int, list[int]] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(asked[n].ids) for n in batch)
        rows = [[tokenizer.pad_id] * (longest - len(asked[n].ids)) + list(asked[n].ids) for n in batch]
        mask = [[0] * (longest - len(asked[n].ids)) + [1] * len(asked[n].ids) for n in batch]
        ends = longest + torch.tensor([asked[n].num_new for n in batch])
        output = model.generate(
            torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            generation_config=settings_for(tokenizer),
            stopping_criteria=[lambda ids, _, ends=ends, **__: ids.shape[1] >= ends],
        )
        for n, ids in zip(batch, output[:, longest:].tolist(), strict=True):
            ids = ids[: asked[n].num_new]
            found[n] = ids[: ids.index(tokenizer.eos_id) + 1] if tokenizer.eos_id in ids else ids
    return [found[n] for n in range(len(asked))]


def by_continuous(model: Any, tokenizer: Any, asked: list[Question]) -> Texts:
    """transformers' continuous batching, with its defaults."""
    found: dict[str, list[int]] = {}
    with model.continuous_batching_context_manager(generation_config=settings_for(tokenizer)) as manager:
        names = [
            manager.add_request(list(each.ids), max_new_tokens=each.num_new, eos_token_id=tokenizer.eos_id)
            for each in asked
        ]
        while len(found) < len(asked):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = list(result.generated_tokens)
            elif result is None and not manager.is_running():
                raise RuntimeError("continuous batching ended early")
    return [found[name] for name in names]


def by_us(model: Any, tokenizer: Any, asked: list[Question], *, batch_size: int | None) -> Texts:
    """`codex_accel.generation`; near-ties are noted in NEAR_TIES."""
    from codex_accel import generation

    known = [generation.Request(each.ids, MAX_NEW_TOKENS) for each in asked]
    found: dict[int, Any] = {}
    for batch in generation.plan_batches(known, batch_tokens=8192, batch_size=batch_size):
        requests = [generation.Request(asked[n].ids, asked[n].num_new) for n in batch]
        found.update(zip(batch, generation.generate(model, tokenizer, requests), strict=True))
    NEAR_TIES[:] = [found[n].num_near_ties for n in range(len(asked))]
    return [list(found[n].ids) for n in range(len(asked))]


NEAR_TIES: list[int] = []
METHODS: dict[str, Callable[[Any, Any, Any], Texts]] = {
    "batch1": lambda *given: by_generate(*given, batch_size=1, by_length=False),
    "batch16": lambda *given: by_generate(*given, batch_size=16, by_length=False),
    "batch16-sorted": lambda *given: by_generate(*given, batch_size=16, by_length=True),
    "continuous": by_continuous,
    "ours16": lambda *given: by_us(*given, batch_size=16),
    "ours": lambda *given: by_us(*given, batch_size=None),
}


def work(name: str, folder: Path, options: argparse.Namespace) -> None:
    """Measure one contender; prints one JSON object."""
    import torch

    from codex_accel import model as models
    from codex_accel import offline
    from codex_accel import tokenizer as tokenizers

    offline.enforce(allow_network=False)
    torch.set_num_threads(options.threads)
    model, tokenizer = models.load(folder).eval(), tokenizers.load(folder)
    model.config.use_cache = True
    asked = questions_of(tokenizer, options.prompts)
    METHODS[name](model, tokenizer, asked[:2])
    began, spent = time.perf_counter(), time.process_time()
    texts = METHODS[name](model, tokenizer, asked)
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - spent
    print(json.dumps({"seconds": seconds, "cpu_s": cpu_s, "texts": texts, "near_ties": NEAR_TIES}))


def measure(name: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`work` in a process of its own."""
    command = [sys.executable, __file__, "--worker", name, "--folder", str(folder), "--prompts", str(options.prompts)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(contenders.ROOT)}
    done = subprocess.run(
        [*command, "--threads", str(options.threads)], capture_output=True, text=True, env=environment
    )
    if done.returncode or not done.stdout.strip():
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1][:200])
    found = json.loads(done.stdout.splitlines()[-1])
    found["rate"] = sum(map(len, found["texts"])) / found["seconds"]
    return found


# --- report ----------------------------------------------------------------------------------------------------------


def report(results: dict[str, list[dict[str, Any]]], problems: dict[str, str], options: argparse.Namespace) -> None:
    """The tables, in Markdown."""
    print(f"{options.prompts} GSM8K questions, at most {MAX_NEW_TOKENS} new tokens, {options.threads} threads\n")
    print(f"machine: {contenders.processor()}, {options.repeats} turns, load {os.getloadavg()[0]:.1f} at the end\n")
    base = results.get("batch1")
    print("| contender | tokens/s | of batch 1 | quoted | cores used | texts unlike batch 1 | of these no near-tie |")
    print("|---|---|---|---|---|---|---|")
    for name, found in results.items():
        if not found:
            print(f"| {LABELS[name]} | {problems.get(name, '')} | | | | | |")
            continue
        rates, first = [result["rate"] for result in found], found[0]
        share = unlike = without = ""
        if base:
            share = f"{statistics.median(a['rate'] / b['rate'] for a, b in zip(found, base, strict=False)):.2f}"
            other = [n for n, (a, b) in enumerate(zip(first["texts"], base[0]["texts"], strict=True)) if a != b]
            unlike = str(len(other))
            without = str(sum(first["near_ties"][n] == 0 for n in other)) if first["near_ties"] else ""
        quoted = f"{QUOTED[name] / QUOTED['batch1']:.2f}" if name in QUOTED else ""
        print(
            f"| {LABELS[name]} | {statistics.median(rates):,.0f} ({min(rates):,.0f} to {max(rates):,.0f}) | {share} |"
            f" {quoted} | {statistics.median(r['cpu_s'] / r['seconds'] for r in found):.1f} | {unlike} | {without} |"
        )
    lengths = [len(ids) for found in results.values() if found for ids in found[0]["texts"]]
    print(f"\na text has {min(lengths)} to {max(lengths)} new tokens, {statistics.mean(lengths):.0f} in the mean")
    print("\n| ratio | here | smallest to largest | bar | |\n|---|---|---|---|---|")
    for name, other, bar in BARS:
        if results.get(name) and results.get(other):
            ratios = [a["rate"] / b["rate"] for a, b in zip(results[name], results[other], strict=False)]
            middle = statistics.median(ratios)
            passed = contenders.verdict(middle, bar, at_least=True, void="")
            print(f"| {name} / {other} | {middle:.2f} | {min(ratios):.2f} to {max(ratios):.2f} | {bar} | {passed} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train-minutes", type=float, default=8)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="contenders to run")
    parser.add_argument("--quick", action="store_true", help="one turn of 24 prompts, to see that all of it works")
    parser.add_argument("--folder", type=Path, default=contenders.ROOT / "runs" / "speed", help="data and model")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.folder, options)
        return
    if options.quick:
        options.repeats, options.prompts = 1, 24
    options.folder = options.folder.absolute()
    with contextlib.redirect_stdout(sys.stderr):
        contenders.prepared(options.folder)
        folder = trained(options.folder, minutes=options.train_minutes)
    results: dict[str, list[dict[str, Any]]] = {
        name: [] for name in METHODS if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)
    }
    problems: dict[str, str] = {}
    for turn in range(options.repeats):
        for name in list(results) if turn % 2 == 0 else list(results)[::-1]:
            if name in problems:
                continue
            try:
                results[name].append(measure(name, folder, options))
                note = f"{results[name][-1]['rate']:,.0f} tokens/s"
            except RuntimeError as error:
                problems[name] = note = f"fails: {error}"
            print(f"turn {turn + 1}  {name:<16} {note}", file=sys.stderr, flush=True)
    report(results, problems, options)


if __name__ == "__main__":
    main()
