"""Prompts: read from lines of JSON, and encoded as the beginning of a document is in training.

Rule: a prompt gets the ids that it had, or would have had, in a prepared dataset; text never becomes a special token;
and a line that is no prompt is located, with a reason that does not repeat its data.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codex_accel import chat, documents, formats, json_values, reasons, sources
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import Sampling
from codex_accel.lines import BOM, Reading
from codex_accel.records import Part, Record, Render
from codex_accel.schema import Source
from codex_accel.tokenizer import Tokenizer, read_template

STDIN = "standard input"
MAX_LINE_BYTES = 1 << 30
TOLD = 20  # bad lines that an error names
Messages = Sequence[Mapping[str, str]]  # {role, content}


@dataclass(frozen=True)
class Prompt:
    """A line of a file of prompts: a text, or messages that wait for an answer."""

    place: str  # file:line
    text: str | None
    messages: tuple[dict[str, str], ...] | None = None
    id: Any = None  # as given

    @property
    def given(self) -> dict[str, Any]:
        """What the answer repeats of it."""
        id_ = {} if self.id is None else {"id": self.id}
        return id_ | ({"prompt": self.text} if self.messages is None else {"messages": list(self.messages)})


# --- ids ----------------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: Tokenizer, text: str, *, add_bos: bool = True) -> tuple[int, ...]:
    """Ids of a text to go on from, after BOS where the tokenizer has one; empty if there is neither."""
    return _encode(tokenizer, (Part(text, is_target=False),), add_bos=add_bos)


def encode_chat(
    tokenizer: Tokenizer, messages: Messages, *, template_file: str | None = None, add_bos: bool = True
) -> tuple[int, ...]:
    """Ids of messages that wait for an answer, by the chat template in `template_file`, or the tokenizer's own.

    Special tokens are the template's, and BOS before them as `prepare_data` puts it: if the template has placed none.

    Raises: UserError if there is no template; ValueError, with a reason without data, for messages that it refuses.
    """
    render = _render_of(tokenizer, template_file, is_prompt=True)
    return _encode(tokenizer, render([dict(message) for message in messages]), add_bos=add_bos)


def turn_end_ids(tokenizer: Tokenizer, *, template_file: str | None = None) -> tuple[int, ...]:
    """The special token that ends the assistant's words in the chat template, which need not be EOS; () without one."""
    name = chat.turn_end(_render_of(tokenizer, template_file, is_prompt=False))
    return () if name is None else (tokenizer.special_ids[name],)


def _encode(tokenizer: Tokenizer, parts: tuple[Part, ...], *, add_bos: bool) -> tuple[int, ...]:
    found, _ = documents.encode(tokenizer, [Record("", 0, parts)], add_bos=add_bos, add_eos=False)
    return tuple(found.input_ids.tolist())


def _render_of(tokenizer: Tokenizer, template_file: str | None, *, is_prompt: bool) -> Render:
    text = tokenizer.chat_template if template_file is None else read_template(Path(template_file))
    if text is None:
        what = "has no chat template, which messages need. Give plain prompts, or a tokenizer with a template."
        raise UserError(f"{tokenizer.folder}: {what}")
    return _render(template_file or str(tokenizer.folder), text, (*tokenizer.template_facts.items(),), is_prompt)


@functools.lru_cache(maxsize=16)
def _render(where: str, text: str, facts: tuple[tuple[str, Any], ...], is_prompt: bool) -> Render:
    return chat.template(text, where=where, is_prompt=is_prompt, **dict(facts))


# --- files of prompts -----------------------------------------------------------------------------------------------


def read(path: str, *, plain: bool, config: Any, key: str = "prompts") -> list[Prompt]:
    """The prompts of a file, of which each line is JSON, or plain text; blank ones are none.

    Raises: UserError with the lines that are no prompts, and if there are no lines.
    """
    source = Source(path=path, format="text" if plain else "jsonl")
    raws = sources.resolve([source], config_problem=config.problem, key=key)
    reading = Reading(max_record_bytes=MAX_LINE_BYTES)
    lines = ((raw, formats.FORMATS[raw.format](sources.whole(raw), reading)) for raw in raws)
    return _prompts(((f"{raw.path}:{line}", value) for raw, values in lines for line, value in values), path)


def read_stdin(lines: Iterable[bytes], *, plain: bool) -> list[Prompt]:
    """The same, of lines of bytes."""
    return _prompts(((f"{STDIN}:{number}", value) for number, value in _values(lines, plain=plain)), STDIN)


def _values(lines: Iterable[bytes], *, plain: bool) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        line = (line.removeprefix(BOM) if number == 1 else line).removesuffix(b"\n").removesuffix(b"\r")
        if not line.strip():
            continue
        try:
            text = reasons.decode(line, "utf-8")
            if plain:
                reasons.refuse_nul(line)
            value = text if plain else json_values.parse(text)
        except ValueError as error:
            value = error
        yield number, value


def _prompts(values: Iterable[tuple[str, Any]], name: str) -> list[Prompt]:
    found: list[Prompt] = []
    problems: list[str] = []
    for place, value in values:
        try:
            if isinstance(value, ValueError):
                raise value
            found.append(_prompt(place, value))
        except ValueError as error:
            problems.append(f"{place}: {error}.")
    require_none(problems)
    if not found:
        raise UserError(f"{name}: holds no prompt, only blank lines. Give a line for each.")
    return found


def require_none(problems: Sequence[str]) -> None:
    """Raise UserError with the first of these lines, and how many there are."""
    if problems:
        many = "s" * (len(problems) > 1)
        raise UserError(
            *problems[:TOLD], f"{len(problems)} bad prompt{many} in all; none is left out. Mend them first."
        )


def _prompt(place: str, value: Any) -> Prompt:
    """Of an object, or a text. Raises: ValueError with the reason why it is no prompt."""
    if isinstance(value, str):
        _require_text(value, "the text")
        return Prompt(place, value)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON {type(value).__name__}, not an object")
    if settings := [name for name in value if name in Sampling.model_fields]:
        raise ValueError(f"{settings[0]!r} is a key of the configuration, which holds for all prompts")
    given = [name for name in ("prompt", "messages") if value.get(name) is not None]
    if len(given) != 1:
        what = "both 'prompt' and 'messages'" if given else "neither 'prompt' nor 'messages'"
        raise ValueError(f"{what}: there are {reasons.names(list(value))}")
    if given == ["prompt"]:
        _require_text(value["prompt"], "field 'prompt'")
        return Prompt(place, value["prompt"], id=value.get("id"))
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"field 'messages' is of type {type(messages).__name__}, or empty, not a list of messages")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} is of type {type(message).__name__}, not an object")
        for name in ("role", "content"):
            _require_text(message.get(name), f"{name!r} of message {number}")
    kept = tuple({"role": message["role"], "content": message["content"]} for message in messages)
    return Prompt(place, None, kept, id=value.get("id"))


def _require_text(value: Any, what: str) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{what} is of type {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} holds a lone surrogate: at character {error.start + 1}") from None
