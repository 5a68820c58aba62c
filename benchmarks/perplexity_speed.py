"""Speed of perplexity beside plain blocks of 1024 and lm-evaluation-harness, in one run, on the same model and texts.

    python benchmarks/perplexity_speed.py [--repeats 3] [--tokens 30000] [--only 'articles/*'] [--quick]

A Llama of 12M parameters from random weights, float32, with a context of 1024, as a `from_pretrained` folder. Texts:
- articles: those of wikitext2_valid.txt, from the first on, each from its title to the next; some thousand tokens each
- questions: GSM8K, question and answer as one text, from the first on; some two hundred tokens each

Definition: BOS, then every token of a text is scored once, in windows of 1024 without overlap; ours and the harness
must agree to 1e-5 for each text. Blocks are what people write instead: all texts in one row, cut every 1024 tokens,
each through `model(input_ids=block, labels=block)`, which scores all of it but what begins a block.

Every contender in a process of its own, in turns: `scripts/evaluate.py`, and `lm_eval run` with the task of
docs/lm_eval.md in an environment that this installs (`--peers-dir`). Printed:
- tokens a second: those of the texts, by the time from the first batch's beginning to the last one's end; and by the
  CPU seconds of all threads in between, which tell on a machine that is not quiet, with `--threads 1`
- the first batch: from the start of the process to the end of the first scored batch, and to its beginning
- ratios: medians of the ratios within a turn, with the smallest and the largest, beside the bars

Needs two quiet cores and ../shared/data.
"""

import argparse
import contextlib
import fnmatch
import importlib.metadata
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import contenders

BLOCK_SIZE = 1024
contenders.PINNED["lm_eval"] = "0.4.13"
contenders.ENVIRONMENTS["lm_eval"] = (*contenders.OURS, "lm_eval")
LABELS = {
    "blocks": "blocks of 1024, `model(labels=...)`",
    "ours": "scripts/evaluate.py",
    "ours-packed": "the same with `packed=true`",
    "lm_eval": "lm_eval run, batch 1 (its default)",
    "lm_eval-8": "lm_eval run, batch 8",
}
QUOTED = {"blocks": 3207, "lm_eval": 2082}  # tokens/s elsewhere
BARS = [  # ours, other, what, bar
    ("ours", "blocks", "tokens_per_s", 1.1),
    ("ours", "lm_eval", "tokens_per_s", 1.5),
    ("ours", "lm_eval", "first_batch_s", 0.5),
]


# --- before: model and texts -----------------------------------------------------------------------------------------


def saved_model(folder: Path) -> Path:
    """The folder of the model with its tokenizer, made unless it stands."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = folder / "perplexity_model"
    if not (path / "model.safetensors").is_file():
        torch.manual_seed(0)
        shape = {**contenders.SHAPE, "max_position_embeddings": BLOCK_SIZE}
        LlamaForCausalLM._from_config(LlamaConfig(**shape)).save_pretrained(path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / "tokenizer" / name, path)
    return path


def texts_of(name: str, count: Callable[[list[str]], list[int]], *, num_tokens: int) -> list[str]:
    """The first texts of that name, as many as have `num_tokens` tokens."""
    if name == "articles":
        whole = (contenders.SHARED / "text" / "wikitext2_valid.txt").read_text(encoding="utf-8")
        texts = re.split(r"(?m)^(?= = [^=].* = $)", whole)[1:]
    else:
        lines = (contenders.SHARED / "instruct" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [f"{record['question']}\n{record['answer']}" for record in map(json.loads, lines[:4000])]
    total, taken = 0, []
    for text in texts:
        if total >= num_tokens:
            break
        taken.append(text)
        total += count([text])[0]
    return taken


def written(folder: Path, name: str, tokenizer: Any, *, num_tokens: int) -> Path:
    """A folder with texts.jsonl and the task of the page about lm_eval."""
    place = folder / "perplexity" / name
    shutil.rmtree(place, ignore_errors=True)
    (place / "tasks").mkdir(parents=True)
    texts = texts_of(name, lambda some: [len(ids) for ids in tokenizer.encode(some)], num_tokens=num_tokens)
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    page = (contenders.ROOT / "docs" / "lm_eval.md").read_text(encoding="utf-8")
    [task] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (place / "tasks" / "texts.yaml").write_text(task)
    return place


# --- contenders, each in a process of its own ------------------------------------------------------------------------


Calls = list[tuple[float, float, float]]  # when each begins and ends, and the CPU seconds of all threads


@contextlib.contextmanager
def noted(calls: Calls) -> Iterator[None]:
    """Add a call."""
    began, spent = time.monotonic(), time.process_time()
    yield
    calls.append((began, time.monotonic(), time.process_time() - spent))


def watched(owner: Any, name: str, calls: Calls) -> None:
    """Note each call of a function."""
    function = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        with noted(calls):
            return function(*args, **kwargs)

    setattr(owner, name, timed)


def work_blocks(model_dir: Path, calls: Calls, packed: bool) -> list[float]:
    """Plain transformers; gives no scores of texts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    row: list[int] = []
    for line in Path("texts.jsonl").read_text().splitlines():
        row += [tokenizer.bos_token_id, *tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)]
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(row) - 1, BLOCK_SIZE):
            with noted(calls):
                block = torch.tensor([row[start : start + BLOCK_SIZE]])
                total += model(input_ids=block, labels=block).loss.item() * (block.shape[1] - 1)
    return []


def work_ours(model_dir: Path, calls: Calls, packed: bool) -> list[float]:
    """The stage as it is run, with its own settings."""
    from codex_accel import evaluation

    watched(evaluation, "_forward", calls)  # a forward pass is what the others call a batch
    argv = [f"checkpoint={model_dir}", "file.path=texts.jsonl", "output_dir=ours", "overwrite=true"]
    with contextlib.redirect_stdout(sys.stderr):
        contenders.load_script("evaluate").main([*argv, f"packed={str(packed).lower()}"])
    lines = Path("ours/samples.ndjson").read_text().splitlines()
    return [json.loads(line)["nll"] for line in lines]


def work_lm_eval(model_dir: Path, calls: Calls, batch_size: int) -> list[float]:
    """The command of docs/lm_eval.md."""
    import lm_eval.models.huggingface as harness
    from lm_eval.__main__ import cli_evaluate

    watched(harness.HFLM, "_loglikelihood_tokens", calls)
    shutil.rmtree("theirs", ignore_errors=True)
    sys.argv = [
        *("lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model_dir},add_bos_token=False"),
        *("--device", "cpu", "--include_path", "tasks", "--tasks", "texts", "--batch_size", str(batch_size)),
        *("--output_path", "theirs", "--log_samples"),
    ]
    with contextlib.redirect_stdout(sys.stderr):
        cli_evaluate()
    [samples] = Path("theirs").glob("*/samples_texts_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    return [-float(line["resps"][0][0]) for line in lines]


WORK: dict[str, Callable[[Path, Calls], list[float]]] = {
    "blocks": lambda *given: work_blocks(*given, packed=False),
    "ours": lambda *given: work_ours(*given, packed=False),
    "ours-packed": lambda *given: work_ours(*given, packed=True),
    "lm_eval": lambda *given: work_lm_eval(*given, batch_size=1),
    "lm_eval-8": lambda *given: work_lm_eval(*given, batch_size=8),
}


def work(name: str, model_dir: Path) -> None:
    """Measure one contender; the last line printed is one JSON object."""
    calls: Calls = []
    nlls = WORK[name](model_dir, calls)
    import torch

    versions = {each: importlib.metadata.version(each) for each in ("torch", "transformers")}
    if name.startswith("lm_eval"):
        versions["lm_eval"] = importlib.metadata.version("lm_eval")
    found = {"calls": calls, "nlls": nlls, "threads": torch.get_num_threads(), "versions": versions}
    print(json.dumps(found), flush=True)


def measure(name: str, place: Path, model_dir: Path, options: argparse.Namespace, num_tokens: int) -> dict[str, Any]:
    """`work` in a process of its own, seen from outside."""
    inside = options.peers_dir / "lm_eval" / "bin" / "python" if name.startswith("lm_eval") else sys.executable
    command = [str(inside), __file__, "--worker", name, "--folder", str(model_dir)]
    environment = contenders.surroundings(
        contenders.Contender(name, "", "fp32"), options.folder, threads=options.threads
    )
    environment["HF_DATASETS_CACHE"] = str(options.folder / "perplexity" / "cache")
    shutil.rmtree(options.folder / "perplexity" / "cache", ignore_errors=True)
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place)
    ended = time.monotonic()
    if done.returncode or not done.stdout.strip():
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1][:300])
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["threads"] == options.threads, found["threads"]
    calls = found["calls"]
    return {
        **found,
        "tokens_per_s": num_tokens / (calls[-1][1] - calls[0][0]),
        "tokens_per_cpu_s": num_tokens / sum(spent for _, _, spent in calls),
        "first_batch_s": calls[0][1] - started,
        "begins_s": calls[0][0] - started,
        "whole_s": ended - started,
    }


# --- report ----------------------------------------------------------------------------------------------------------


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Of the scores of a text, as a share."""
    return max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))


def middle(found: list[dict[str, Any]], value: str) -> float:
    """Median over the turns."""
    return statistics.median(each[value] for each in found)


def report(results: dict[str, list[dict[str, Any]]], told: dict[str, str], options: argparse.Namespace) -> None:
    """The tables, in Markdown."""
    versions = {name: value for found in results.values() for each in found for name, value in each["versions"].items()}
    print(f"machine: {contenders.processor()}, {options.threads} threads, {options.repeats} turns, ", end="")
    print(f"load {os.getloadavg()[0]:.1f} at the end; " + ", ".join(f"{k} {v}" for k, v in sorted(versions.items())))
    for what in dict.fromkeys(row.split("/")[0] for row in results):
        print(f"\n{told[what]}\n")
        print(
            "| contender | tokens/s | smallest to largest | tokens/CPU s | first batch ends, s | begins, s | whole, s |"
        )
        print("|---|---|---|---|---|---|---|")
        for row, found in results.items():
            name = row.split("/")[1]
            if row.split("/")[0] != what:
                continue
            if not found:
                print(f"| {LABELS[name]} | {told.get(row, '')} | | | | | |")
                continue
            rates = [each["tokens_per_s"] for each in found]
            starts = " | ".join(f"{middle(found, value):.1f}" for value in ("first_batch_s", "begins_s", "whole_s"))
            print(
                f"| {LABELS[name]} | {statistics.median(rates):,.0f} | {min(rates):,.0f} to {max(rates):,.0f} |"
                f" {middle(found, 'tokens_per_cpu_s'):,.0f} | {starts} |"
            )
        print("\n| ratio | here | smallest to largest | bar | |\n|---|---|---|---|---|")
        for name, other, value, bar in BARS:
            mine, theirs = results.get(f"{what}/{name}"), results.get(f"{what}/{other}")
            if not mine or not theirs:
                continue
            ratios = sorted(a[value] / b[value] for a, b in zip(mine, theirs, strict=False))
            at_least, label = value == "tokens_per_s", "" if value == "tokens_per_s" else ", first batch"
            here = statistics.median(ratios)
            passed = contenders.verdict(here, bar, at_least=at_least, void="")
            print(
                f"| {name} / {other}{label} | {here:.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |"
                f" {'at least' if at_least else 'at most'} {bar} | {passed} |"
            )
        scores = {row: found[0]["nlls"] for row, found in results.items() if found and row.startswith(f"{what}/")}
        if f"{what}/ours" in scores:
            for row, nlls in scores.items():
                if nlls and row != f"{what}/ours":
                    off = largest_difference(scores[f"{what}/ours"], nlls)
                    assert off <= 1e-5, f"{row} and ours differ by {off:.1e} of the loss of a text"
                    print(f"\n{row.split('/')[1]} and ours differ by at most {off:.1e} of the loss of a text", end="")
            print()
    print(f"\nquoted from elsewhere: blocks / lm_eval {QUOTED['blocks'] / QUOTED['lm_eval']:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="turns")
    parser.add_argument("--tokens", type=int, default=30_000, help="of each kind of texts, at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="rows, such as 'articles/ours'")
    parser.add_argument("--quick", action="store_true", help="one turn of 4000 tokens, to see that all of it works")
    parser.add_argument("--folder", type=Path, default=contenders.ROOT / "runs" / "speed", help="data and model")
    parser.add_argument("--peers-dir", type=Path, default=contenders.ROOT / "runs" / "peers", help="environments")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.folder)
        return
    if options.quick:
        options.repeats, options.tokens = 1, 4000
    options.folder, options.peers_dir = options.folder.absolute(), options.peers_dir.absolute()
    told: dict[str, str] = {}
    with contextlib.redirect_stdout(sys.stderr):
        contenders.prepared(options.folder)
        model_dir = saved_model(options.folder)
        if problem := contenders.install("lm_eval", options.peers_dir):
            told["lm_eval"] = problem
    from codex_accel import tokenizer as tokenizers

    tokenizer = tokenizers.load(model_dir)
    places, num_tokens = {}, {}
    for what in ("articles", "questions"):
        places[what] = written(options.folder, what, tokenizer, num_tokens=options.tokens)
        lines = (places[what] / "texts.jsonl").read_text().splitlines()
        num_tokens[what] = sum(map(len, tokenizer.encode([json.loads(line)["text"] for line in lines])))
        told[what] = f"{what}: {len(lines)} texts, {num_tokens[what]:,} tokens"
    rows = [f"{what}/{name}" for what in places for name in LABELS]
    results: dict[str, list[dict[str, Any]]] = {
        row: [] for row in rows if any(fnmatch.fnmatch(row, pattern) for pattern in options.only)
    }
    for turn in range(options.repeats):
        for row in list(results) if turn % 2 == 0 else list(results)[::-1]:
            what, name = row.split("/")
            if row in told or name.split("-")[0] in told:
                continue
            try:
                results[row].append(measure(name, places[what], model_dir, options, num_tokens[what]))
                last = results[row][-1]
                note = f"{last['tokens_per_s']:,.0f} tokens/s, first batch after {last['first_batch_s']:.1f} s"
            except RuntimeError as error:
                told[row] = note = f"fails: {error}"
            print(f"turn {turn + 1}  {row:<24} {note}, load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    report(results, told, options)


if __name__ == "__main__":
    main()
