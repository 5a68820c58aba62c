"""Speed and reach of masking, on real text and on the random secrets of tests/secret_grammar.py.

    python benchmarks/masking_speed.py [--repeats 5] [--secrets 20] [--rules gitleaks.toml]

Speeds are medians of CPU time of one process, so that neighbours on the machine count little. `--rules` takes the rules
of gitleaks (its config/gitleaks.toml; they are RE2, too) and asks of the same secrets how many its expressions find,
without its entropy limits and lists of exceptions, which can only find fewer.
"""

import argparse
import collections
import json
import random
import statistics
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXTS = ROOT.parent / "shared" / "data" / "text"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import re2  # noqa: E402
from secret_grammar import ENCODINGS, FORMATS, SURROUNDINGS, fill, leaked, secret_of  # noqa: E402

from codex_accel import safety  # noqa: E402

LINE = {
    "time": "2026-11-22T20:00:00.000+00:00", "kind": "save", "process": 0, "message": "step-000000100 is saved",
    "step": 100, "path": "runs/first/checkpoints/step-000000100", "duration_s": 0.31,
}  # fmt: skip


def corpora() -> dict[str, str]:
    names = ("alice_pg11_utf8.txt", "botchan.txt", "tinyshakespeare.txt", "wikitext2_valid.txt")
    lines = {
        name: (TEXTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for name in ("python311_stdlib", "udhr_20lang")
    }
    return {
        "English prose": "".join((TEXTS / name).read_text(encoding="utf-8-sig") for name in names),
        "Python's library": "\n".join(json.loads(line)["text"] for line in lines["python311_stdlib"]),
        "20 languages": "\n".join(json.loads(line)["text"] for line in lines["udhr_20lang"]) * 10,
    }


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    def once() -> float:
        begun = time.process_time()
        work()
        return time.process_time() - begun

    return statistics.median(once() for _ in range(repeats))


def speeds(repeats: int) -> None:
    safety.mask("password=warm-up-1")
    for name, text in corpora().items():
        lines = text.splitlines()
        size = len(text.encode())
        whole = cpu_seconds(lambda text=text: safety.mask(text), repeats)
        by_line = cpu_seconds(lambda lines=lines: [safety.mask(line) for line in lines], 1)
        findings = safety.mask(text).findings
        touched = len({text.count("\n", 0, found.start) for found in findings})
        print(
            f"{name:18} {size / 1e6:6.1f} MB  whole {size / 1e6 / whole:6.1f} MB/s  line by line "
            f"{size / 1e6 / by_line:5.1f} MB/s  {touched} of {len(lines)} lines touched"
        )
    prose = corpora()["English prose"][:40_000]
    pieces = [prose[start : start + 4] for start in range(0, len(prose), 4)]

    def stream() -> None:
        masker = safety.StreamMasker()
        for piece in pieces:
            masker.feed(piece)
        masker.flush()

    text = json.dumps(LINE)[:200]
    for name, work, count in (
        ("mask, a line of 200 characters", lambda: [safety.mask(text) for _ in range(1000)], 1000),
        ("mask_json, the same before it is JSON", lambda: [safety.mask_json(LINE) for _ in range(1000)], 1000),
        ("feed of 4 characters", stream, len(pieces)),
    ):
        print(f"{name:40} {cpu_seconds(work, repeats) / count * 1e6:6.1f} us")


def reach(num_secrets: int, rules: Path | None) -> None:
    draw = random.Random(0)
    expressions = (
        [re2.compile(rule["regex"]) for rule in tomllib.loads(rules.read_text())["rules"] if "regex" in rule]
        if rules
        else []
    )
    missed: collections.Counter[str] = collections.Counter()
    by_rules = num_cases = 0
    for name in [*FORMATS, "private key"]:
        for surrounding in SURROUNDINGS.values():
            for _ in range(num_secrets if surrounding == "{s}" else 1):
                text, secret = secret_of(name, draw)
                text = surrounding.replace("{s}", text)
                num_cases += 1
                missed[name] += leaked(secret, safety.mask(text).text) is not None
                by_rules += any(touches(expression, text, secret) for expression in expressions)
    total = sum(missed.values())
    print(f"plain secrets: {num_cases - total} of {num_cases} masked", {n: c for n, c in missed.items() if c})
    if rules:
        print(f"the {len(expressions)} expressions of {rules.name}: {by_rules} of {num_cases} touched")
    tokens = [name for name, form in FORMATS.items() if form.startswith("«") and form.endswith("»")]
    for encoding, encode in ENCODINGS.items():
        found = 0
        for name in tokens * num_secrets:
            text = encode(secret_of(name, draw)[0])
            masked = safety.mask(f"x {text} y").text
            found += "[SECRET]" in masked and leaked(text, masked, length=24) is None
        print(f"{encoding:24} {100 * found / (len(tokens) * num_secrets):5.1f} % of {len(tokens)} formats of tokens")
    short = {f"password={{{n}:{letters}}}": letters for n in (8, 12, 16) for letters in "AL"}
    for form in short:
        misses = sum(
            leaked(text.partition("=")[2], safety.mask(text).text) is not None
            for text in (fill(form, draw) for _ in range(2000))
        )
        print(f"{form:24} {misses / 20:5.2f} % of random values missed")


def touches(expression: object, text: str, secret: str) -> bool:
    """Whether a match covers some part of the secret."""
    start = text.index(secret) if secret in text else 0
    return any(found.start() < start + len(secret) and found.end() > start for found in expression.finditer(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--secrets", type=int, default=20, help="of each format, standing alone")
    parser.add_argument("--rules", type=Path, help="gitleaks.toml")
    options = parser.parse_args()
    speeds(options.repeats)
    reach(options.secrets, options.rules)


if __name__ == "__main__":
    main()
