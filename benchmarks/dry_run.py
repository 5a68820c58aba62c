"""What `--dry-run` forecasts beside what the run then takes, for three shapes.

    python benchmarks/dry_run.py [--steps 30]

A forecast and a run in processes of their own, one after the other. Printed for each shape, forecast, run and ratio:
- memory: the peak of the process; of the run as the system counts it (ru_maxrss)
- time: from the first step to the end of the last evaluation, saves included, by events.ndjson
- disk: bytes of one checkpoint, and of `final`

Exit code 1 if memory or time is off by more than a quarter, or disk by more than a twentieth. Needs two quiet cores.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent
LLAMA = (
    "{model_type: llama, hidden_size: 256, intermediate_size: 688, num_hidden_layers: 6, num_attention_heads: 4, "
    "max_position_embeddings: 256}"
)
GPT2 = "{model_type: gpt2, n_layer: 8, n_head: 4, n_embd: 256, n_positions: 512}"
SHAPES = {
    "llama, float32": (f"model.config={LLAMA}", "data.block_size=256", "training.mixed_precision=no"),
    "gpt2, bf16, gradient checkpointing": (
        f"model.config={GPT2}", "data.block_size=512", "training.mixed_precision=bf16",
        "training.gradient_checkpointing=true",
    ),
    "adapter on that llama, group_by_length": (
        "model.path={root}/run0/final", "data.block_size=256", "training.mixed_precision=no",
        "data.packing=group_by_length", "data.overlong=truncate", "peft={r: 8, target_modules: [q_proj, v_proj]}",
    ),
}  # fmt: skip
BARS = {"memory": 0.25, "time": 0.25, "checkpoint": 0.05, "final": 0.05}


def script(name: str, *argv: str) -> None:
    """Run a stage in this process."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(list(argv)) == 0


def train(argv: list[str]) -> tuple[str, float]:
    """Run scripts/train.py; returns what it printed and the peak of its memory in MB."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *argv]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read()
    assert process.returncode == 0, output
    return output, used.ru_maxrss * 1024 / 1e6


def forecast(output: str) -> dict[str, float]:
    """The figures that a dry run has printed: MB and seconds."""
    unit = {"s": 1, "min": 60, "h": 3600}
    number = r"([\d.,]+)"
    step, evaluation = re.search(rf"memory +{number} MB at the peak of a step(?:, {number} MB)?", output).groups()
    value, in_unit = re.search(rf"time +{number} (s|min|h):", output).groups()
    checkpoint, final = re.search(rf"checkpoints? of {number} MB, final {number} MB", output).groups()
    plain = [float(text.replace(",", "")) for text in (step, evaluation or "0", value, checkpoint, final)]
    return {
        "memory": max(plain[:2]), "time": plain[2] * unit[in_unit], "checkpoint": plain[3], "final": plain[4]
    }  # fmt: skip


def taken(run_dir: Path, peak_mb: float) -> dict[str, float]:
    """The same of a run that has ended."""
    events = [json.loads(line) for line in (run_dir / "events.ndjson").read_text().splitlines()]
    begin, end = (
        next(datetime.fromisoformat(event["time"]) for event in events if event["kind"] == kind)
        for kind in ("start", "end")
    )
    sizes = [
        sum(path.stat().st_size for path in folder.iterdir()) / 1e6
        for folder in (max((run_dir / "checkpoints").glob("step-*")), run_dir / "final")
    ]
    return {
        "memory": peak_mb, "time": (end - begin).total_seconds(), "checkpoint": sizes[0], "final": sizes[1]
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="of each run")
    steps = parser.parse_args().steps
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        script("quickstart_corpus", f"output_dir={root}/corpus", "max_modules=60")
        source = f"sources=[{{path: {root}/corpus/modules.jsonl}}]"
        script("train_tokenizer", f"output_dir={root}/tokenizer", source, "vocab_size=8192")
        split = "split={method: exact, ratios: {train: 0.9, validation: 0.1}}"
        script("prepare_data", f"output_dir={root}/dataset", f"tokenizer={root}/tokenizer", source, split)
        for number, (name, settings) in enumerate(SHAPES.items()):
            run_dir = root / f"run{number}"
            argv = [
                f"output_dir={run_dir}", f"data.dataset={root}/dataset", "training.micro_batch_size=8",
                "training.global_batch_size=16", f"training.max_steps={steps}", f"evaluation.every_steps={steps // 2}",
                "evaluation.max_windows=64", f"checkpoint.every_steps={steps // 2}",
                *(setting.replace("{root}", str(root)) for setting in settings),
            ]  # fmt: skip
            output, _ = train([*argv, "--dry-run"])
            print(f"\n--- {name}{output[output.index('dry run') - 1 :]}", flush=True)
            told, was = forecast(output), taken(run_dir, train(argv)[1])
            print(f"\n{'':<12}{'forecast':>10}{'run':>10}{'ratio':>8}")
            for key, bar in BARS.items():
                ratio = told[key] / was[key]
                wrong += [f"{name}: {key}"] * (abs(ratio - 1) > bar)
                unit = "s" if key == "time" else "MB"
                print(f"{f'{key}, {unit}':<12}{told[key]:>10,.4g}{was[key]:>10,.4g}{ratio:>8.3f}", flush=True)
    sys.exit(f"off: {'; '.join(wrong)}" if wrong else 0)


if __name__ == "__main__":
    main()
