"""Print what a quickstart run came to: losses, the compressors beside them, speed, and where everything lies.

examples:
  python scripts/quickstart_table.py
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codex_accel import cli, events, offline
from codex_accel.errors import UserError
from codex_accel.schema import TableConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    config = cli.parse(TableConfig, argv, doc=__doc__, stage="quickstart_table")
    offline.enforce(allow_network=config.allow_network)
    root = Path(config.root)
    try:
        lines = [json.loads(line.text) for line in events.read(root / "train" / "metrics.ndjson")]
        test = json.loads((root / "test" / "report.json").read_text())["metrics"]
        functions = json.loads((root / "test_functions" / "report.json").read_text())["metrics"]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file. Run `make quickstart` first.") from error

    from rich.console import Console
    from rich.table import Table

    train_lines = [line for line in lines if line["split"] == "train"]
    validation = [line for line in lines if line["split"] == "validation"][-1]
    title = f"after {validation['step']} steps"
    table = Table("", "loss (nats/token)", "perplexity", "bits per byte", title=title)
    table.add_row("validation modules", *_cells(validation))
    table.add_row("test modules", *_cells(test), style="bold")
    table.add_row("test functions, bodies given signatures", *_cells(functions))
    for name, sizes in test["compression"].items():
        table.add_row(f"{name} on the test modules, each alone", "", "", f"{sizes['each_alone']:.3f}")
        table.add_row(f"{name} on the test modules, all together", "", "", f"{sizes['together']:.3f}")
    speeds = sorted(line["tokens_per_s"] for line in train_lines)
    console = Console(width=100, highlight=False)
    console.print(table)
    console.print(
        "The compressors have not seen the training text; the model has, and its tokenizer was trained on all modules."
    )
    console.print(f"training: median {speeds[len(speeds) // 2]:,.0f} tokens/s, {train_lines[-1]['elapsed_s']:.0f} s")
    for name, what in _PLACES.items():
        console.print(f"  {root / name!s:<34} {what}")
    return 0


def _cells(values: dict[str, Any]) -> list[str]:
    bits = values["bits_per_byte"]
    return [f"{values['loss']:.4f}", f"{values['perplexity']:.2f}", "" if bits is None else f"{bits:.3f}"]


_PLACES = {
    "corpus": "raw text: modules.jsonl, functions.jsonl",
    "tokenizer": "tokenizer, loads with AutoTokenizer",
    "dataset": "tokenized splits of the modules (functions: of the functions)",
    "train": "run: metrics.ndjson, events.ndjson, checkpoints/, final/",
    "test": "evaluation report on the test modules",
}


if __name__ == "__main__":
    cli.run(main)
