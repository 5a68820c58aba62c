"""YAML text to plain values, each with the place where it was written.

Rule: a value means what it looks like. Scalars follow the YAML 1.2 core schema (`no`, `1:30` and `2024-01-01` are text,
`3e-4` is a float), and whatever could surprise is refused with its line: a duplicate key, a tag, a non-finite number,
an alias that grows without bound.
"""

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from codex_accel.errors import UserError

MAX_NODES = 10_000  # values in one file after aliases are expanded; real configs have some hundred
COMMAND_LINE = "command line"

KeyPath = tuple[str | int, ...]  # ("sources", 0, "path")

_NULL = re.compile(r"|~|null|Null|NULL")
_TRUE, _FALSE = re.compile(r"true|True|TRUE"), re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NON_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def _scalar(text: str) -> Any:
    """A plain YAML scalar by the YAML 1.2 core schema: `no` and `1:30` are strings, `3e-4` is a float."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
        return bool(_TRUE.fullmatch(text))
    if _INT.fullmatch(text) and len(text) <= 40:
        return int(text.replace("_", ""))
    if FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    return text


class _Loader(yaml.BaseLoader):
    """Leaves `!` on what has no tag, so that a written one, `!!str` too, can be told apart."""

    DEFAULT_SCALAR_TAG = DEFAULT_SEQUENCE_TAG = DEFAULT_MAPPING_TAG = "!"  # type: ignore[misc]


class Reader:
    """Walks the nodes of one YAML text into plain values; notes each value's origin and every problem."""

    def __init__(self, source: str, *, with_lines: bool):
        self.source, self.with_lines = source, with_lines
        self.origins: dict[KeyPath, str] = {}
        self.problems: list[str] = []
        self.num_nodes = 0
        self.open_nodes: set[int] = set()  # ids of the collections that we are inside of

    def origin(self, node: yaml.Node) -> str:
        """Where `node` was written, as `<file>:<line>` or the name of the source."""
        return f"{self.source}:{node.start_mark.line + 1}" if self.with_lines else self.source

    def read(self, text: str, at: KeyPath = ()) -> Any:
        """The plain value of a whole text that stands at `at`; None if it is empty. Raises: UserError if not YAML."""
        try:
            node = yaml.compose(text, Loader=_Loader)
            return self.value(node, at) if node else None
        except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:  # the last two: "\UFFFFFFFF"
            mark = getattr(error, "problem_mark", None)
            where = f"{self.source}:{mark.line + 1}" if mark and self.with_lines else self.source
            what = "nested too deeply" if isinstance(error, RecursionError) else error
            raise UserError(f"{where}: is not valid YAML ({' '.join(str(what).split())}).") from error

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        """The plain value of `node`, which stands at `path`."""
        self.num_nodes += 1
        self.origins[path] = self.origin(node)
        if self.num_nodes > MAX_NODES:
            raise UserError(f"{self.origin(node)}: more than {MAX_NODES} values once aliases (*name) are expanded.")
        if id(node) in self.open_nodes:
            raise UserError(f"{self.origin(node)}: an alias that contains itself. Write the value out.")
        if node.tag != "!":
            self.problems.append(f"{self.origin(node)}: tag {node.tag} is not allowed. Write a plain value.")
            return None
        if isinstance(node, yaml.ScalarNode):
            if node.style is None and _NON_FINITE.fullmatch(node.value):
                self.problems.append(f"{self.origin(node)}: {dotted(path)} = {node.value}: must be a finite number.")
                return float(node.value.replace(".", ""))
            value = _scalar(node.value) if node.style is None else node.value
            if isinstance(value, float) and not math.isfinite(value):
                self.problems.append(f"{self.origin(node)}: {dotted(path)} = {node.value}: is too large for a float.")
            return value
        self.open_nodes.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode)  # there is no fourth kind
            return self.mapping(node, path)
        finally:
            self.open_nodes.discard(id(node))

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        """The plain values of a mapping's keys; a duplicate key and a key that is not plain text are problems."""
        values: dict[str, Any] = {}
        first_lines: dict[str, str] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "!":
                self.problems.append(f"{self.origin(key_node)}: a key must be plain text.")
                continue
            key = key_node.value
            if key in values:
                self.problems.append(
                    f"{self.origin(key_node)}: {dotted((*path, key))}: duplicate key, first given at "
                    f"{first_lines[key]}. Remove one of them."
                )
                continue
            first_lines[key] = self.origin(key_node)
            values[key] = self.value(value_node, (*path, key))
            self.origins[(*path, key)] = self.origin(key_node)
        return values


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[KeyPath, str], list[str]]:
    """A YAML file's mapping, the origin of each value, and the problems found on the way.

    Raises: UserError if the file is missing, is not UTF-8, is not YAML or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f" Did you mean '{path.parent / near[0]}'?" if near else " Give the path of a YAML file."
        raise UserError(f"{COMMAND_LINE}: --config {path}: no such file.{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{COMMAND_LINE}: --config {path}: cannot be read as UTF-8 text ({error}).") from error
    reader = Reader(str(path), with_lines=True)
    values = reader.read(text)
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: must be a mapping of keys, not {type(values).__name__}.")
    return values, reader.origins, reader.problems


def dotted(path: Iterable[str | int]) -> str:
    """`("sources", 0, "path")` as `sources.0.path`."""
    return ".".join(str(part) for part in path)
