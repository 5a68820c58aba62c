"""Requests and replies of the server as JSON: `/infer`, and the two of OpenAI's API that a text model can answer.

Rule: a key that would change nothing is refused, unless it says what holds anyway; nothing is cut to fit. What is wrong
is told as `{"error": {"message", "type", "param", "code"}}`, all of it at once, and values are not repeated.

The shapes of OpenAI's API: https://developers.openai.com/api/reference (completions, chat completions, models), and the
types of its client `openai`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import pydantic
from pydantic import Field

from codex_accel import json_values, reasons
from codex_accel.config import Section, did_you_mean
from codex_accel.schema import Positive
from codex_accel.yaml_reader import dotted

MAX_STOPS = 16  # stop texts of a request, and
MAX_STOP_LENGTH = 512  # characters of each
TOLD = 8  # problems that an error names
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}  # others: by hundreds


class Refused(Exception):
    """A request that is not answered: the status, a code for programs, a message for people."""

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        type_ = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": type_, "param": self.param, "code": self.code}}


def dump(value: Any) -> bytes:
    """JSON in ASCII: a control character, a lone surrogate and what turns lines around come as escapes."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode("ascii")


# --- requests --------------------------------------------------------------------------------------------------------

Messages = tuple[dict[str, str], ...]
Prompt = str | tuple[int, ...] | Messages  # text, ids, or messages that wait for an answer


@dataclass(frozen=True)
class Asked:
    """A request that is well formed. What it does not say is None."""

    prompts: tuple[Prompt, ...]
    num_each: int = 1  # texts of each prompt
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    streams: bool = False
    include_usage: bool = False

    @property
    def num_texts(self) -> int:
        """Texts that it asks for."""
        return len(self.prompts) * self.num_each


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"is a JSON {_kind(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"holds a lone surrogate at character {error.start + 1}") from None
    return value


def _kind(value: Any) -> str:
    kinds = {dict: "object", list: "array", str: "text", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or any(type(id_) is not int or id_ < 0 for id_ in value):
        raise ValueError("is neither a text nor a list of token ids")
    return tuple(value)


def _one_prompt(value: Any) -> Prompt:
    return _ids(value) if isinstance(value, list) else _text(value)


def _prompts(value: Any) -> tuple[Prompt, ...]:
    if value is None:
        return ("",)
    if isinstance(value, list) and value and all(isinstance(item, str | list) for item in value):
        return tuple(_one_prompt(item) for item in value)
    return (_one_prompt(value),)


def _stops(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    stops = tuple(_text(item) for item in (value if isinstance(value, list) else [value]))
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"is not 1 to {MAX_STOPS} texts of 1 to {MAX_STOP_LENGTH} characters each")
    return stops


def _messages(value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError("is no list of messages, or empty")
    return tuple(_message(message, number) for number, message in enumerate(value, 1))


def _message(value: Any, number: int) -> dict[str, str]:
    """{role, content}; parts of type text are joined, and keys that say nothing are left out."""
    if not isinstance(value, dict):
        raise ValueError(f"message {number} is a JSON {_kind(value)}, not an object")
    more = [key for key, item in value.items() if key not in ("role", "content") and item not in (None, [], "")]
    if more:
        raise ValueError(f"message {number} has more than role and content: {reasons.names(more)}")
    content = value.get("content")
    if isinstance(content, list):
        if any(
            not isinstance(part, dict) or part.get("type") != "text" or part.keys() - {"type", "text"}
            for part in content
        ):
            raise ValueError(f"message {number} has parts that are not of type text")
        content = "".join(_text(part.get("text")) for part in content)
    try:
        return {"role": _text(value.get("role")), "content": _text(content)}
    except ValueError as error:
        raise ValueError(f"role or content of message {number} {error}") from None


def _neutral(*allowed: Any) -> Any:
    """A key of OpenAI's API that may say only what holds here anyway."""

    def check(value: Any) -> Any:
        if not any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in (None, *allowed)):
            shown = " or ".join(map(json.dumps, allowed)) or "null"
            raise ValueError(f"is not supported here. Leave it out, or give {shown}")
        return value

    return Annotated[Any, pydantic.AfterValidator(check)]


class _StreamOptions(Section):
    include_usage: bool = False
    include_obfuscation: _neutral(False) = None  # type: ignore[valid-type]


class _Body(Section):
    """Keys that all requests share."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Positive | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[Any, pydantic.AfterValidator(_stops)] = None

    @pydantic.model_validator(mode="after")
    def _divides(self) -> "_Body":
        if self.temperature is not None and 0 < self.temperature < 1e-4:
            raise ValueError("temperature is too small to divide by. Use 0 for greedy")
        return self

    def asked(self, prompts: tuple[Prompt, ...], **more: Any) -> Asked:
        """The request with these prompts."""
        shared = {name: getattr(self, name) for name in _Body.model_fields}
        return Asked(prompts, **(shared | more))


class _InferBody(_Body):
    prompt: Annotated[Any, pydantic.AfterValidator(lambda value: None if value is None else _one_prompt(value))] = None
    messages: Annotated[Any, pydantic.AfterValidator(lambda value: None if value is None else _messages(value))] = None
    max_new_tokens: Positive | None = None

    @pydantic.model_validator(mode="after")
    def _one_of_them(self) -> "_InferBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class _OpenAIBody(_Body):
    """Keys that both of OpenAI's requests share."""

    model: str
    max_tokens: Positive | None = None
    n: Positive | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    user: str | None = None  # who asks, for abuse reports of theirs; it changes nothing there either
    frequency_penalty: _neutral(0) = None  # type: ignore[valid-type]
    presence_penalty: _neutral(0) = None  # type: ignore[valid-type]
    logit_bias: _neutral({}) = None  # type: ignore[valid-type]

    @pydantic.model_validator(mode="after")
    def _options_of_a_stream(self) -> "_OpenAIBody":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream = true")
        return self

    def asked(self, prompts: tuple[Prompt, ...], **more: Any) -> Asked:
        """The request with these prompts."""
        include = self.stream_options is not None and self.stream_options.include_usage
        shared = {"num_each": self.n or 1, "streams": bool(self.stream), "include_usage": include}
        return super().asked(prompts, **({"max_new_tokens": self.max_tokens} | shared | more))


class _CompletionBody(_OpenAIBody):
    prompt: Annotated[Any, pydantic.AfterValidator(_prompts)] = None
    echo: _neutral(False) = None  # type: ignore[valid-type]
    best_of: _neutral(1) = None  # type: ignore[valid-type]
    logprobs: _neutral() = None  # type: ignore[valid-type]
    suffix: _neutral("") = None  # type: ignore[valid-type]


class _ChatBody(_OpenAIBody):
    messages: Annotated[Any, pydantic.AfterValidator(_messages)]
    max_completion_tokens: Positive | None = None
    logprobs: _neutral(False) = None  # type: ignore[valid-type]
    top_logprobs: _neutral(0) = None  # type: ignore[valid-type]
    response_format: _neutral({"type": "text"}) = None  # type: ignore[valid-type]
    tools: _neutral([]) = None  # type: ignore[valid-type]
    tool_choice: _neutral("none") = None  # type: ignore[valid-type]
    modalities: _neutral(["text"]) = None  # type: ignore[valid-type]
    store: _neutral(False) = None  # type: ignore[valid-type]
    metadata: _neutral({}) = None  # type: ignore[valid-type]

    @pydantic.model_validator(mode="after")
    def _one_limit(self) -> "_ChatBody":
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens is the old name of max_completion_tokens. Give one of them")
        return self


def infer(data: bytes) -> Asked:
    """The request to `/infer`. Raises: Refused."""
    body = _parse(_InferBody, data)
    prompt = body.prompt if body.messages is None else body.messages
    return body.asked((prompt,), max_new_tokens=body.max_new_tokens)


def completion(data: bytes, name: str) -> Asked:
    """The request to `/v1/completions` of the model `name`. Raises: Refused."""
    body = _parse(_CompletionBody, data)
    _require_model(body.model, name)
    return body.asked(body.prompt)


def chat(data: bytes, name: str) -> Asked:
    """The request to `/v1/chat/completions` of the model `name`. Raises: Refused."""
    body = _parse(_ChatBody, data)
    _require_model(body.model, name)
    return body.asked((body.messages,), max_new_tokens=body.max_completion_tokens or body.max_tokens)


def _require_model(asked: str, name: str) -> None:
    if asked != name:
        what = f"the model that is asked for is not served here, but '{name}' is"
        raise Refused(404, "model_not_found", f"{what}.", param="model")


def _parse(model: type[Any], data: bytes) -> Any:
    """A body as its class, which is strict. Raises: Refused with all that is wrong."""
    try:
        value = json_values.parse(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Refused(400, "not_utf8", f"the body is not UTF-8: byte {error.start + 1}. Send JSON in UTF-8.") from None
    except ValueError as error:
        raise Refused(400, "not_json", f"the body is no JSON to be used: {error}.") from None
    if not isinstance(value, dict):
        raise Refused(400, "not_an_object", f"the body is a JSON {_kind(value)}. Send an object.")
    try:
        return model.model_validate(value)
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)
        first = problems[0]["loc"]
        told = "; ".join(_told(problem, model) for problem in problems[:TOLD])
        told += f"; and {len(problems) - TOLD} more" if len(problems) > TOLD else ""
        param = str(first[0]) if first and first[0] in model.model_fields else None
        raise Refused(400, "invalid_request", told if told.endswith("?") else f"{told}.", param=param) from None


def _told(problem: Mapping[str, Any], model: type[pydantic.BaseModel]) -> str:
    """One problem of a body, without its value."""
    path = problem["loc"]
    if problem["type"] == "extra_forbidden":
        hint = did_you_mean(str(path[-1])[:64], model.model_fields) if len(path) == 1 else ""
        return f"{reasons.shown(str(path[-1]))}: unknown key. {hint}".rstrip(" .?") + ("?" if "?" in hint else "")
    if problem["type"] == "missing":
        return f"{dotted(path)}: required and not given"
    what = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"].removeprefix("Input ")
    return f"{dotted(path)}: {what}" if path else what


# --- replies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """What serves, as replies and `/ready` tell it."""

    name: str
    kind: str  # of the folder: checkpoint, model, or unverified without a manifest
    content_digest: str
    manifest_digest: str | None
    created: int  # seconds since 1970: when it was loaded

    @property
    def fingerprint(self) -> str:
        """What changes with the model."""
        return self.content_digest[:16]

    @property
    def listed(self) -> dict[str, Any]:
        """An entry of `/v1/models`."""
        named = {"id": self.name, "object": "model", "created": self.created, "owned_by": "codex-accel"}
        return {**named, "content_digest": self.content_digest}


@dataclass(frozen=True)
class Head:
    """What all pieces of a reply have in common."""

    id: str
    created: int
    identity: Identity
    is_chat: bool

    def around(self, choices: Sequence[Any], *, is_piece: bool, **more: Any) -> dict[str, Any]:
        """A reply, or a piece of one."""
        object_ = "chat.completion" if self.is_chat else "text_completion"
        if self.is_chat and is_piece:
            object_ += ".chunk"
        named = {"id": self.id, "object": object_, "created": self.created, "model": self.identity.name}
        return {**named, "system_fingerprint": self.identity.fingerprint, "choices": list(choices), **more}


def finish_reason(reason: str) -> str:
    """In OpenAI's words, which have none for a limit of time."""
    return {"eos": "stop", "time": "length"}.get(reason, reason)


def choice(head: Head, index: int, outcome: Any) -> dict[str, Any]:
    """A whole text of a reply."""
    reason = finish_reason(outcome.finish_reason)
    content: dict[str, Any] = {"text": outcome.text}
    if head.is_chat:
        content = {"message": {"role": "assistant", "content": outcome.text, "refusal": None}}
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


def piece(head: Head, index: int, text: str, reason: str | None, *, is_first: bool) -> dict[str, Any]:
    """A piece of a text; `reason` is that of its end, or None before it."""
    content: dict[str, Any] = {"text": text}
    if head.is_chat:
        delta = {"role": "assistant"} if is_first else {}
        content = {"delta": {**delta, "content": text} if text or is_first else delta}
    return {"index": index, **content, "logprobs": None, "finish_reason": reason and finish_reason(reason)}


def usage(num_prompt_tokens: int, outcomes: Sequence[Any]) -> dict[str, int]:
    """Tokens of a reply."""
    num_new = sum(outcome.num_output_tokens for outcome in outcomes)
    total = num_prompt_tokens + num_new
    return {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_new, "total_tokens": total}


def inferred(identity: Identity, outcome: Any, *, num_prompt_tokens: int, seed: int) -> dict[str, Any]:
    """The reply of `/infer`."""
    return {
        "text": outcome.text,
        "tokens": None if outcome.ids is None else list(outcome.ids),
        "finish_reason": outcome.finish_reason,
        "num_prompt_tokens": num_prompt_tokens,
        "num_output_tokens": outcome.num_output_tokens,
        "num_near_ties": outcome.num_near_ties,
        "num_findings": outcome.num_findings,
        "seed": seed,
        "model": identity.name,
        "content_digest": identity.content_digest,
    }


def event(value: Any) -> bytes:
    """A server-sent event of JSON, or of a text (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    return b"data: " + (value.encode("ascii") if isinstance(value, str) else dump(value)) + b"\n\n"
