"""Peak memory of preparation for a small and a large input, by format.

    python benchmarks/prepare_memory.py [--small 100] [--large 2000] [--formats jsonl json csv gz]

Writes real text of ../shared/data over and over (the csv also holds one record of 50 MB), prepares it with
scripts/prepare_data.py in a process of its own, and samples the resident memory (RSS) of the whole process tree every
20 ms. Prints the peaks and their difference; the bars are 600 MB and 10 %.
"""

import argparse
import csv
import gzip
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


def texts(num_bytes: int, *, longest: int) -> Iterator[str]:
    """About so many bytes of real text in records of 20 to 4,000 characters, and one of `longest` if that is not 0."""
    names = ("alice_pg11_utf8.txt", "botchan.txt", "tinyshakespeare.txt", "wikitext2_valid.txt", "udhr_20lang.txt")
    whole = "\n".join((SHARED / "text" / name).read_text(encoding="utf-8-sig") for name in names)
    draw = random.Random(0)
    if longest:
        yield (whole * (longest // len(whole) + 1))[:longest]
        num_bytes -= longest
    number = 0
    while num_bytes > 0:
        start, length = draw.randrange(len(whole) - 4000), draw.randrange(20, 4000)
        text = f"{number} {whole[start : start + length]}"
        num_bytes -= len(text.encode())
        number += 1
        yield text


def write(path: Path, num_bytes: int) -> None:
    """The file in the format of its suffix."""
    found = texts(num_bytes, longest=50_000_000 if path.suffix == ".csv" else 0)
    if path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["text"])
            writer.writerows([text] for text in found)
        return
    opened = gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else open(path, "wb")  # noqa: SIM115
    with io.TextIOWrapper(opened, encoding="utf-8") as stream:
        if path.suffix == ".json":
            stream.write("[\n")
            for number, text in enumerate(found):
                stream.write((",\n" if number else "") + json.dumps({"text": text}))
            stream.write("\n]\n")
        else:
            for text in found:
                stream.write(json.dumps({"text": text}) + "\n")


def peak_bytes(command: list[str]) -> tuple[int, float]:
    """Peak RSS of the process tree, and seconds."""
    started = time.monotonic()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        try:
            tree = [process, *process.children(recursive=True)]
            peak = max(peak, sum(member.memory_full_info().pss for member in tree))
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{command}: exit code {process.returncode}")
    return peak, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=100, help="MB of text")
    parser.add_argument("--large", type=int, default=2000, help="MB of text")
    parser.add_argument("--formats", nargs="+", default=["jsonl", "json", "csv", "gz"])
    options = parser.parse_args()
    print(f"{'format':<7} {options.small:>7} MB {options.large:>7} MB   difference")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = [sys.executable, str(ROOT / "scripts" / "train_tokenizer.py"), f"output_dir={folder}/tokenizer"]
        sample = f"sources=[{{path: {SHARED}/text/wikitext2_valid.txt}}]"
        subprocess.run([*script, sample, "vocab_size=8192"], check=True, stdout=subprocess.DEVNULL)
        for format_ in options.formats:
            peaks = []
            for megabytes in (options.small, options.large):
                path = folder / ("corpus.jsonl.gz" if format_ == "gz" else f"corpus.{format_}")
                write(path, megabytes * 10**6)
                peak, seconds = peak_bytes(
                    [
                        sys.executable,
                        str(ROOT / "scripts" / "prepare_data.py"),
                        f"output_dir={folder}/dataset",
                        "overwrite=true",
                        f"tokenizer={folder}/tokenizer",
                        f"sources=[{{path: {path}}}]",
                    ]
                )
                peaks.append(peak)
                print(f"  {format_} {megabytes} MB: {peak / 1e6:.0f} MB in {seconds:.0f} s", file=sys.stderr)
                path.unlink()
            small, large = peaks
            print(f"{format_:<7} {small / 1e6:>7.0f} MB {large / 1e6:>7.0f} MB   {large / small - 1:+.1%}", flush=True)


if __name__ == "__main__":
    main()
