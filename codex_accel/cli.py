"""The command line that every script shares.

Rule: `python scripts/<stage>.py --config FILE [section.key=value ...]`, and `--name VALUE` is short for `name=VALUE`. A
mistake prints one line a problem and ends with exit code 2; `--help` imports nothing heavier than pydantic.
"""

import contextlib
import errno
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from codex_accel import config as configuration
from codex_accel import redaction
from codex_accel.config import Section, StageConfig
from codex_accel.errors import UserError

FLAGS = {
    "--config FILE": "read this YAML file; values on the command line win over it",
    "--help": "this text",
    "--print-config": "print the resolved configuration as YAML (itself a valid --config) and stop",
    "--defaults": "print every key with its default and meaning as YAML and stop",
    "--schema": "print the JSON Schema of the configuration, for editors, and stop",
}


def parse(
    model: type[StageConfig], argv: Sequence[str] | None, *, doc: str, stage: str, positional: Sequence[str] = ()
) -> Any:
    """The checked configuration for `argv` (default: the process's arguments).

    `doc` is the script's docstring, shown by `--help`; `positional` names the keys that bare arguments set, in order.

    Raises: UserError with every problem at once; SystemExit(0) after `--help` and the other printing flags.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    path: Path | None = None
    overrides: list[tuple[str, str]] = []
    problems: list[str] = []
    action = ""
    while arguments:
        argument = arguments.pop(0)
        name, has_value, value = argument.partition("=")
        if argument in ("-h", "--help", "--print-config", "--defaults", "--schema"):
            action = action or argument
        elif name == "--config":
            if not has_value and not arguments:
                problems.append("command line: --config: needs a file. Give --config configs/<recipe>/<stage>.yaml.")
                continue
            path = Path(value if has_value else arguments.pop(0))
        elif name.startswith("--"):
            key = name[2:].replace("-", "_")
            key = f"as_{key}" if f"as_{key}" in model.model_fields else key  # --json, a name that pydantic takes
            if has_value:
                overrides.append((key, value))
            elif _is_bool(model, key) and not (arguments and arguments[0] in ("true", "false")):
                overrides.append((key, "true"))
            elif arguments and not arguments[0].startswith("--"):
                overrides.append((key, arguments.pop(0)))
            else:
                problems.append(f"command line: {argument}: needs a value. Write {argument} VALUE or {key}=VALUE.")
        elif has_value:
            overrides.append((name, value))
        elif unset := [key for key in positional if all(key != given for given, _ in overrides)]:
            overrides.append((unset[0], argument))
        elif positional:
            what = f"{' and '.join(positional)} {'is' if len(positional) == 1 else 'are'} already given"
            problems.append(f"command line: {argument!r}: {what}. Run once for each.")
        else:
            problems.append(f"command line: {argument!r}: is not of the form section.key=value. See --help.")
    if action in ("-h", "--help"):
        _stop(lambda: _print_help(model, doc, stage))
    if action == "--schema":
        _stop(lambda: print(json.dumps(model.model_json_schema(), indent=2)))
    if action == "--defaults":
        _stop(lambda: print(base_yaml(model, doc.strip().splitlines()[0]), end=""))
    try:
        config = configuration.load(model, path=path, overrides=overrides)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if problems:
        raise UserError(*problems)
    redaction.enforce(config.safety)
    if redaction.is_bypassed() and is_main_process():
        print(f"warning: secrets are not masked: {redaction.reason()}", file=sys.stderr)
    if action == "--print-config":
        _stop(lambda: print(configuration.to_yaml(config.model_dump(mode="json")), end=""), ours=False)
    return config


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call a script's `main` and end the process: 0 or what `main` returns, 2 for a user's mistake, 130 for Ctrl-C.

    Secrets are masked in all that is printed.
    """
    redaction.watch_console()
    code = 0
    try:
        code = main() or 0
        _flush()
    except UserError as error:
        prefix = "" if is_main_process() else f"[process {os.environ['RANK']}] "
        for problem in error.problems:
            print(f"{prefix}error: {problem}", file=sys.stderr)
        code = 2
    except BrokenPipeError:  # `... --help | head`: the reader has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise  # a defect of ours, or one that has its own line above
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror}. Mend the disk or the permissions and run again.", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def is_main_process() -> bool:
    """Whether this is the process that speaks to the user (launchers set RANK)."""
    return os.environ.get("RANK", "0") == "0"


def _stop(show: Callable[[], None], *, ours: bool = True) -> NoReturn:
    """Print what was asked for and end; `ours` is text that holds nothing of the user's."""
    if is_main_process():
        with contextlib.redirect_stdout(redaction.unfiltered(sys.stdout) if ours else sys.stdout):
            show()
        _flush()  # a reader that has gone shows here, not when the interpreter ends
    sys.exit(0)


def _flush() -> None:
    if sys.stdout is not None:  # None: closed by whoever started the process
        sys.stdout.flush()


def _is_bool(model: type[Section], key: str) -> bool:
    return any(known.key == key and known.type == "bool" for known in configuration.keys_of(model))


def _print_help(model: type[StageConfig], doc: str, stage: str) -> None:
    width = min(120, shutil.get_terminal_size().columns)

    def wrapped(text: str, indent: int, hang: int = 0) -> str:
        first, others = " " * indent, " " * (indent + hang)
        return textwrap.fill(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)

    print(f"usage: python scripts/{stage}.py --config FILE [section.key=value ...]\n\n{doc.strip()}\n\nFlags")
    for flag, meaning in FLAGS.items():
        print(wrapped(f"{flag:<16}  {meaning}", 2, 18))
    print("\nKeys; --name VALUE is short for name=VALUE")
    for key in configuration.keys_of(model):
        print(f"  {key.key}  ({key.type}, {'required' if key.default is None else f'default {key.default}'})")
        print(wrapped(key.meaning, 6))


def base_yaml(model: type[Section], title: str) -> str:
    """Every key with its default and meaning: the text of `configs/base/<stage>.yaml`."""
    return f"# {title}\n# Every key, its default, its meaning. Generated by `make configs`.\n" + "".join(
        _base_lines(model, 0)
    )


def _base_lines(model: type[Section], depth: int) -> Iterator[str]:
    pad = "  " * depth
    for name, field in model.model_fields.items():
        section = configuration.section_of(field.annotation)
        if section and configuration.is_section(field.annotation):
            yield f"\n{pad}{name}:\n"
            yield from _base_lines(section, depth + 1)
            continue
        key = next(k for k in configuration.keys_of(model) if k.key == name)
        if key.default is None:
            yield f"{pad}# {name}:  # required: {key.meaning} ({key.type})\n"
        else:
            yield f"{pad}{name}: {key.default}  # {key.meaning} ({key.type})\n"
        for inner in configuration.keys_of(section) if section else ():
            default = "required" if inner.default is None else inner.default
            yield f"{pad}#   {inner.key}: {default}  # {inner.meaning} ({inner.type})\n"
