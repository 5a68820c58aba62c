"""Training on one GPU: tokens a second, model FLOP utilization and peak memory, every contender in one run.

    python benchmarks/gpu.py [--shape gpt2 llama-1b] [--sequence 1024 4096] [--repeats 2]

Contenders, each in a process of its own, in turns:
- bare: a PyTorch loop over the model of transformers: autocast, fused AdamW, clipped gradients, full logits in float32
- bare, compiled: the same with torch.compile
- Trainer: transformers' Trainer with its defaults
- ours: scripts/train.py; documents see each other, as they do above
- ours, isolated: the same with data.isolate_documents, its default
- ours, compiled: as ours, with training.compile

The same for all: float32 weights under bf16 autocast, SDPA, blocks of a concatenated corpus (the modules of Python's
standard library), no accumulation, no gradient checkpointing. The first steps are not measured. MFU counts as
`throughput.flops_per_token`. Peak memory is what CUDA's allocator held at most, or the highest resident set on a CPU.

Without CUDA it says "not run" and ends with exit code 2. `--shape tiny --device cpu` tries all of it in a minute; its
figures mean nothing.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

WARM_UP = 5  # steps
BETAS, WEIGHT_DECAY, MAX_GRAD_NORM, LEARNING_RATE = (0.9, 0.95), 0.1, 1.0, 1e-4
TOKENS = {"gpt2": 16_384, "llama-1b": 8_192, "tiny": 256}  # in a step
VOCABULARY = {"gpt2": 50_257, "llama-1b": 32_000, "tiny": 512}
SHAPES = {
    "gpt2": {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},  # 124M, transformers' own
    "llama-1b": {  # 1.1B, as TinyLlama
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
ROLES = ("bare", "bare, compiled", "Trainer", "ours", "ours, isolated", "ours, compiled")


def shape_of(options: argparse.Namespace) -> dict[str, Any]:
    """Keys of a transformers configuration, its context as long as the sequence."""
    context = "n_positions" if options.shape == "gpt2" else "max_position_embeddings"
    return {**SHAPES[options.shape], context: options.sequence}


# --- data ------------------------------------------------------------------------------------------------------------


def load_script(name: str) -> Any:
    """A module of scripts/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepared(folder: Path, shape: str) -> Path:
    """The dataset for a shape, with a vocabulary of its size (a little less if the corpus does not give as much)."""
    corpus, dataset = folder / f"corpus-{shape == 'tiny'}", folder / f"dataset-{shape}"
    if dataset.is_dir():
        return dataset
    source = f"sources=[{{path: {corpus}/modules.jsonl}}]"
    few = ["max_modules=24"] if shape == "tiny" else []
    size = f"vocab_size={VOCABULARY[shape]}"
    with contextlib.redirect_stdout(sys.stderr):
        if not corpus.is_dir():
            load_script("quickstart_corpus").main([f"output_dir={corpus}", *few])
        if not (folder / f"tokenizer-{shape}").is_dir():
            load_script("train_tokenizer").main([f"output_dir={folder}/tokenizer-{shape}", source, size])
        tokenizer = f"tokenizer={folder}/tokenizer-{shape}"
        load_script("prepare_data").main([f"output_dir={dataset}", tokenizer, source, "split.ratios={train: 1.0}"])
    return dataset


# --- a contender, in a process of its own ---------------------------------------------------------------------------


class Clock:
    """Notes when the warm-up ends and when the last step does; then it prints the result and ends the process."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.num_ticks, self.started_s = options, 0, 0.0

    def tick(self, model: Any) -> None:
        """A step of `model` has been told to the device."""
        self.num_ticks += 1
        if self.num_ticks not in (WARM_UP, WARM_UP + self.options.steps):
            return
        import torch

        if self.options.device == "cuda":
            torch.cuda.synchronize()
        if self.num_ticks == WARM_UP:
            self.started_s = time.monotonic()
            return
        spent_s = time.monotonic() - self.started_s
        print(json.dumps(self.result(model, spent_s)), flush=True)
        os._exit(0)  # what comes after training is not measured

    def result(self, model: Any, spent_s: float) -> dict[str, Any]:
        import torch

        from codex_accel import throughput

        tokens_per_s = TOKENS[self.options.shape] * self.options.steps / spent_s
        flops, peak = throughput.flops_per_token(model, block_size=self.options.sequence), None
        if self.options.device == "cuda":
            peak = throughput.peak_flops_per_s(torch.cuda.get_device_name(), "bfloat16")
            memory = torch.cuda.max_memory_allocated()
        else:
            status = Path("/proc/self/status").read_text()
            memory = int(status.split("VmHWM:")[1].split()[0]) * 1024
        return {
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * flops / peak if flops and peak else None,
            "peak_bytes": memory,
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        }


def blocks_of(options: argparse.Namespace) -> Any:
    """The training split cut into sequences, int64 (B, T)."""
    import numpy as np

    from codex_accel.tokens import TokenStore

    store = TokenStore(options.dataset, "train")
    ids = store.tokens(0, store.num_tokens).astype(np.int64)
    return ids[: len(ids) // options.sequence * options.sequence].reshape(-1, options.sequence)


def model_of(options: argparse.Namespace) -> Any:
    """The model of the shape with random weights in float32, for the vocabulary of the dataset."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from codex_accel import manifest

    size = manifest.read(options.dataset)["facts"]["vocab_size"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(vocab_size=size, bos_token_id=1, eos_token_id=2, **shape_of(options)),
        attn_implementation="sdpa",
    )
    model.config.use_cache = False
    return model


def bare(options: argparse.Namespace) -> None:
    import torch
    import torch.nn.functional as F

    model, blocks, clock = model_of(options).to(options.device).train(), blocks_of(options), Clock(options)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )

    def loss_of(input_ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(options.device, torch.bfloat16):
            logits = model(input_ids=input_ids, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())

    if options.role == "bare, compiled":
        loss_of = torch.compile(loss_of)
    generator, size = torch.Generator().manual_seed(0), TOKENS[options.shape] // options.sequence
    while True:
        chosen = torch.randint(len(blocks), (size,), generator=generator)
        loss = loss_of(torch.from_numpy(blocks[chosen.numpy()]).to(options.device, non_blocking=True))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick(model)


def trainer(options: argparse.Namespace) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, blocks, clock = model_of(options), blocks_of(options), Clock(options)

    class Ticks(TrainerCallback):
        def on_step_end(self, *arguments: Any, **_: Any) -> None:
            clock.tick(model)

    arguments = TrainingArguments(
        output_dir=str(options.run_dir),
        per_device_train_batch_size=TOKENS[options.shape] // options.sequence,
        max_steps=WARM_UP + options.steps,
        learning_rate=LEARNING_RATE,
        adam_beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        bf16=True,
        use_cpu=options.device == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    rows = [{"input_ids": block, "labels": block} for block in blocks.tolist()]
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Ticks()]).train()


def ours(options: argparse.Namespace) -> None:
    from codex_accel import callbacks, cli

    clock, size = Clock(options), TOKENS[options.shape] // options.sequence
    callbacks.CALLBACKS["clock"] = lambda config: {"on_step": lambda moment: clock.tick(moment.model)}
    isolated, compiled = options.role == "ours, isolated", options.role == "ours, compiled"
    data = {"dataset": str(options.dataset), "block_size": options.sequence, "isolate_documents": isolated}
    training = {"micro_batch_size": size, "global_batch_size": size, "max_steps": WARM_UP + options.steps + 1}
    training |= {"mixed_precision": "bf16", "compile": compiled, "device": options.device}
    argv = [
        f"output_dir={options.run_dir}",
        f"model.config={json.dumps(shape_of(options))}",
        f"data={json.dumps({**data, 'validation_split': None})}",
        f"training={json.dumps(training)}",
        f"optimizer.learning_rate={LEARNING_RATE}",
        "callbacks={clock: {}}",
    ]
    cli.run(lambda: load_script("train").main(argv))


# --- turns and the table --------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, role: str) -> dict[str, Any]:
    """The result of a contender, or {"problem"}."""
    command = [sys.executable, __file__, "--role", role, "--device", options.device, "--steps", str(options.steps)]
    command += ["--shape", options.shape, "--sequence", str(options.sequence)]
    command += ["--dataset", str(options.dataset), "--run-dir", str(options.folder / "run")]
    shutil.rmtree(options.folder / "run", ignore_errors=True)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    found = [line for line in done.stdout.splitlines() if line.startswith('{"tokens_per_s"')]
    if done.returncode == 0 and found:
        return json.loads(found[-1])
    told = done.stdout + done.stderr
    if "out of memory" in told.lower() or "do not fit into memory" in told:
        return {"problem": "out of memory"}
    return {"problem": (told.strip().splitlines() or ["no message"])[-1][:200]}


def print_table(results: dict[tuple[str, int, str], list[dict[str, Any]]]) -> None:
    print("| shape | sequence | contender | tokens/s | of the bare loop | MFU | peak memory, GB |")
    print("|---|---|---|---|---|---|---|")
    for (shape, sequence, role), found in results.items():
        problems = [result["problem"] for result in found if "problem" in result]
        if problems:
            print(f"| {shape} | {sequence} | {role} | {problems[0]} | | | |")
            continue
        rate = statistics.median(result["tokens_per_s"] for result in found)
        base = [result for result in results[shape, sequence, "bare"] if "problem" not in result]
        share = f"{rate / statistics.median(result['tokens_per_s'] for result in base):.2f}" if base else ""
        mfu = statistics.median(result["mfu"] for result in found) if found[0]["mfu"] else None
        memory = max(result["peak_bytes"] for result in found) / 1e9
        shown = "" if mfu is None else f"{mfu:.1%}"
        print(f"| {shape} | {sequence} | {role} | {rate:,.0f} | {share} | {shown} | {memory:.1f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["gpt2", "llama-1b"])
    parser.add_argument("--sequence", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=20, help=f"measured, after {WARM_UP} that are not")
    parser.add_argument("--repeats", type=int, default=2, help="turns, of which medians are taken")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "gpu")
    for name in ("--role", "--dataset", "--run-dir"):  # of a process that this one starts
        parser.add_argument(name, type=str if name == "--role" else Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        [options.shape], [options.sequence] = options.shape, options.sequence
        {"bare": bare, "Trainer": trainer, "ours": ours}[options.role.partition(",")[0]](options)
        return 1  # the clock ends the process before
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"not run: torch {torch.__version__} finds no CUDA device")
        return 2
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "accelerate"))
    print(f"{name}; {versions}; bf16; {options.steps} steps, medians of {options.repeats}\n", flush=True)
    results: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for shape, sequence in [(shape, sequence) for shape in options.shape for sequence in options.sequence]:
        each = argparse.Namespace(**{**vars(options), "shape": shape, "sequence": sequence})
        each.folder.mkdir(parents=True, exist_ok=True)
        each.dataset = prepared(options.folder.absolute(), shape)
        for turn in range(options.repeats):
            for role in ROLES if turn % 2 == 0 else ROLES[::-1]:
                result = run(each, role)
                results.setdefault((shape, sequence, role), []).append(result)
                told = result.get("problem") or f"{result['tokens_per_s']:,.0f} tokens/s"
                print(f"{shape} {sequence} turn {turn + 1}: {role}: {told}", file=sys.stderr, flush=True)
    shutil.rmtree(options.folder / "run", ignore_errors=True)
    print_table(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
