"""A configuration: YAML file plus command-line overrides, checked, every value with its origin.

Rule: all problems of a configuration are collected and raised once, each with where it was written (file:line or
"command line"), the value, and what to do. Nothing here imports torch or a model library.
"""

import difflib
import itertools
import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pydantic
import yaml

from codex_accel.errors import UserError
from codex_accel.yaml_reader import COMMAND_LINE, FLOAT, KeyPath, Reader, dotted, read_yaml

# Keys of other toolkits, and old keys of ours, by their last part: what to write here instead.
RENAMED = {
    "lr": "learning_rate",
    "num_train_epochs": "max_epochs",
    "epochs": "max_epochs",
    "num_epochs": "max_epochs",
    "total_steps": "max_steps",
    "batch_size_per_device": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size (accumulation = global / micro_batch_size / processes)",
    "max_seq_length": "block_size",
    "seq_length": "block_size",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "name (in the section 'schedule')",
    "max_norm": "max_grad_norm",
    "gradient_clipping": "max_grad_norm",
    "save_steps": "every_steps (in the section 'checkpoint')",
    "eval_steps": "every_steps (in the section 'evaluation')",
    "logging_steps": "every_steps (in the section 'log')",
    "save_total_limit": "keep_last (in the section 'checkpoint')",
    "model_name_or_path": "path (in the section 'model')",
}


class Section(pydantic.BaseModel):
    """A group of keys. Types are strict (`"3"` is not 3) and unknown keys are errors."""

    model_config = pydantic.ConfigDict(
        extra="forbid", strict=True, validate_default=True, frozen=True, defer_build=True
    )


class Safety(Section):
    """Masking of secrets in everything that a stage writes; see docs/safety.md."""

    policy: typing.Annotated[str, pydantic.Field(min_length=1)] | None = pydantic.Field(
        None, description="File of rules; null: all families of secrets, masked"
    )
    bypass_reason: str | None = pydantic.Field(
        None, description="Why secrets are not masked, which is recorded; null: they are masked"
    )


class StageConfig(Section):
    """What every stage's root has; knows where each of its values was written."""

    schema_version: typing.Literal[1] = pydantic.Field(1, description="Version of the configuration format")
    allow_network: bool = pydantic.Field(False, description="Let libraries reach the network; recorded in the manifest")
    verify: bool = pydantic.Field(True, description="Check the SHA-256 manifests of inputs first; recorded")
    safety: Safety = Safety()
    _origins: dict[KeyPath, str] = pydantic.PrivateAttr(default_factory=dict)

    def problem(self, key: str, what: str) -> str:
        """A problem line for the dotted `key`, with its value's origin, for checks that need more than the schema."""
        path = _key_path(key)
        return f"{_origin(path, self._origins)}: {key}: {what}"


# --- overrides ----------------------------------------------------------------------------------------------------


def _key_path(key: str) -> KeyPath:
    return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in key.split("."))


def apply_overrides(
    values: dict[str, Any],
    origins: dict[KeyPath, str],
    overrides: Iterable[tuple[str, str]],
    *,
    text_keys: set[str],
    null_keys: set[str],
) -> list[str]:
    """Set each `section.key` to its text, read as YAML, in place; returns the problems.

    A key in `text_keys` takes its text as it stands, so that a prompt may hold colons and brackets.
    """
    problems: list[str] = []
    for key, text in overrides:
        path = _key_path(key)
        reader = Reader(COMMAND_LINE, with_lines=False)
        try:
            name = re.sub(r"\.\d+\.", "[].", key)
            literal = name in text_keys and not (text == "null" and name in null_keys)
            value = text if literal else reader.read(text, path)
        except UserError as error:
            problems.append(f"{error} (in {key}={text})")
            continue
        problems += reader.problems
        target: Any = values
        for part, following in itertools.pairwise(path):
            if isinstance(target, list) and isinstance(part, int) and part <= len(target):
                target += [{}] if part == len(target) else []
                target = target[part]
            elif isinstance(target, dict):
                if not isinstance(target.get(str(part)), dict | list):
                    target[str(part)] = [] if isinstance(following, int) else {}
                target = target[str(part)]
            else:
                target = None
                break
        last = path[-1]
        if isinstance(target, list) and isinstance(last, int) and last <= len(target):
            target[last : last + 1] = [value]
        elif isinstance(target, dict):
            target[str(last)] = value
        else:
            problems.append(f"{COMMAND_LINE}: {key}: no such place in the configuration. Give the whole list instead.")
            continue
        for old in [known for known in origins if known[: len(path)] == path]:
            del origins[old]  # of what was replaced
        origins |= {path: COMMAND_LINE, **reader.origins}
        for end in range(1, len(path)):  # sections that the file does not have
            origins.setdefault(path[:end], COMMAND_LINE)
    return problems


# --- checking -----------------------------------------------------------------------------------------------------


def _origin(path: KeyPath, origins: dict[KeyPath, str]) -> str:
    """Where the value at `path`, or the nearest thing around it, was written."""
    for end in range(len(path), -1, -1):
        if path[:end] in origins:
            return origins[path[:end]]
    return COMMAND_LINE


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """` Did you mean 'x'?` for a near miss, the list of choices otherwise."""
    choices = list(choices)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"Did you mean '{near[0]}'?" if near else f"Choose from: {', '.join(choices)}."


def _model_at(model: type[Section], path: KeyPath) -> type[Section] | None:
    """The section class that stands at `path` below `model`."""
    current: Any = model
    is_name = False  # of a section in a mapping
    for part in path:
        if isinstance(part, int) or is_name:
            is_name = False
            continue  # a list or mapping was already unwrapped to its section
        if not (isinstance(current, type) and issubclass(current, Section)) or part not in current.model_fields:
            return None
        annotation = current.model_fields[part].annotation
        current, is_name = section_of(annotation), typing.get_origin(annotation) is dict
    return current if isinstance(current, type) and issubclass(current, Section) else None


def _is_mapping(field: Any) -> bool:
    """Whether a field holds sections by name."""
    return typing.get_origin(field.annotation) is dict and section_of(field.annotation) is not None


def is_section(annotation: Any) -> bool:
    """Whether a field is one section itself, not a list of them or an optional one."""
    return isinstance(annotation, type) and issubclass(annotation, Section)


def section_of(annotation: Any) -> type[Section] | None:
    """The section class inside an annotation such as `list[Source]` or `Source | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in typing.get_args(annotation):
        if found := section_of(argument):
            return found
    return None


def shown_value(value: Any) -> str:
    """A value as problems show it: whole, or its length, since a piece of a secret would not be known as one."""
    written = repr(value)
    return written if len(written) <= 200 else f"({len(written):,} characters)"


def _explain(error: Any, model: type[Section], origins: dict[KeyPath, str]) -> str:
    """One pydantic error as one line in our words."""
    path: KeyPath = tuple(error["loc"])
    kind, value = error["type"], error["input"]
    if not path:
        what = str(error["ctx"]["error"]) if kind == "value_error" else error["msg"]
        return f"{_origin((), origins)}: {what}"
    where = f"{_origin(path, origins)}: {dotted(path)}"
    if path[-1] == "[key]":
        return f"{_origin(path, origins)}: {dotted(path[:-2])}: {value!r} is no name. Use letters, digits, - and _."
    if kind == "extra_forbidden":
        section = _model_at(model, path[:-1])
        known = list(section.model_fields) if section else []
        name = str(path[-1])
        if name in RENAMED and name not in known:
            return f"{where}: unknown key; here it is called {RENAMED[name]}."
        elsewhere = [key.key for key in keys_of(model) if key.key.split(".")[-1] == name]
        if elsewhere and not difflib.get_close_matches(name, known, n=1, cutoff=0.6):
            return f"{where}: unknown key here. Did you mean '{elsewhere[0]}'?"
        return f"{where}: unknown key. {did_you_mean(name, known)}"
    if kind == "missing":
        section = _model_at(model, path[:-1])
        field = section.model_fields.get(str(path[-1])) if section else None
        meaning = f" ({field.description})" if field and field.description else ""
        return f"{where}: required and not given{meaning}. Add it to the file or give {dotted(path)}=..."
    shown = shown_value(value)
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"]) or [error["ctx"]["expected"]]
        hint = did_you_mean(value, choices) if isinstance(value, str) else f"Choose from: {', '.join(choices)}."
        return f"{where} = {shown}: is not a choice. {hint}"
    if kind == "value_error":
        return f"{where} = {shown}: {error['ctx']['error']}"
    message = error["msg"].removeprefix("Input ")
    return (
        f"{where} = {shown}: {message}, not {type(value).__name__}."
        if "_type" in kind
        else f"{where} = {shown}: {message}."
    )


def build(model: type[StageConfig], values: dict[str, Any], origins: dict[KeyPath, str], problems: list[str]) -> Any:
    """Check `values` against `model`; raises UserError with `problems` and all that it finds itself."""
    try:
        config = model.model_validate(values)
    except pydantic.ValidationError as error:
        lines = [_explain(item, model, origins) for item in error.errors(include_url=False)]
        raise UserError(*problems, *dict.fromkeys(lines)) from None
    if problems:
        raise UserError(*problems)
    config._origins.update(origins)
    return config


def load(model: type[StageConfig], *, path: Path | None, overrides: Iterable[tuple[str, str]] = ()) -> Any:
    """The checked configuration of a stage from its file (or none) and the command line's `key=value` pairs."""
    values, origins, problems = read_yaml(path) if path else ({}, {}, [])
    overrides = list(overrides)
    null_keys = {key.key for key in keys_of(model) if key.type == "text|null"}
    text_keys = {key.key for key in keys_of(model) if key.type in ("text", "text|null")}
    for name, field in model.model_fields.items():
        for given in {key.split(".")[1] for key, _ in overrides if key.startswith(f"{name}.") and _is_mapping(field)}:
            for keys in (text_keys, null_keys):
                keys |= {key.replace("<name>", given) for key in keys if key.startswith(f"{name}.<name>.")}
    problems += apply_overrides(values, origins, overrides, text_keys=text_keys, null_keys=null_keys)
    return build(model, values, origins, problems)


# --- printing -----------------------------------------------------------------------------------------------------


class Key(typing.NamedTuple):
    """One line of the help: the dotted name, the type in words, the default as YAML (None: required), the meaning."""

    key: str
    type: str
    default: str | None
    meaning: str


def _type_words(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return "|".join(str(a) for a in arguments)
    if origin is typing.Annotated:
        return _type_words(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return "|".join(_type_words(a) for a in arguments)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_words(a) for a in arguments)}]"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    return {"NoneType": "null", "str": "text"}.get(
        getattr(annotation, "__name__", ""), getattr(annotation, "__name__", "any")
    )


class _Dumper(yaml.SafeDumper):
    """Writes text so that `yaml_reader` reads it back as the same text."""


# PyYAML follows YAML 1.1, where the texts "3e-4" and "08" are no numbers and need no quotes, and folds the line breaks
# of Unicode to spaces.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{FLOAT.pattern})$"), list("-+.0123456789"))
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style='"' if re.search("[\n\r\x85\u2028\u2029\ufeff]", text) else None
    ),
)


def to_yaml_value(value: Any) -> str:
    """A value on one line of YAML, in the form that `_scalar` reads back."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def keys_of(model: type[Section], prefix: str = "") -> Iterator[Key]:
    """Every key of a stage, depth first, sections unfolded; a list of sections shows as `name[].key`."""
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if section and is_section(field.annotation):
            yield from keys_of(section, f"{prefix}{name}.")
            continue
        shown = None if field.is_required() else to_yaml_value(default)
        yield Key(f"{prefix}{name}", _type_words(field.annotation), shown, field.description or "")
        if section is not None:
            mark = {list: "[]", dict: ".<name>"}.get(typing.get_origin(field.annotation), "")  # type: ignore[arg-type]
            yield from keys_of(section, f"{prefix}{name}{mark}.")


def to_yaml(values: dict[str, Any]) -> str:
    """The plain values of a resolved configuration as YAML that `load` reads back to an equal configuration."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
