"""Records out of raw files, by field mapping: every value is a record or a located bad record.

Rule: nothing is dropped in silence, equal content has an equal id wherever it lies, and a reason repeats no data.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from codex_accel import files, formats, reasons
from codex_accel.errors import UserError
from codex_accel.lines import Reading
from codex_accel.schema import Source
from codex_accel.sources import RawFile, Unit


class Part(NamedTuple):
    """A stretch of a document."""

    text: str
    is_target: bool
    is_special: bool = False  # placed by a chat template, and the name of a special token


@dataclass
class Record:
    """One document before tokenization: its parts in order. Not frozen: that takes a tenth of the time to read one."""

    file: str
    line: int  # 1-based, of its first line; Parquet: of its row
    parts: tuple[Part, ...]  # (prompt, completion), (text,) or what a chat template made
    key: str | None = None  # value of split.key

    @functools.cached_property
    def id(self) -> bytes:
        """16 bytes of SHA-256 over the content: of each part a byte of flags, the length in 8 bytes and its UTF-8."""
        pieces = []
        for text, is_target, is_special in self.parts:
            data = text.encode()
            pieces += [bytes((is_target + 2 * is_special,)), len(data).to_bytes(8, "big"), data]
        return hashlib.sha256(b"".join(pieces)).digest()[:16]


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record that cannot be used, and why."""

    file: str
    line: int
    reason: str  # `<kind>: <detail>`, or the kind alone; of kinds there are few, so they can be counted


Render = Callable[[list[dict[str, str]]], tuple[Part, ...]]
Shape = Callable[[Any], tuple[tuple[Part, ...], str | None]]  # of a value: (parts, key); raises ValueError


class Reader:
    """Iterates over the records of one unit; `num_bytes` raw bytes have gone through so far.

    `render` turns messages into parts, and raises ValueError for those that it cannot take. Raises: UserError, from the
    iteration too: if the file has changed since the unit was cut, is damaged, or is not of its format.
    """

    def __init__(self, unit: Unit, *, max_record_bytes: int, key: str | None = None, render: Render | None = None):
        source = unit.raw.source
        if source.messages is not None and render is None:
            what = "messages need a chat template, and none is used here. Name text, or prompt and completion"
            raise UserError(f"{unit.raw.path}: {what}.")
        self.unit = unit
        self._reading = Reading(max_record_bytes, fields=tuple(_mapped(source, key)), present=tuple(source.required))
        self._shape = _text if unit.raw.format == "text" else _shape(source, key, render)

    @property
    def num_bytes(self) -> int:
        """Raw bytes consumed so far."""
        return self._reading.num_bytes

    def __iter__(self) -> Iterator[Record | BadRecord]:
        file, shape = str(self.unit.raw.path), self._shape
        self._reading.num_bytes = 0
        for line, value in formats.FORMATS[self.unit.raw.format](self.unit, self._reading):
            try:
                if isinstance(value, ValueError):
                    raise value
                parts, key = shape(value)
            except ValueError as error:
                yield BadRecord(file, line, str(error))
            else:
                yield Record(file, line, parts, key)


def describe(raw: RawFile) -> dict[str, Any]:
    """How a manifest records a raw file that was read whole."""
    size, digest = raw.path.stat().st_size, files.sha256_file(raw.path)
    return {"path": str(raw.path), "format": raw.format, "size": size, "sha256": digest}


# --- field mapping ------------------------------------------------------------------------------------------------


def _mapped(source: Source, key: str | None) -> list[str]:
    """Names of the fields that are used, the parts first and the key last."""
    if source.messages is not None:
        parts = [source.messages]
    elif source.prompt is not None and source.completion is not None:
        parts = [source.prompt, source.completion]
    else:
        parts = [source.text]
    return parts if key is None else [*parts, key]


def _text(value: str) -> tuple[tuple[Part, ...], None]:
    return (Part(value, True),), None


def _shape(source: Source, key: str | None, render: Render | None) -> Shape:
    """What makes parts and key of a value of this source."""
    validate = _validator(source, key)
    names = _mapped(source, key)
    wrap = source.text == "value" and source.messages is None and source.prompt is None
    key_name = () if key is None else (key,)

    def shape(value: Any) -> tuple[tuple[Part, ...], str | None]:
        if not isinstance(value, dict):
            if not wrap:
                raise ValueError(f"a JSON {_type(value)}, not an object")
            value = {"value": value}
        try:
            validate(value)
        except ValidationError as error:
            raise ValueError(_reason(error, value, source.messages)) from None
        for name in key_name if render and source.messages else names:
            if not value[name].isascii():
                _require_unicode(value[name], name)
        found = None if key is None else value[key]
        if source.messages is not None and render is not None:
            return _conversation(value[source.messages], source.messages, render), found
        target = value[names[0]] if source.prompt is None else value[names[1]]
        if not target:
            raise ValueError(f"field {source.completion or source.text!r} is empty, so nothing is a target")
        if source.prompt is None:
            return (Part(target, True),), found
        return (Part(value[source.prompt], False), Part(target, True)), found

    return shape


def _conversation(messages: list[dict[str, Any]], name: str, render: Render) -> tuple[Part, ...]:
    """Parts of messages that have the right shape; raises ValueError if nothing in them is a target."""
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    for turn in turns:
        _require_unicode(turn["role"], name)
        _require_unicode(turn["content"], name)
    if not any(turn["role"] == "assistant" and turn["content"] for turn in turns):
        raise ValueError(f"field {name!r} has no assistant message with text, so nothing is a target")
    parts = render(turns)
    if not any(part.text and part.is_target for part in parts):
        raise ValueError("the chat template makes no text a target")
    return parts


def _require_unicode(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field {name!r} holds a lone surrogate: at character {error.start + 1}") from None


# --- what a record must look like ---------------------------------------------------------------------------------


class Message(BaseModel):
    """A turn of a conversation; other keys are ignored."""

    model_config = ConfigDict(strict=True)
    role: str
    content: str


def _not_null(value: Any) -> Any:
    if value is None:
        raise ValueError("null")
    return value


def _validator(source: Source, key: str | None) -> Callable[[Any], Any]:
    """The check of a record by a pydantic model made for this source; names of fields stand as aliases, being free."""
    types: dict[str, Any] = dict.fromkeys(_mapped(source, key), str)
    types |= {name: Annotated[Any, AfterValidator(_not_null)] for name in source.required if name not in types}
    if source.messages is not None:
        types[source.messages] = Annotated[list[Message], Field(min_length=1)]
    fields: Any = {f"field_{n}": (type_, Field(alias=name)) for n, (name, type_) in enumerate(types.items())}
    model = create_model("Value", __config__=ConfigDict(strict=True, extra="ignore"), **fields)
    return TypeAdapter(model).validator.validate_python


def _reason(error: ValidationError, value: dict[str, Any], messages: str | None) -> str:
    """The first fault that pydantic found, in a line without the data."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    name, kind = fault["loc"][0], fault["type"]
    if len(fault["loc"]) == 1 and kind == "missing":
        return f"no field {name!r}: there are {reasons.names(list(value))}"
    if kind == "value_error":
        return f"field {name!r} is null"
    if name == messages:
        return f"field {name!r} is no list of messages: {_message_fault(value[messages], fault)}"
    return f"field {name!r} is of type {_type(value[str(name)])}, not text"


def _message_fault(messages: Any, fault: Any) -> str:
    if len(fault["loc"]) == 1:
        return "it is empty" if fault["type"] == "too_short" else f"it is of type {_type(messages)}"
    place, *field = fault["loc"][1:]
    if not field:
        return f"message {place + 1} is of type {_type(messages[place])}, not an object"
    if fault["type"] == "missing":
        return f"message {place + 1} has no {field[0]!r}"
    return f"{field[0]!r} of message {place + 1} is of type {_type(messages[place][field[0]])}, not text"


def _type(value: Any) -> str:
    return "null" if value is None else type(value).__name__
