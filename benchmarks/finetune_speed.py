"""Speed of fine-tuning on GSM8K beside bare loops and TRL's SFTTrainer, in useful tokens a second, in one run.

    python benchmarks/finetune_speed.py [--repeats 3] [--steps 10] [--only 'ours-*' 'bare-*'] [--quick]

Useful tokens: the tokens of the documents that the measured steps fed, prompt, [BOS] and [EOS] included, padding not;
every contender is counted so. Ours are counted from the plan of the run, which is made again from its config.yaml, and
checked against the tokens/s of its metrics.ndjson, which count padding. Time is that of the steps after warm-up.

A Llama of 12M parameters from random weights, float32, AdamW, gradients clipped, loss on answers. A step is 8
documents, or two blocks of 512, which hold about as many tokens. Every contender in a process of its own, in turns; TRL
in an environment that this installs (`--peers-dir`). Needs two quiet cores and ../shared/data.
"""

import argparse
import contextlib
import statistics
import sys
from typing import Any

import contenders
from contenders import Contender, rate

BLOCK_SIZE, ROWS_OF_BLOCKS = 512, 2
QUOTED = {"bare-padded": 848, "bare-grouped": 1166, "trl-default": 515, "trl-best": 924, "trl-packing": 576}
TRL_BEST = ("trl-grouped", "trl-padding_free", "trl-wrapped")  # the fastest of them counts
BARS = [  # ours, peer, bar
    ("ours-grouped", "trl-default", 1.9),
    ("ours-grouped", "trl-best", 1.15),
    ("ours-grouped", "bare-grouped", 0.95),
    ("ours-grouped", "ours-contaminated", 0.95),
    ("ours-best_fit", "ours-contaminated", 0.95),
    ("ours-isolated", "ours-contaminated", 0.95),
]
LABELS = {
    "default": "TRL, its defaults",
    "grouped": "TRL, by length, no checkpointing",
    "padding_free": "TRL, padding-free, no checkpointing",
    "wrapped": "TRL, wrapped packing (contaminated), no checkpointing",
    "packing": "TRL, packing",
}


def field(options: argparse.Namespace) -> list[Contender]:
    """All contenders."""
    folder, steps = options.folder, options.steps + contenders.WARM_UP
    common: dict[str, Any] = {
        "folder": folder,
        "peers_dir": options.peers_dir,
        "environment": "hf",
        "documents": folder / "documents.npz",
        "steps": steps,
        "batch_size": options.batch_size,
        "precision": "fp32",
    }

    def ours(packing: str, *, isolate: bool = True) -> dict[str, Any]:
        rows = options.batch_size if packing == "group_by_length" else ROWS_OF_BLOCKS
        data = f"dataset: {folder}/gsm8k, block_size: {BLOCK_SIZE}, packing: {packing}"
        argv = [
            f"data={{{data}, isolate_documents: {str(isolate).lower()}, validation_split: null}}",
            f"training.micro_batch_size={rows}",
            f"training.global_batch_size={rows}",
            "training.mixed_precision=no",
            *options.ours,
        ]
        return contenders.ours(folder, steps=steps, argv=argv)

    return [
        Contender("bare-padded", "bare loop, padded", "fp32", **contenders.peer("bare", **common)),
        Contender(
            "bare-grouped", "bare loop, by length", "fp32", **contenders.peer("bare", variant="grouped", **common)
        ),
        Contender("ours-grouped", "ours, `group_by_length`", "fp32", **ours("group_by_length")),
        Contender("ours-best_fit", "ours, `best_fit`", "fp32", **ours("best_fit")),
        Contender("ours-isolated", "ours, `concat`, isolated", "fp32", **ours("concat")),
        Contender("ours-contaminated", "ours, `concat`, contaminated", "fp32", **ours("concat", isolate=False)),
        *(
            Contender(f"trl-{name}", label, "fp32", **contenders.peer("trl_sft", variant=name, **common))
            for name, label in LABELS.items()
        ),
    ]


def report(run: list[Contender], options: argparse.Namespace) -> None:
    """The tables, in Markdown."""
    contenders.print_conditions(run, options, "Fine-tuning on GSM8K, question and answer, float32")
    by_name = {each.name: each for each in run}
    best = max((by_name[name] for name in TRL_BEST if name in by_name and by_name[name].results),
               key=contenders.median, default=None)  # fmt: skip
    padded = by_name.get("bare-padded")
    print("| contender | useful tokens/s | smallest to largest | places that hold a token | of the padded bare loop |")
    print("|---|---|---|---|---|")
    for each in run:
        if not each.results:
            print(f"| {each.label} | {each.problem} | | | |")
            continue
        rates = [rate(result) for result in each.results]
        full = sum(sum(result["tokens"]) for result in each.results) / sum(
            sum(result["places"]) for result in each.results
        )
        of_padded = f"{contenders.ratio(each, padded)[0]:.2f}" if padded and padded.results else ""
        told = f" ({each.problem})" if each.problem else ""
        print(
            f"| {each.label}{told} | {statistics.median(rates):,.0f} | {min(rates):,.0f} to {max(rates):,.0f} |"
            f" {full:.1%} | {of_padded} |"
        )
    print("\n| ratio | here | smallest to largest | bar | |\n|---|---|---|---|---|")
    for name, other, bar in BARS:
        mine, theirs = by_name.get(name), best if other == "trl-best" else by_name.get(other)
        if mine is None or theirs is None:
            continue
        label = f"{name} / {other}{f' ({theirs.name})' if other == 'trl-best' else ''}"
        if not mine.results or not theirs.results:
            print(f"| {label} | | | {bar} | {mine.problem or theirs.problem} |")
            continue
        void = ""
        if other in QUOTED:
            void = contenders.is_void(theirs, padded, QUOTED[other] / QUOTED["bare-padded"])
        here = contenders.ratio(mine, theirs)
        passed = contenders.verdict(here[0], bar, at_least=True, void=void)
        print(f"| {label} | {here[0]:.2f} | {here[1]:.2f} to {here[2]:.2f} | at least {bar} | {passed} |")


def main() -> None:
    options = contenders.arguments(__doc__, steps=40, repeats=2).parse_args()
    if options.quick:
        options.repeats, options.steps = 1, 3
    options.folder, options.peers_dir = options.folder.absolute(), options.peers_dir.absolute()
    run = contenders.chosen(field(options), options.only)
    if options.list:
        print("\n".join(each.row for each in run))
        return
    with contextlib.redirect_stdout(sys.stderr):
        contenders.prepared(options.folder)
    if not (options.folder / "gsm8k").is_dir():
        sys.exit(f"{contenders.SHARED}/instruct/gsm8k_train.jsonl: is not there. Put ../shared beside the repository.")
    contenders.export(options.folder / "gsm8k", options.folder / "documents.npz", block_size=None)
    contenders.in_turns(run, options)
    report(run, options)


if __name__ == "__main__":
    main()
