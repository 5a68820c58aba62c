"""What metrics, tracking, telemetry and callbacks take of a small step of scripts/train.py.

    python benchmarks/loop_overhead.py [--folder runs/speed]

One run in this process: a Llama of two layers, four blocks of 256 a step, float32. A line of metrics each 10 steps, as
by default, system metrics each second, ten times as often as by default, and a callback on each step that does nothing.
Timed, inside the calls: lines of metrics.ndjson and events.ndjson, rates, callbacks. Added: the CPU time of the
telemetry's thread. Divided by the time of the steps. `train_speed.py` runs this as one of its rows, and prepares the
data.
"""

import argparse
import contextlib
import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contenders

STEPS, WARM_UP = 200, 20
SMALL = {
    "model_type": "llama",
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


class Spent:
    """Seconds spent in functions by the main thread, and a note of all at the end of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.at_step: list[dict[str, float]] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, timed under `name`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return function(*args, **kwargs)
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

        return call

    def end_of_step(self) -> None:
        """Note all times now."""
        others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
        assert others, "no thread of telemetry runs"
        clocks = [time.pthread_getcpuclockid(thread.ident) for thread in others if thread.ident]
        telemetry = sum(map(time.clock_gettime, clocks))
        self.at_step.append({**self.seconds, "telemetry thread": telemetry, "all": time.perf_counter()})


def measure(folder: Path) -> dict[str, Any]:
    """Train, and return the `share` of the time, `step_s`, and `parts` in seconds a step."""
    from codex_accel import callbacks, events, throughput

    spent = Spent()

    def nothing(_: Any) -> None:
        return None

    call = spent.timed("callbacks", callbacks.call)

    def call_and_note(called: Any, moment: Any, accelerator: Any) -> str:
        reason = call(called, moment, accelerator)
        if moment.name == "on_step":
            spent.end_of_step()
        return reason

    callbacks.CALLBACKS["nothing"] = lambda config: {"on_step": nothing}
    callbacks.call = call_and_note
    events.LineLog.write = spent.timed("lines", events.LineLog.write)  # type: ignore[method-assign]
    throughput.Meter.add = spent.timed("rates", throughput.Meter.add)  # type: ignore[method-assign]
    throughput.Meter.rates = spent.timed("rates", throughput.Meter.rates)  # type: ignore[method-assign]
    data = f"dataset: {folder}/text, block_size: 256, isolate_documents: false, validation_split: null"
    with contextlib.redirect_stdout(io.StringIO()):
        contenders.load_script("train").main(
            [
                f"output_dir={folder}/runs/overhead",
                f"model.config={json.dumps(SMALL)}",
                f"data={{{data}}}",
                f"training={{micro_batch_size: 4, global_batch_size: 4, max_steps: {STEPS}}}",
                "log={system_metrics: true, system_every_s: 1.0}",
                "callbacks={nothing: {}}",
            ]
        )
    first, last = spent.at_step[WARM_UP - 1], spent.at_step[-1]
    parts = {name: (last[name] - first.get(name, 0.0)) / (STEPS - WARM_UP) for name in last}
    step_s = parts.pop("all")
    return {"share": sum(parts.values()) / step_s, "step_s": step_s, "parts": parts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=contenders.ROOT / "runs" / "speed")
    print(json.dumps(measure(parser.parse_args().folder.absolute())))


if __name__ == "__main__":
    main()
