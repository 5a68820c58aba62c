"""Look into a tokenizer: validate it, encode and decode text, or list what is at hand.

examples:
  python scripts/inspect_tokenizer.py validate --tokenizer DIR --file '{path: texts.jsonl}' --by lang --reference DIR2
  python scripts/inspect_tokenizer.py encode --tokenizer runs/quickstart/tokenizer --text "def main("
  python scripts/inspect_tokenizer.py decode --tokenizer runs/quickstart/tokenizer --ids "[70, 71, 72]"
  python scripts/inspect_tokenizer.py list

`encode` and `decode` read standard input, line by line, if no text or ids are given. `validate` ends with exit code 1
if a model should not be trained with this tokenizer.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from codex_accel import cli, offline
from codex_accel.errors import UserError
from codex_accel.schema import InspectConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    config = cli.parse(InspectConfig, argv, doc=__doc__, stage="inspect_tokenizer", positional=["action"])
    offline.enforce(allow_network=config.allow_network)
    return {"validate": validate, "encode": encode, "decode": decode, "list": list_places}[config.action](config)


def validate(config: InspectConfig) -> int:
    """Print compression by group and every reason against the tokenizer."""
    from codex_accel import inspection, tokenizer

    checked = tokenizer.load(Path(config.tokenizer or ""))
    reference = None if config.reference is None else tokenizer.load(Path(config.reference), key="reference")
    problems = inspection.problems_of(checked, model=None if config.model is None else Path(config.model))
    found = inspection.measure(checked, _texts(config))
    others = {} if reference is None else inspection.measure(reference, _texts(config))
    if not found:
        raise UserError(config.problem("file", "holds no record, only blank lines. Check the file."))

    print(f"tokenizer  {config.tokenizer}  {checked.vocab_size} ids, encodes with {checked.engine}")
    if reference is not None:
        print(f"reference  {config.reference}  {reference.vocab_size} ids, encodes with {reference.engine}")
    width = max(len(group) for group in (*found, config.by or "group", "all"))
    title = f"{config.by or 'group':<{width}}  {'texts':>9}  {'bytes':>13}  {'tokens':>12}  {'bytes/token':>11}"
    print(title + (f"  {'reference':>9}  {'ratio':>5}" if others else "") + f"  {'unknown':>8}  {'changed':>8}")
    rows = [*sorted(found.items()), ("all", inspection.total(found.values()))]
    others["all"] = inspection.total(others.values())
    for group, measure in rows:
        line = f"{group:<{width}}  {measure.num_texts:>9,}  {measure.num_bytes:>13,}  {measure.num_tokens:>12,}"
        line += f"  {measure.bytes_per_token:>11.3f}"
        if reference is not None:
            other = others[group].bytes_per_token
            line += f"  {other:>9.3f}  {measure.bytes_per_token / other if other else 0:>5.2f}"
        print(f"{line}  {measure.num_unknown:>8,}  {measure.num_changed:>8,}")

    every = rows[-1][1]
    if every.num_changed:
        problems.append(f"{every.num_changed} texts do not come back, the first is {every.first_changed[:60]!r}")
    for problem in problems:
        print(f"✗ {problem}")
    print("✓ nothing speaks against it" if not problems else f"{len(problems)} problem{'s' * (len(problems) > 1)}")
    return 1 if problems else 0


def _texts(config: InspectConfig) -> Iterator[tuple[str, str]]:
    """(group, text) of each record of the file."""
    from codex_accel import records, sources, vocabulary

    for raw in sources.resolve([config.file], config_problem=config.problem, key="file"):
        reader = records.Reader(sources.whole(raw), max_record_bytes=1 << 30, key=config.by, render=vocabulary.contents)
        for record in reader:
            if isinstance(record, records.BadRecord):
                raise UserError(f"{record.file}:{record.line}: {record.reason}. Mend it or leave the file out.")
            yield record.key or "", "".join(part.text for part in record.parts)


def _lines() -> Iterator[str]:
    """Lines of standard input without their ends."""
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input:{number}: not UTF-8 ({error.reason}). Convert it first.") from None


def encode(config: InspectConfig) -> int:
    """Print the ids of each text, one text a line."""
    from codex_accel import tokenizer

    if config.text is not None and not config.text.isascii():
        try:
            config.text.encode()
        except UnicodeEncodeError:  # how Python hands over the bytes of an argument that are not UTF-8
            raise UserError(config.problem("text", "is not UTF-8. Convert it, or write it in UTF-8.")) from None
    loaded = tokenizer.load(Path(config.tokenizer or ""))
    for text in _lines() if config.text is None else [config.text]:
        print(*loaded.encode([text])[0])
    return 0


def decode(config: InspectConfig) -> int:
    """Print the text of each list of ids."""
    from codex_accel import tokenizer

    loaded = tokenizer.load(Path(config.tokenizer or ""))
    for number, ids in enumerate(_ids() if config.ids is None else [config.ids], 1):
        if beyond := [token for token in ids if token >= loaded.vocab_size]:
            what = f"id {beyond[0]} is none of the {loaded.vocab_size} of '{config.tokenizer}'. Give ids of it."
            raise UserError(f"standard input:{number}: {what}" if config.ids is None else config.problem("ids", what))
        print(loaded.decode(ids))
    return 0


def _ids() -> Iterator[list[int]]:
    """Lists of ids from standard input, as JSON or with spaces between."""
    for number, line in enumerate(_lines(), 1):
        try:
            ids = json.loads(line) if line.lstrip().startswith("[") else [int(word) for word in line.split()]
        except (ValueError, RecursionError):  # the second from a thousand brackets
            ids = None
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise UserError(f"standard input:{number}: is no list of ids. Write such as 12 5 7, or [12, 5, 7].")
        yield ids


def list_places(config: InspectConfig) -> int:
    """Print every tokenizer and model in the folders and in the cache, and what each lacks."""
    from huggingface_hub import constants

    from codex_accel import inspection

    for folder in config.folders:
        print(f"{folder}{os.sep}" if Path(folder).is_dir() else f"{folder}: no such folder")
        for place in inspection.below(Path(folder)):
            print(f"  {inspection.describe(place)}")
    cache = Path(constants.HF_HUB_CACHE)
    places = list(inspection.cached(cache))
    print(f"{cache}{os.sep}" if places else f"{cache}: nothing is cached")
    for place in places:
        print(f"  {inspection.describe(place)}")
    return 0


if __name__ == "__main__":
    cli.run(main)
