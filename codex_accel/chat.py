"""Chat templates: the messages of a record rendered to parts, of which the assistant's words are targets.

Rule: the rendering is that of transformers' `apply_chat_template`, and only the template places special tokens. The
name of one inside a message stays the text that it is.

Targets are the template's `{% generation %}` blocks, where it has any. Otherwise the target of an assistant message is
what the rendering up to it adds to the rendering of the messages before it with the generation prompt: its words, the
token that ends its turn, and what the template puts after that. This takes two renderings a turn, so its time grows
with the square of the number of turns; blocks take one rendering.

Parts are encoded one by one, as a prompt is when a model generates. So ids differ from those of `apply_chat_template`
where the pattern joins the end of a header with the beginning of the answer, or where the tokenizer puts a space before
every text. Of 4,396 dialogues of Dolly none differed with ChatML, Zephyr and Llama 2, nor with Llama 3 and its own
pattern; with the headers of Llama 3 and the pattern of GPT-2, which parts two newlines before a word, every one did.
"""

import bisect
import functools
import itertools
import re
import traceback
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from codex_accel.errors import UserError
from codex_accel.records import Part, Render

Messages = list[dict[str, str]]
Spans = list[tuple[int, int]]  # (start, end) in characters of a rendering

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# What `tokenizers` strips beside a token: Unicode's White_Space, which has no \x1c to \x1f.
WHITE_SPACE = "".join(c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f")
PRIVATE_USE = range(0xF0000, 0xFFFFE)  # code points without a meaning: The Unicode Standard, 23.5


@dataclass(frozen=True)
class _Template:
    source_text: str
    where: str
    has_blocks: bool
    variables: tuple[tuple[str, str], ...]
    names: re.Pattern[str]  # of special tokens, the longest first
    strip_left: frozenset[str]
    strip_right: frozenset[str]


def template(
    source_text: str,
    special_tokens: Collection[str],
    *,
    where: str,
    variables: Iterable[tuple[str, str]] = (),
    strip_left: Collection[str] = (),
    strip_right: Collection[str] = (),
    is_prompt: bool = False,
) -> Render:
    """A function from messages ({role, content, ...}) to parts, by a template in Jinja; it can be pickled.

    `special_tokens` are the names that the tokenizer marks as special; `variables` the names and values that the
    template may use, such as bos_token and eos_token (`special_tokens_map` in transformers); `where` the file to name
    in errors. White space beside a special token is kept, but for tokens with the flags lstrip and rstrip, whose names
    are `strip_left` and `strip_right`: those swallow it, as they do in transformers. `Tokenizer.template_facts` has all
    of these.

    With `is_prompt` the messages wait for an answer: the rendering ends where the assistant's words begin, and no part
    is a target.

    The function raises ValueError, with a reason that does not repeat the data, for messages that the template refuses
    or leaves out, or without a target; of a prompt, if the last message is the assistant's. Raises: UserError if the
    template is not Jinja, or depends on time or chance.
    """
    longest_first = sorted(filter(None, special_tokens), key=lambda name: (-len(name), name))
    loaded = _Template(
        source_text,
        where,
        has_blocks=_has_generation_blocks(source_text, where) and not is_prompt,
        variables=tuple(variables),
        names=re.compile("|".join(map(re.escape, longest_first)) or "(?!)"),
        strip_left=frozenset(strip_left),
        strip_right=frozenset(strip_right),
    )
    return functools.partial(_prompt_parts if is_prompt else _parts, loaded)


def turn_end(render: Render) -> str | None:
    """Name of the special token that ends the assistant's words in the rendering of `template`; None without one."""
    answer = "zq1qz"
    try:
        parts = render([{"role": "user", "content": "zq0qz"}, {"role": "assistant", "content": answer}])
    except ValueError:
        return None
    after = itertools.dropwhile(lambda part: answer not in part.text, parts)
    return next((part.text for part in after if part.is_special), None)


def ends(parts: tuple[Part, ...], *, bos: str | None, eos: str | None) -> tuple[bool, bool]:
    """Whether a rendering begins with BOS and ends with EOS already; white space after EOS does not count."""
    first, last = parts[0], next((part for part in reversed(parts) if part.is_special or part.text.strip()), parts[-1])
    return first.is_special and first.text == bos, last.is_special and last.text == eos


def _has_generation_blocks(source_text: str, where: str) -> bool:
    """Whether the template marks its targets itself. Raises: see `template`."""
    from jinja2 import TemplateSyntaxError, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        tree = _compile_jinja_template(source_text).environment.parse(source_text)
    except TemplateSyntaxError as error:
        what = f"is not a chat template: {str(error.message).rstrip('.')}. Mend the template."
        raise UserError(f"{where}:{error.lineno}: {what}") from None
    moving = {node.name for node in tree.find_all(nodes.Name)} & {"strftime_now", "lipsum"}
    moving |= {node.name for node in tree.find_all(nodes.Filter)} & {"random"}
    if moving:
        what = f"uses {', '.join(sorted(moving))}, so equal records would not give equal text"
        raise UserError(f"{where}: {what}. Write a fixed text there.")
    return any(node.name == "_generation_support" for node in tree.find_all(nodes.ExtensionAttribute))


def _parts(template_: _Template, messages: Messages) -> tuple[Part, ...]:
    _require_roles(template_, messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no assistant message, so nothing is a target")
    messages, names = _hide(template_, messages)
    rendering, spans = _render(template_, messages)
    _require_all(template_, messages)
    if not template_.has_blocks:
        spans = _by_prefixes(template_, messages, rendering)
    parts = tuple(_cut(template_, rendering, spans, names))
    if not any(part.is_target for part in parts):
        raise ValueError("no target in what the chat template renders")
    return parts


def _prompt_parts(template_: _Template, messages: Messages) -> tuple[Part, ...]:
    _require_roles(template_, messages)
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError("nothing to answer: the last message is the assistant's, or there is none")
    messages, names = _hide(template_, messages)
    rendering = _render(template_, messages, add_generation_prompt=True)[0]
    _require_all(template_, messages)
    if not rendering:
        raise ValueError("nothing in what the chat template renders")
    return tuple(_cut(template_, rendering, [], names))


def _require_roles(template_: _Template, messages: Messages) -> None:
    for number, message in enumerate(messages, 1):
        role = message.get("role")
        if role not in ROLES and not re.search(rf"""(['"]){re.escape(str(role))}\1""", template_.source_text):
            known = ", ".join(ROLES)
            raise ValueError(f"unknown role: that of message {number} is none of {known}, and not in the chat template")


def _require_all(template_: _Template, messages: Messages) -> None:
    missing = _left_out(template_, tuple((m["role"], *sorted(m.keys() - {"role"})) for m in messages))
    if missing is not None:
        raise ValueError(f"left out by the chat template: message {missing}, of role {messages[missing - 1]['role']}")


def _hide(template_: _Template, messages: Messages) -> tuple[Messages, dict[int, str]]:
    """Messages with a placeholder for each name of a special token, and what the placeholders stand for."""
    texts = "\n".join(text for message in messages for key, text in message.items() if key != "role")
    found = sorted(set(template_.names.findall(texts)))
    if not found:
        return messages, {}
    used = {*texts, *template_.source_text, *template_.names.pattern, *"".join(dict(template_.variables).values())}
    free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
    placeholders = dict(zip(found, free, strict=False))
    if len(placeholders) < len(found):
        raise ValueError("too many different private-use characters beside the name of a special token")

    def hide(text: str) -> str:
        return template_.names.sub(lambda match: placeholders[match.group()], text)

    hidden = [{key: text if key == "role" else hide(text) for key, text in m.items()} for m in messages]
    return hidden, {ord(placeholder): name for name, placeholder in placeholders.items()}


def _render(template_: _Template, messages: Messages, *, add_generation_prompt: bool = False) -> tuple[str, Spans]:
    """The rendering, and the spans of its generation blocks. Raises: ValueError with a reason without data."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = dict(template_.variables)
    limits = (ArithmeticError, RecursionError, MemoryError)
    failures = (TemplateError, TypeError, ValueError, LookupError, AttributeError, *limits)
    try:
        result: Any = render_jinja_template(
            [messages],
            chat_template=template_.source_text,
            return_assistant_tokens_mask=template_.has_blocks,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except failures as error:
        raise ValueError(_failure(error, template_.source_text)) from None
    [rendering], spans = result
    return rendering, spans[0] if spans else []


def _failure(error: Exception, source_text: str) -> str:
    """Why a rendering failed. The error's own words may be made of data, unless they stand in the template."""
    from jinja2 import TemplateError

    if type(error) is TemplateError:  # of raise_exception(...)
        told = error.message if error.message and error.message in source_text else "in words made of the data"
        return f"refused by the chat template: {told}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    return f"failed in the chat template: {type(error).__name__}" + (f" at its line {lines[-1]}" if lines else "")


@functools.lru_cache(maxsize=4096)
def _left_out(template_: _Template, shape: tuple[tuple[str, ...], ...]) -> int | None:
    """Number of the first message (role, keys ...) that leaves no trace: tried with a word of its own as its content.

    A template that looks for something in the content, and refuses these words, is not tried.
    """
    words = [f"zq{number}qz" for number in range(len(shape))]
    messages = [{"role": role, **dict.fromkeys(keys, word)} for (role, *keys), word in zip(shape, words, strict=True)]
    try:
        rendering = _render(template_, messages)[0].casefold()
    except ValueError:
        return None
    return next((number for number, word in enumerate(words, 1) if word not in rendering), None)


def _by_prefixes(template_: _Template, messages: Messages, rendering: str) -> Spans:
    """Spans of the assistant's messages where the template has no generation blocks."""
    spans: Spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(template_, messages[:index], add_generation_prompt=True)[0]
        so_far = rendering if index + 1 == len(messages) else _render(template_, messages[: index + 1])[0]
        if not (rendering.startswith(so_far) and so_far.startswith(prompt)):
            raise ValueError(
                f"target not found: {template_.where} does not render message {index + 1} as a continuation of those "
                "before it. Put {% generation %} and {% endgeneration %} around the assistant's words in the template"
            )
        spans.append((len(prompt), len(so_far)))
    return spans


def _cut(template_: _Template, rendering: str, spans: Spans, names: dict[int, str]) -> Iterator[Part]:
    """Parts of a rendering: special tokens, and between them text that is target or not, placeholders undone."""
    edges: list[int] = []  # where the target begins, ends, begins ...
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if edges and start <= edges[-1]:
            edges[-1] = max(edges[-1], end)
        else:
            edges += [start, end]

    def text(start: int, end: int) -> Iterator[Part]:
        first = bisect.bisect_right(edges, start)
        cuts = [start, *edges[first : bisect.bisect_left(edges, end)], end]
        for number, (a, b) in enumerate(itertools.pairwise(cuts), first):
            if a < b:
                yield Part(rendering[a:b].translate(names) if names else rendering[a:b], number % 2 == 1)

    at = 0
    for match in template_.names.finditer(rendering):
        name, (start, end) = match.group(), match.span()
        before = rendering[at:start]
        yield from text(at, at + len(before.rstrip(WHITE_SPACE) if name in template_.strip_left else before))
        # A token that a target only touches is a target, as in transformers.
        first = bisect.bisect_right(edges, start)
        yield Part(name, first % 2 == 1 or bisect.bisect_left(edges, end) > first, is_special=True)
        at = end
        while name in template_.strip_right and at < len(rendering) and rendering[at] in WHITE_SPACE:
            at += 1
    yield from text(at, len(rendering))
