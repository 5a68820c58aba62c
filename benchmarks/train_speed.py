"""Speed of pretraining beside a bare loop, a plain Accelerate loop, transformers' Trainer and litgpt, in one run.

    python benchmarks/train_speed.py [--repeats 3] [--steps 8] [--only 'ours/*' 'bare/*'] [--quick]

A Llama of 12M parameters from random weights, sequences of 256 out of the same tokens, AdamW, gradients clipped. Every
contender in a process of its own, in turns; peers in environments that this installs (`--peers-dir`). Printed:
- tokens a second: of the median step of each process, after warm-up; medians over the turns
- the first step: from the start of the process to the end of its first step, imports, data and compiling included
- ratios: medians of the ratios within a turn, with the smallest and the largest, beside the bars
- overhead: what metrics, telemetry and callbacks take of a small step, by `loop_overhead.py`

None isolates documents (`data.isolate_documents=false`), which no peer does here. How ours makes the loss is its
default, and is printed; `--ours training.loss_chunk_rows=0` is full logits. Needs two quiet cores.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import contenders
from contenders import Contender, first_step, rate

BLOCK_SIZE = 256
QUOTED = {"bare": 2011, "accelerate": 1919, "trainer": 1998, "litgpt": 2251, "bare-compiled": 2370}  # tokens/s, bf16
QUOTED_FIRST_STEP_S = {"bare": 6.9, "accelerate": 6.2, "trainer": 11.7, "litgpt": 60.8, "bare-compiled": 14.6}
BARS = [  # ours, peer, what, bar
    ("ours", "bare", rate, 0.98),
    ("ours", "accelerate", rate, 1.02),
    ("ours-compiled", "litgpt", rate, 1.0),
    ("ours-compiled", "trainer", rate, 1.15),
    ("ours", "trainer", first_step, 0.55),
]
OVERHEAD_BAR = 0.01


def field(options: argparse.Namespace) -> list[Contender]:
    """All contenders."""
    folder, steps = options.folder, options.steps + contenders.WARM_UP
    made = []
    for precision in ("fp32", "bf16"):
        common: dict[str, Any] = {
            "folder": folder,
            "peers_dir": options.peers_dir,
            "documents": folder / "blocks.npz",
            "steps": steps,
            "batch_size": options.batch_size,
            "precision": precision,
        }
        data = f"dataset: {folder}/text, block_size: {BLOCK_SIZE}, isolate_documents: false, validation_split: null"
        argv = [
            f"data={{{data}}}",
            f"training.micro_batch_size={options.batch_size}",
            f"training.global_batch_size={options.batch_size}",
            f"training.mixed_precision={'no' if precision == 'fp32' else 'bf16'}",
            *options.ours,
        ]
        hf = {**common, "environment": "hf"}
        made += [
            Contender("bare", "bare loop", precision, **contenders.peer("bare", **hf)),
            Contender("ours", "scripts/train.py", precision, **contenders.ours(folder, steps=steps, argv=argv)),
            Contender("accelerate", "plain Accelerate loop", precision, **contenders.peer("accelerate_loop", **hf)),
            Contender(
                "accelerate-fused",
                "the same with fused AdamW",
                precision,
                **contenders.peer("accelerate_loop", variant="fused", **hf),
            ),
            Contender("trainer", "Trainer", precision, **contenders.peer("trainer", **hf)),
            Contender(
                "bare-compiled",
                "bare loop, compiled",
                precision,
                **contenders.peer("bare", variant="compiled", **hf),
            ),
            Contender(
                "ours-compiled",
                "scripts/train.py, compile: true",
                precision,
                **contenders.ours(folder, steps=steps, argv=[*argv, "training.compile=true"]),
            ),
            Contender(
                "litgpt",
                "litgpt (compiled)",
                precision,
                **contenders.peer("litgpt_pretrain", environment="litgpt", **common),
            ),
        ]
    compiled_fp32 = {"bare-compiled/fp32", "ours-compiled/fp32", "litgpt/fp32"}  # the bars are of bf16; ask for them
    return [each for each in made if each.row not in compiled_fp32 or each.row in options.only]


def overhead(folder: Path, threads: int) -> dict[str, Any]:
    """What loop_overhead.py measures, in a process of its own."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    command = [sys.executable, str(Path(__file__).parent / "loop_overhead.py"), "--folder", str(folder)]
    environment = contenders.surroundings(Contender("overhead", "", "fp32"), folder, threads=threads)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=contenders.ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1][:300])
    return json.loads(done.stdout.splitlines()[-1])


# --- report ----------------------------------------------------------------------------------------------------------


def report(run: list[Contender], overheads: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """The tables, in Markdown."""
    what = f"Pretraining, sequences of {BLOCK_SIZE}, {options.batch_size} a step, documents not isolated"
    contenders.print_conditions(run, options, what)
    by_row = {each.row: each for each in run}
    print("| contender | precision | tokens/s | smallest to largest | of the bare loop | first step, s | quoted |")
    print("|---|---|---|---|---|---|---|")
    for each in run:
        if not each.results:
            print(f"| {each.label} | {each.precision} | {each.problem} | | | | |")
            continue
        rates, bare = [rate(result) for result in each.results], by_row.get(f"bare/{each.precision}")
        share = f"{contenders.ratio(each, bare)[0]:.3f}" if bare and bare.results else ""
        firsts = [first_step(result) for result in each.results]
        first = f"{statistics.median(firsts):.1f}"
        if "compile" in each.label and len(firsts) > 1:
            first = f"{firsts[0]:.1f}, from the cache {statistics.median(firsts[1:]):.1f}"
        quoted = f"{QUOTED[each.name] / QUOTED['bare']:.3f}" if each.name in QUOTED else ""
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        told = f" ({each.problem})" if each.problem else ""
        print(
            f"| {each.label}{told} | {each.precision} | {statistics.median(rates):,.0f} | {spread} | {share} | {first}"
            f" | {quoted} |"
        )
    print("\n| ratio | precision | here | smallest to largest | bar | |\n|---|---|---|---|---|---|")
    for name, other, value, bar in BARS:
        for precision in ("fp32", "bf16"):
            mine, theirs = by_row.get(f"{name}/{precision}"), by_row.get(f"{other}/{precision}")
            if mine is None or theirs is None:
                continue
            at_least, words = value is rate, "" if value is rate else ", first step"
            label = f"{name} / {other}{words}"
            if not mine.results or not theirs.results:
                print(f"| {label} | {precision} | | | {bar} | {mine.problem or theirs.problem} |")
                continue
            void, middle = "", contenders.ratio(mine, theirs, value)
            if other != "bare":
                quoted = QUOTED if at_least else QUOTED_FIRST_STEP_S
                base = by_row.get(f"bare/{precision}")
                void = contenders.is_void(theirs, base, quoted[other] / quoted["bare"], value)
            passed = contenders.verdict(middle[0], bar, at_least=at_least, void=void)
            sign = "at least" if at_least else "at most"
            print(
                f"| {label} | {precision} | {middle[0]:.3f} | {middle[1]:.3f} to {middle[2]:.3f} | {sign} {bar} |"
                f" {passed} |"
            )
    if overheads:
        shares = sorted(each["share"] for each in overheads)
        middle = next(each for each in overheads if each["share"] == shares[(len(shares) - 1) // 2])
        parts = ", ".join(f"{name} {value * 1e6:.0f}" for name, value in middle["parts"].items())
        passed = contenders.verdict(middle["share"], OVERHEAD_BAR, at_least=False, void="")
        here = f"{middle['share']:.2%} of a step of {middle['step_s'] * 1e3:.0f} ms"
        spread = f"{shares[0]:.2%} to {shares[-1]:.2%}"
        print(f"| logging, tracking, telemetry, callbacks | fp32 | {here} | {spread} | at most 1 % | {passed} |")
        print(f"\nof each step, in microseconds: {parts}")


def main() -> None:
    parser = contenders.arguments(__doc__, steps=8, repeats=3)
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.steps = 1, 3
    options.folder, options.peers_dir = options.folder.absolute(), options.peers_dir.absolute()
    run = contenders.chosen(field(options), options.only)
    with_overhead = bool(contenders.chosen([Contender("overhead", "", "fp32")], options.only))
    if options.list:
        print("\n".join([each.row for each in run] + ["overhead/fp32"] * with_overhead))
        return
    with contextlib.redirect_stdout(sys.stderr):
        contenders.prepared(options.folder)
    contenders.export(options.folder / "text", options.folder / "blocks.npz", block_size=BLOCK_SIZE)
    contenders.in_turns(run, options)
    overheads = [overhead(options.folder, options.threads) for _ in range(options.repeats)] * with_overhead
    report(run, overheads, options)


if __name__ == "__main__":
    main()
