"""Contenders side by side: environments of peers, prepared data, processes in turns, tables of medians and ratios.

Rule: every contender runs in a process of its own, after the others of its turn, never beside one; what is compared was
measured in the same turns. `train_speed.py` and `finetune_speed.py` say who runs and what is to be reached.
"""

import argparse
import fnmatch
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
PEERS = Path(__file__).parent / "peers"
sys.path.insert(0, str(ROOT))

PINNED = {"trl": "1.16.0", "litgpt": "0.5.13"}
OURS = ("torch", "transformers", "accelerate", "datasets")  # peers get the versions that run here
ENVIRONMENTS = {"hf": (*OURS, "trl"), "litgpt": ("torch", "litgpt")}
WARM_UP = 2  # steps of each process that are not measured
VOID = 0.8  # a peer slower than this part of what it had beside the bare loop elsewhere is set up wrongly here
SHAPE = {  # 12M parameters
    "vocab_size": 8192,
    "hidden_size": 320,
    "intermediate_size": 832,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@dataclass
class Contender:
    """Who runs, how, and what came out, a result for each turn that it finished."""

    name: str
    label: str
    precision: str
    command: list[str] = field(default_factory=list)
    measure: Callable[["Contender", Path], dict[str, Any]] = field(default=lambda *_: {})
    environment: str = ""  # of a peer
    problem: str = ""
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def row(self) -> str:
        """What `--only` chooses by."""
        return f"{self.name}/{self.precision}"


# --- before: environments, data ------------------------------------------------------------------------------------


def arguments(doc: str | None, *, steps: int, repeats: int) -> argparse.ArgumentParser:
    """The arguments that both benchmarks have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="turns")
    parser.add_argument("--steps", type=int, default=steps, help=f"measured steps, after {WARM_UP} that are not")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="rows to run, such as '*/bf16'")
    parser.add_argument("--ours", nargs="+", default=[], metavar="KEY=VALUE", help="more settings of scripts/train.py")
    parser.add_argument("--quick", action="store_true", help="one turn of three steps, to see that all of it works")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "speed", help="data and run folders")
    parser.add_argument("--peers-dir", type=Path, default=ROOT / "runs" / "peers", help="environments of the peers")
    return parser


def versions_wanted(environment: str) -> list[str]:
    """Pinned requirements of an environment of peers."""
    return [f"{name}=={PINNED.get(name) or importlib.metadata.version(name)}" for name in ENVIRONMENTS[environment]]


def install(environment: str, peers_dir: Path) -> str:
    """Make the environment unless it stands; returns what went wrong, or ""."""
    folder, wanted = peers_dir / environment, "\n".join(versions_wanted(environment))
    marker = folder / "installed.txt"
    if marker.is_file() and marker.read_text() == wanted:
        return ""
    print(f"installing {folder}: {' '.join(wanted.splitlines())}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *wanted.splitlines()],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return f"cannot be installed: {last[:200]}"
    marker.write_text(wanted)
    return ""


def load_script(name: str) -> Any:
    """A module of scripts/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepared(folder: Path) -> None:
    """Tokenizer (8k byte-level BPE), `text` and `gsm8k` datasets and model.json in `folder`, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(SHAPE, indent=1))
    text, questions = SHARED / "text", SHARED / "instruct" / "gsm8k_train.jsonl"
    sources = [{"path": str(text / "python311_stdlib.jsonl")}, {"path": str(text / "wikitext2_valid.txt")}]
    if not text.is_dir():
        corpus = folder / "corpus"
        if not corpus.is_dir():
            load_script("quickstart_corpus").main([f"output_dir={corpus}"])
        sources = [{"path": str(corpus / "modules.jsonl")}]
    qa = {"path": str(questions), "prompt": "question", "completion": "answer"}
    if not (folder / "tokenizer").is_dir():
        learned = [*sources, qa] if questions.is_file() else sources
        load_script("train_tokenizer").main(
            [f"output_dir={folder}/tokenizer", f"sources={json.dumps(learned)}", f"vocab_size={SHAPE['vocab_size']}"]
        )
    given = [("text", sources), ("gsm8k", [qa])] if questions.is_file() else [("text", sources)]
    for name, of_it in given:
        if not (folder / name).is_dir():
            load_script("prepare_data").main(
                [
                    f"output_dir={folder}/{name}",
                    f"tokenizer={folder}/tokenizer",
                    f"sources={json.dumps(of_it)}",
                    "split={ratios: {train: 1.0}}",
                ]
            )


def export(dataset: Path, path: Path, *, block_size: int | None) -> int:
    """The training split as the peers read it: its blocks, or, without a block size, its documents; how many."""
    import numpy as np

    from codex_accel.tokens import TokenStore

    store = TokenStore(dataset, "train")
    ids = store.tokens(0, store.num_tokens).astype(np.int32)
    if block_size is not None:
        num_blocks = len(ids) // block_size
        lengths = np.full(num_blocks, block_size)
        ids, num_prompt = ids[: num_blocks * block_size], np.zeros(num_blocks, dtype=np.int64)
    else:
        lengths = np.asarray(store.lengths)
        num_prompt = np.array([int(np.argmax(document.is_target())) for document in store])
    np.savez(path, ids=ids, lengths=lengths, num_prompt=num_prompt)
    return len(lengths)


# --- a process -------------------------------------------------------------------------------------------------------


def surroundings(contender: Contender, folder: Path, *, threads: int) -> dict[str, str]:
    """Environment of a contender: offline, so many threads, no GPU, a cache of compiled code of its own."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled" / contender.name),
    }


def peer(script: str, *, folder: Path, peers_dir: Path, environment: str, documents: Path, **settings: Any) -> dict:
    """Keywords of a `Contender` that runs a script of peers/."""
    command = [str(peers_dir / environment / "bin" / "python"), str(PEERS / f"{script}.py")]
    command += ["--model", str(folder / "model.json"), "--documents", str(documents)]
    command += ["--output-dir", str(folder / "runs" / "peer")]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", str(value)] if value != "" else []
    return {"command": command, "environment": environment, "measure": run_peer}


def run_peer(contender: Contender, folder: Path) -> dict[str, Any]:
    """Start a peer and wait; seconds of its steps and from its start to the end of the first."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    started = time.monotonic()
    environment = surroundings(contender, folder, threads=THREADS)
    done = subprocess.run(contender.command, capture_output=True, text=True, env=environment, cwd=folder)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"ends"')]
    if done.returncode or not lines:
        told = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise RuntimeError(f"exit code {done.returncode}: {told[-1][:300]}")
    result = json.loads(lines[-1])
    ends = result["ends"]
    counted = [line for line in done.stdout.splitlines() if line.startswith("Total parameters:")]
    if counted:  # litgpt says it itself
        result["num_parameters"] = int(counted[0].split(":")[1].replace(",", ""))
    result["first_step_s"] = ends[0] - started
    result["step_s"] = [end - begin for begin, end in itertools.pairwise(ends)]
    result["places"], result["tokens"] = result["places"][1:], result["tokens"][1:]  # of those steps
    return result


def ours(folder: Path, *, steps: int, argv: Sequence[str]) -> dict:
    """Keywords of a `Contender` that runs scripts/train.py."""
    shape = {"model_type": "llama", **{key: value for key, value in SHAPE.items() if key != "vocab_size"}}
    command = [
        sys.executable,
        str(ROOT / "scripts" / "train.py"),
        f"output_dir={folder}/runs/ours",
        f"model.config={json.dumps(shape)}",
        f"training.max_steps={steps}",
        "optimizer.learning_rate=1e-3",
        "schedule.name=constant",
        "log.every_steps=1",
        *argv,
    ]
    return {"command": command, "measure": run_ours}


def run_ours(contender: Contender, folder: Path) -> dict[str, Any]:
    """Start scripts/train.py, read metrics.ndjson as it grows, and end the process when the last step stands there."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    run_dir, log = folder / "runs" / "ours", folder / "ours.log"
    steps = int(next(word for word in contender.command if word.startswith("training.max_steps=")).split("=")[1])
    environment = surroundings(contender, folder, threads=THREADS)
    first_s, lines = None, []
    with open(log, "w") as stream:
        started = time.monotonic()
        process = subprocess.Popen(contender.command, stdout=stream, stderr=stream, env=environment, cwd=ROOT)
        try:
            while len(lines) < steps and process.poll() is None:
                time.sleep(0.005 if first_s is None else 0.1)
                path = run_dir / "metrics.ndjson"
                lines = path.read_text().splitlines() if path.exists() else []
                if lines and first_s is None:
                    first_s = time.monotonic() - started
        finally:
            process.kill()  # it is saving now, which is not measured
            process.wait()
    if len(lines) < steps or first_s is None:
        raise RuntimeError((log.read_text().strip().splitlines() or ["no message"])[-1][:300])
    found = [json.loads(line) for line in lines[:steps]]
    elapsed = [line["elapsed_s"] for line in found]
    run = json.loads((run_dir / "run.json").read_bytes())
    places, tokens = fed(run_dir, steps)
    seconds = [end - begin for begin, end in itertools.pairwise(elapsed)]
    for line, num_places, spent in zip(found[1:], places[1:], seconds, strict=True):
        off = line["tokens_per_s"] * spent / num_places - 1
        assert abs(off) < 0.02, f"step {line['step']}: its line and its plan differ in tokens by {off:.1%}"
    return {
        "first_step_s": first_s,
        "step_s": seconds,
        "places": places[1:],
        "tokens": tokens[1:],
        "num_parameters": run["num_parameters"],
        "threads": THREADS,
        "chunk_rows": run["loss"]["chunk_rows"],
        "loss": found[-1]["loss"],
        "versions": {name: importlib.metadata.version(name) for name in OURS[:3]},
    }


def fed(run_dir: Path, steps: int) -> tuple[list[int], list[int]]:
    """Places and tokens of documents of each step of a run, made again from its configuration."""
    from codex_accel import config, packing
    from codex_accel.tokens import TokenStore
    from codex_accel.train_schema import TrainConfig

    chosen = config.load(TrainConfig, path=run_dir / "config.yaml")
    blocks = packing.build(chosen, TokenStore(Path(chosen.data.dataset), chosen.data.train_split))
    micro = chosen.training.micro_batch_size
    places, tokens = [], []
    for step in range(steps):
        indices = blocks.of_step(step, global_batch_size=chosen.training.global_batch_size, seed=chosen.seed)
        batches = [blocks.batch(part) for part in indices.reshape(-1, micro)]
        places.append(sum(batch.input_ids.size for batch in batches))
        stretches = [blocks._stretches(index) for index in indices.tolist() if index >= 0]
        last = blocks.store.num_tokens - 1 if blocks.plan is None else blocks.store.num_tokens
        tokens.append(sum(min(stop, last) - start for row in stretches for start, stop in row))
    return places, tokens


THREADS = 2


# --- turns and tables ------------------------------------------------------------------------------------------------


def in_turns(contenders: list[Contender], options: argparse.Namespace) -> None:
    """Run all, turn by turn; every other turn backwards. One that fails is left out from then on, and told."""
    global THREADS
    THREADS = options.threads
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the contender that runs is ended too
    shutil.rmtree(options.folder / "compiled", ignore_errors=True)
    for name in {each.environment for each in contenders if each.environment}:
        problem = install(name, options.peers_dir)
        for each in contenders:
            if each.environment == name:
                each.problem = problem
    for turn in range(options.repeats):
        for each in contenders if turn % 2 == 0 else contenders[::-1]:
            if each.problem:
                continue
            began = time.monotonic()
            try:
                each.results.append(each.measure(each, options.folder))
            except (RuntimeError, AssertionError) as error:
                each.problem = f"fails: {error}"
            note = each.problem or f"{rate(each.results[-1]):,.0f} tokens/s, load {os.getloadavg()[0]:.1f}"
            print(f"turn {turn + 1}  {each.row:<24} {time.monotonic() - began:5.1f} s  {note}", file=sys.stderr)
    shutil.rmtree(options.folder / "runs", ignore_errors=True)


def rate(result: dict[str, Any]) -> float:
    """Tokens of documents a second over the measured steps; where all steps feed the same, by the median step."""
    seconds, tokens = result["step_s"][WARM_UP - 1 :], result["tokens"][WARM_UP - 1 :]
    if len(set(zip(result["places"], result["tokens"], strict=True))) == 1:
        return tokens[0] / statistics.median(seconds)
    return sum(tokens) / sum(seconds)


def first_step(result: dict[str, Any]) -> float:
    """Seconds from the start of the process to the end of its first step."""
    return result["first_step_s"]


def median(contender: Contender, value: Callable[[dict[str, Any]], float] = rate) -> float:
    """Of a contender's turns."""
    return statistics.median(map(value, contender.results))


def ratio(
    ours: Contender, other: Contender, value: Callable[[dict[str, Any]], float] = rate
) -> tuple[float, float, float]:
    """Median, smallest and largest ratio over the turns that both finished."""
    ratios = [value(a) / value(b) for a, b in zip(ours.results, other.results, strict=False)]
    return statistics.median(ratios), min(ratios), max(ratios)


def chosen(contenders: Sequence[Contender], patterns: Sequence[str]) -> list[Contender]:
    """Those whose row one of the patterns names."""
    return [each for each in contenders if any(fnmatch.fnmatch(each.row, pattern) for pattern in patterns)]


def print_conditions(contenders: Sequence[Contender], options: argparse.Namespace, what: str) -> None:
    """Machine, versions, threads and command lines."""
    seen: dict[str, str] = {}
    for each in contenders:
        for result in each.results[:1]:
            seen.update(result["versions"])
    cores, memory = len(os.sched_getaffinity(0)), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    print(f"{what}\n")
    print(f"- machine: {processor()}, {cores} cores, {memory:.0f} GB, load {os.getloadavg()[0]:.1f} at the end")
    print(f"- python {platform.python_version()}, {', '.join(f'{name} {seen[name]}' for name in sorted(seen))}")
    print(f"- {options.threads} threads, {options.repeats} turns, {options.steps} steps after {WARM_UP} of warm-up")
    print(f"- model: {json.dumps(SHAPE)}")
    for each in contenders:
        for result in each.results[:1]:
            size, loss = f"{result['num_parameters']:,} parameters", result.get("loss")
            told = f", last loss {loss:.2f}" if loss else ""
            if rows := result.get("chunk_rows"):
                told += f", loss by chunks of {rows} rows"
            print(f"- {each.row}: {size}{told}, threads {result['threads']}")
    print("\ncommand lines:\n\n```text")
    for each in contenders:
        print(shlex.join(short(word) for word in each.command))
    print("```\n")


def short(word: str) -> str:
    """A word of a command without the path of the repository."""
    return word.replace(f"{ROOT}/", "").replace(sys.executable, "python")


def processor() -> str:
    """Its name, as the system gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def verdict(value: float, bar: float, *, at_least: bool, void: str) -> str:
    """Words for the last column."""
    if void:
        return f"void: {void}"
    met = value >= bar if at_least else value <= bar
    return "met" if met else "missed"


def is_void(
    peer: Contender | None, base: Contender | None, quoted: float, value: Callable[[dict[str, Any]], float] = rate
) -> str:
    """Why a row does not count: the peer has less than `VOID` of the `quoted` ratio to the base; "" if it counts.

    With `first_step` as value, where less is better, the ratio is turned over.
    """
    if peer is None or base is None or not base.results or not peer.results:
        return "no bare loop beside it"
    here = ratio(peer, base, value)[0]
    share = here / quoted if value is rate else quoted / here
    name = f"{peer.name} / {base.name} {here:.2f}, quoted {quoted:.2f}"
    return name if share < VOID else ""
