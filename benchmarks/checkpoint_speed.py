"""Speed of checkpoints beside what they are made of, every contender in one run.

    python benchmarks/checkpoint_speed.py [--repeats 7] [--sequences 10000000]

A Llama shape of 50 million parameters with AdamW (600 MB on disk), contenders in turns, medians:
- save: `checkpoint.save` (hash, fsync, manifest, rename) against Accelerate's `save_state` and one fsync of its files
- verify: `manifest.problems_of` against reading and hashing the same files once, one thread a core, largest first
- steps: what the loop does for order, signals and the log at each step, against the step itself
- resume: `scripts/train.py` resumed at step 1,000,000 of a dataset of 10 million sequences against a fresh start of it

Needs two quiet cores and 4 GB of disk.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from codex_accel import offline  # noqa: E402

offline.enforce(allow_network=False)

import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig  # noqa: E402

from codex_accel import checkpoint, files, manifest, optim, order, preemption, processes, run_folder, tokens  # noqa: E402
from codex_accel.checkpoint import TrainerState  # noqa: E402
from codex_accel.events import LineLog  # noqa: E402
from codex_accel.schema import PrepareConfig  # noqa: E402
from codex_accel.train_schema import Data, Model, TrainConfig, Training  # noqa: E402

SHAPE = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8,
    "num_attention_heads": 9, "num_key_value_heads": 9, "max_position_embeddings": 256,
}  # fmt: skip
VOCAB_SIZE, BATCH, LENGTH = 16_384, 4, 256
TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
TURN = {"resume_step": 1_000_000, "block_size": 16}


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turns(repeats: int, prepare: Callable[[], object], *contenders: Callable[[], object]) -> list[list[float]]:
    """Seconds of each contender in each repeat, the first repeat (a warm-up) left out."""
    times: list[list[float]] = [[] for _ in contenders]
    for repeat in range(repeats + 1):
        for place, contender in enumerate(contenders):
            prepare()
            spent = seconds(contender)
            if repeat:
                times[place].append(spent)
    return times


def report(name: str, bar: float, ours: list[float], theirs: list[float]) -> None:
    ratio = statistics.median(ours) / statistics.median(theirs)
    spread = f"{min(ours):.2f} to {max(ours):.2f} s against {min(theirs):.2f} to {max(theirs):.2f} s"
    print(
        f"{name:<44} {statistics.median(ours):6.2f} s / {statistics.median(theirs):6.2f} s = {ratio:.2f} "
        f"(at most {bar}; {spread})",
        flush=True,
    )


# --- save and verify ------------------------------------------------------------------------------------------------


def save_and_verify(folder: Path, repeats: int) -> None:
    config = TrainConfig(
        output_dir=str(folder / "run"),
        model=Model(config=SHAPE),
        data=Data(dataset="none", block_size=LENGTH),
        training=Training(max_steps=1),
    )
    run_dir, stock = folder / "run", folder / "stock"
    (run_dir / run_folder.CHECKPOINTS).mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    values = {key: value for key, value in SHAPE.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=VOCAB_SIZE, **values))
    model.generation_config = GenerationConfig()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    model, optimizer = accelerator.prepare(model, optim.build(config, model))
    checkpoint.register_hooks(accelerator)
    log = LineLog(run_dir / run_folder.METRICS)

    def step() -> None:
        input_ids = torch.randint(VOCAB_SIZE, (BATCH, LENGTH))
        logits = model(input_ids=input_ids, use_cache=False).logits
        accelerator.backward(torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids.flatten()))
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = TrainerState(step=1)
    final = run_folder.checkpoint_path(run_dir, 1)

    def clean() -> None:
        for path in (stock, final):
            shutil.rmtree(path, ignore_errors=True)
        os.sync()

    def plain() -> None:
        accelerator.save_state(str(stock))
        for path in stock.iterdir():
            files.fsync_path(path)

    def ours() -> None:
        checkpoint.save(
            accelerator,
            run_dir,
            state,
            model=model,
            config=config,
            log=log,
            tokenizer_folder=folder / "tokenizer",
            parents=[],
            identity={},
        )

    mine, theirs = in_turns(repeats, clean, ours, plain)
    ours()
    size = sum(path.stat().st_size for path in final.iterdir())
    print(f"{num_parameters:,} parameters with AdamW, {size / 1e6:.0f} MB, {os.cpu_count()} cores")
    report("save / save_state and one fsync", 1.3, mine, theirs)

    paths = sorted(final.iterdir(), key=lambda path: -path.stat().st_size)

    def read_and_hash() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(files.sha256_file, paths))

    def verify() -> None:
        assert manifest.problems_of(final) == []

    checked, hashed = in_turns(repeats, lambda: None, verify, read_and_hash)
    report("verify / read and hash the same files once", 1.1, checked, hashed)
    print(f"{'':44} {size / 1e9 / statistics.median(checked):.2f} GB/s")
    each_step(step, accelerator, folder, repeats)


def each_step(step: Callable[[], None], accelerator: Accelerator, folder: Path, repeats: int) -> None:
    """Our part of a step, a thousand times, against the step."""
    log, number = LineLog(folder / "metrics.ndjson"), 0
    listener = preemption.Listener()

    def a_thousand() -> None:
        nonlocal number
        for _ in range(1000):
            number += 1
            order.batch(number, num_sequences=10_000_000, global_batch_size=BATCH, seed=0)
            processes.any_process(accelerator, False)
            processes.any_process(accelerator, False)
            processes.any_process(accelerator, listener.told_to_stop())
            values = {"loss": 1.2345678, "learning_rate": 1e-3, "grad_norm": 0.5, "epoch": 0.1, "tokens_per_s": 1e4}
            log.write({"step": number, "split": "train", **values, "num_target_tokens": number, "elapsed_s": 1.0})

    ours, theirs = in_turns(min(repeats, 3), lambda: None, a_thousand, step)
    listener.close()
    share = statistics.median(ours) / 1000 / statistics.median(theirs)
    per_step = statistics.median(ours) * 1e3
    print(
        f"{'between saves: ours / the step':<44} {per_step:.0f} us / {statistics.median(theirs):.2f} s "
        f"= {share:.4%} (under 1 %; {BATCH} x {LENGTH} tokens)"
    )


# --- resume ---------------------------------------------------------------------------------------------------------


def make_dataset(folder: Path, num_sequences: int) -> None:
    """A dataset of random tokens in documents of one block each, with the manifest of a prepared one."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import run_script

    corpus, tokenizer = folder / "corpus.jsonl", folder / "tiny_tokenizer"
    corpus.write_text(
        "".join(json.dumps({"text": path.read_text()}) + "\n" for path in Path(__file__).parent.glob("*.py"))
    )
    run_script("train_tokenizer", f"output_dir={tokenizer}", f"sources=[{{path: {corpus}}}]", "vocab_size=512")
    draws, made = np.random.default_rng(0), folder / "dataset"
    made.mkdir()
    length, chunk = TURN["block_size"], 100_000
    writer = tokens.ShardWriter(made / tokens.shard_name("train", 0), tokens.schema_for(512))
    for first in range(0, num_sequences, chunk):
        count = min(chunk, num_sequences - first)
        writer.add(
            tokens.Documents(
                input_ids=draws.integers(0, 512, count * length, dtype=np.uint32),
                lengths=np.full(count, length, dtype=np.int64),
                spans=np.empty((0, 2), dtype=np.int64),
                num_spans=np.zeros(count, dtype=np.int64),
                num_bytes=np.full(count, length, dtype=np.int64),
                record_ids=np.frombuffer(draws.bytes(16 * count), dtype="V16"),
            )
        )
    writer.close()
    manifest.seal(
        made,
        kind="dataset",
        final=made,
        payload=[path.name for path in made.glob("*.arrow")],
        config=PrepareConfig(output_dir=str(made), tokenizer=str(tokenizer), sources=[{"path": str(corpus)}]),
        parents=[manifest.as_parent(tokenizer)],
    )


def train(folder: Path, run_dir: Path, stop_at_step: int) -> None:
    settings = [
        f"output_dir={run_dir}",
        f"data={{dataset: {folder}/dataset, block_size: {TURN['block_size']}, validation_split: null}}",
        f"model.config={json.dumps(TINY)}",
        "training={micro_batch_size: 8, global_batch_size: 8, max_steps: 2000000}",
        f"training.stop_at_step={stop_at_step}",
        "checkpoint={every_steps: null}",
    ]
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *settings]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == preemption.EXIT_CODE, ended.stdout + ended.stderr


def move_to_step(run_dir: Path, step: int) -> None:
    """Let the run's checkpoint be that of another step, sealed anew."""
    old = run_folder.checkpoint_path(run_dir, run_folder.steps_saved(run_dir)[0])
    document = manifest.read(old)
    state = json.loads((old / checkpoint.TRAINER_STATE).read_text())
    (old / checkpoint.TRAINER_STATE).write_text(json.dumps(state | {"step": step}))
    for name in (manifest.MANIFEST, manifest.SUMS):
        (old / name).unlink()
    payload = [r["name"] for r in document["resources"] if r["payload"]]
    final = run_folder.checkpoint_path(run_dir, step)
    parents = [{**p, "path": os.path.normpath(old / p["path"])} for p in document["parents"]]
    config = TrainConfig(**document["config"])
    facts = document["facts"] | {"step": step}
    manifest.seal(old, kind="checkpoint", final=final, payload=payload, config=config, parents=parents, facts=facts)
    os.rename(old, final)


def resume(folder: Path, repeats: int, num_sequences: int) -> None:
    make_dataset(folder, num_sequences)
    pattern = folder / "pattern"
    train(folder, pattern, 2)
    move_to_step(pattern, TURN["resume_step"])
    run_dir = folder / "turn"

    def fresh() -> None:
        train(folder, run_dir, 2)

    def resumed() -> None:
        train(folder, run_dir, TURN["resume_step"] + 2)

    times: list[list[float]] = [[], []]
    for _ in range(repeats):
        for place, (contender, begin) in enumerate(((resumed, pattern), (fresh, None))):
            shutil.rmtree(run_dir, ignore_errors=True)
            if begin:
                shutil.copytree(begin, run_dir, symlinks=True)
            times[place].append(seconds(contender))
    later, first = map(statistics.median, times)
    print(
        f"{'start at step 1,000,000 - fresh start':<44} {later:.2f} s - {first:.2f} s = {later - first:+.2f} s "
        f"(under 5 s; {num_sequences:,} sequences, 2 steps each, imports included)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sequences", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: the system's own")
    arguments = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "accelerate", "transformers")}
    print(f"python {sys.version.split()[0]}, {versions}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        save_and_verify(Path(folder), arguments.repeats)
        resume(Path(folder), min(arguments.repeats, 5), arguments.sequences)


if __name__ == "__main__":
    main()
