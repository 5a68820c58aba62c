"""Text from a model: requests in batches, whose rows go on together and each to its own end.

Rule: what a row becomes is a function of the model and its request: neither its neighbours nor the padding, nor when it
joined, decide a token, beyond the rounding of near-ties, which are counted. A finished row leaves the batch.

Shapes: B rows, T columns of the cache, V vocabulary.
"""

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from codex_accel import redaction, sampling, text_stream
from codex_accel.row_cache import RowCache
from codex_accel.text_stream import TextStream
from codex_accel.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]
OnText = Callable[[int, str], bool | None]


@dataclass(frozen=True)
class Request:
    """What to go on from, and how."""

    input_ids: tuple[int, ...]  # not empty
    max_new_tokens: int  # the one that ends the text included
    temperature: float = 0.0  # 0: the likeliest token; else drawn from softmax(logits / temperature)
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0  # of this row's draws
    stop: tuple[str, ...] = ()
    end_ids: tuple[int, ...] = ()  # tokens that end the text besides EOS, such as the end of a turn


@dataclass(frozen=True)
class Continuation:
    """What came of a request. The text has neither EOS nor a stop string; the ids have what was generated of both."""

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    num_near_ties: int  # tokens that rounding could have made others; see `sampling.choose`


@dataclass(frozen=True)
class Shown:
    """A continuation as it may be shown, with its secrets masked; `ids` are None where they would tell one."""

    text: str
    ids: tuple[int, ...] | None
    finish_reason: FinishReason | Literal["content_filter"]
    num_tokens: int  # that were generated
    num_near_ties: int
    num_findings: int


def shown(found: Continuation, request: Request, tokenizer: Tokenizer) -> Shown:
    """What came of a request without its secrets, by what holds for the process (`redaction`).

    All of it is there by now, so a secret in one text decides nothing in others of its batch.
    """
    masked = text_stream.masked(found.text, before=tokenizer.decode(request.input_ids))
    return Shown(
        masked.text,
        None if masked.num_findings else found.ids,
        "content_filter" if masked.blocked else found.finish_reason,
        len(found.ids),
        found.num_near_ties,
        masked.num_findings,
    )


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: Tokenizer, requests: Sequence[Request], *, on_text: OnText | None = None
) -> list[Continuation]:
    """Continuations of all requests, as one batch; the model is in evaluation mode.

    `on_text(index, text)` gets each request's text piece by piece; the pieces joined are its text. Where it returns
    False, that row ends there, with the reason "stop".

    Greedy ids are those of `model.generate(do_sample=False)` for one request at a time, except from a near-tie on.
    """
    batch = Batch(model, tokenizer, on_text=on_text)
    batch.add(requests)
    done: dict[int, Continuation] = {}
    while batch.num_rows:
        done.update(batch.step())
    return [done[index] for index in range(len(requests))]


def plan_batches(requests: Sequence[Request], *, batch_tokens: int, batch_size: int | None = None) -> list[list[int]]:
    """Indices of requests, batch by batch: like lengths together, the longest first.

    The rows of a batch times its longest prompt and most new tokens are `batch_tokens` at most; a request beyond that
    has a batch of its own. The plan is a function of the requests and of these limits.

    >>> plan_batches([Request((1,) * n, 2) for n in (1, 6, 2, 5)], batch_tokens=16)
    [[1, 3], [2, 0]]
    """
    sizes = [(len(request.input_ids), request.max_new_tokens) for request in requests]
    batches: list[list[int]] = []
    widest = (0, 0)
    for index in sorted(range(len(requests)), key=lambda index: (-sum(sizes[index]), -sizes[index][0], index)):
        wider = (max(widest[0], sizes[index][0]), max(widest[1], sizes[index][1]))
        num_rows = len(batches[-1]) + 1 if batches else 1
        if num_rows > 1 and num_rows * sum(wider) <= batch_tokens and num_rows <= (batch_size or num_rows):
            batches[-1].append(index)
            widest = wider
        else:
            batches.append([index])
            widest = sizes[index]
    return batches


def lack_of_room(model: Any, num_prompt_tokens: int, max_new_tokens: int) -> str:
    """What is wrong with a request that needs more positions than the model has, and what to do; "" if it has them."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is None or num_prompt_tokens + max_new_tokens <= longest:
        return ""
    what = f"{max_new_tokens} after {num_prompt_tokens} prompt tokens goes beyond the model's {longest} positions."
    if num_prompt_tokens >= longest:
        return f"{what} Shorten the prompt."
    return f"{what} Take {longest - num_prompt_tokens} at most."


# --- a batch ---------------------------------------------------------------------------------------------------------


@dataclass
class _Row:
    number: int
    request: Request
    stream: TextStream
    ends: frozenset[int]
    draws: list[float]
    ids: list[int] = field(default_factory=list)
    num_near_ties: int = 0

    @property
    def settings(self) -> sampling.Settings:
        request = self.request
        return sampling.Settings(request.temperature, request.top_k, request.top_p)

    @property
    def length(self) -> int:
        """Tokens that it has."""
        return len(self.request.input_ids) + len(self.ids)


class Batch:
    """Rows that are under way. Others may be added at any time; each leaves when it is finished.

    `add` gives the rows numbers, 0, 1, 2, ... for the lifetime of the batch, and their first token; `step` gives each
    row one more and returns those that are finished. A model that cannot do rows of several lengths at once, or cannot
    have them leave, does one row at each step, whole (`why_alone`).
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, *, on_text: OnText | None = None):
        self.model, self.tokenizer, self.on_text = model, tokenizer, on_text
        self._rows: list[_Row] = []  # in the order of the cache
        self._finished: list[tuple[int, Continuation]] = []
        self._num_added = 0
        self._cache: RowCache | None = None
        self._ends = end_ids(model, tokenizer)
        self._alone = why_alone(model)

    @property
    def num_rows(self) -> int:
        """Rows that `step` has not returned yet."""
        return len(self._rows) + len(self._finished)

    @torch.no_grad()
    def add(self, requests: Sequence[Request]) -> list[int]:
        """Begin with these; returns the numbers of their rows."""
        rows = [self._row(number, request) for number, request in enumerate(requests, self._num_added)]
        self._num_added += len(rows)
        if not self._alone and rows:
            logits, cache = prefill(self.model, [row.request.input_ids for row in rows])
            if self._cache is None or not self._rows:
                self._cache = cache
            else:
                self._cache.join(cache)
            self._rows += rows
            self._give(rows, logits)
            self._let_go()
        else:
            self._rows += rows
        return [row.number for row in rows]

    def _row(self, number: int, request: Request) -> _Row:
        if not request.input_ids or request.max_new_tokens < 1:
            raise ValueError("a request needs a token to go on from, and one to add")
        stream = TextStream(self.tokenizer, request.input_ids, request.stop)
        draws = sampling.draws(request.seed, request.max_new_tokens) if request.temperature > 0 else []
        return _Row(number, request, stream, self._ends | set(request.end_ids), draws)

    @torch.no_grad()
    def step(self) -> list[tuple[int, Continuation]]:
        """A token more for each row; (number, continuation) of those that are finished now."""
        if self._rows and self._alone:
            self._do_alone(self._rows.pop(0))
        elif self._rows:
            assert self._cache is not None
            last = [[row.ids[-1]] for row in self._rows]
            logits = forward(self.model, self._cache, last, [row.length for row in self._rows])
            self._give(self._rows, logits)
            self._let_go()
        finished, self._finished = self._finished, []
        return finished

    def drop(self, number: int) -> None:
        """Take out a row whose text nobody waits for any more."""
        for row in self._rows:
            if row.number == number:
                self._finish(row, "stop")
        self._let_go()
        self._finished = [(other, result) for other, result in self._finished if other != number]

    def _give(self, rows: list[_Row], logits: torch.Tensor) -> None:
        """Choose the next token of each of these rows, by `logits` (B, V); those that it ends are noted as finished."""
        draw = [row.draws[len(row.ids)] if row.draws else 0.0 for row in rows]
        tokens, near = sampling.choose(logits, [row.settings for row in rows], draw)
        for row, token, is_near in zip(rows, tokens, near, strict=True):
            row.num_near_ties += is_near
            self._take(row, token)

    def _take(self, row: _Row, token: int) -> None:
        row.ids.append(token)
        wanted = True
        if token in row.ends:
            self._finish(row, "eos")
            return
        if text := row.stream.add(token):
            wanted = self._tell(row, text)
        if row.stream.stopped or not wanted:
            self._finish(row, "stop")
        elif len(row.ids) == row.request.max_new_tokens:
            self._finish(row, "length")

    def _tell(self, row: _Row, text: str) -> bool:
        return self.on_text is None or self.on_text(row.number, text) is not False

    def _finish(self, row: _Row, reason: FinishReason) -> None:
        if reason != "stop" and (text := row.stream.finish()):
            self._tell(row, text)
            reason = "stop" if row.stream.stopped else reason
        result = Continuation(tuple(row.ids), row.stream.text, reason, row.num_near_ties)
        self._finished.append((row.number, result))

    def _let_go(self) -> None:
        """Finished rows leave the cache, and so do columns that are padding in all rows that stay."""
        if not self._finished:
            return
        gone = {number for number, _ in self._finished}
        keep = [place for place, row in enumerate(self._rows) if row.number not in gone]
        if len(keep) == len(self._rows):
            return
        if self._cache is not None and keep:
            order = self._cache.keep(keep)
            self._rows = [self._rows[place] for place in order]
            # of the newest token of each row, the keys are not there yet
            self._cache.trim(self._cache.num_columns - max(row.length - 1 for row in self._rows))
        else:
            self._rows, self._cache = [self._rows[place] for place in keep], None

    def _do_alone(self, row: _Row) -> None:
        """One row to its end by transformers' own `generate`; the tokens are chosen here."""

        def choose(_: Any, scores: torch.Tensor) -> torch.Tensor:
            if not self._finished:  # on a GPU the stop is looked at one token late
                self._give([row], scores.to(self.model.dtype))  # of which transformers has made float32
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(row.ids[-1:]).to(scores.device), 0.0)

        def stop(input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return torch.full((1,), bool(self._finished), device=input_ids.device)

        input_ids = torch.tensor([row.request.input_ids], device=self.model.device)
        kept, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:  # `generate` takes from there whatever is not set here
            self.model.generate(  # type: ignore[operator]
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                generation_config=GenerationConfig(
                    max_new_tokens=row.request.max_new_tokens, do_sample=False, use_cache=True, pad_token_id=0
                ),
                logits_processor=LogitsProcessorList([choose]),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        finally:
            self.model.generation_config = kept


def end_ids(model: PreTrainedModel, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end every text: the tokenizer's EOS, and those of the model's generation configuration.

    Chat models name there the token that ends a turn, which is often not EOS.
    """
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return frozenset(id_ for id_ in (tokenizer.eos_id, *listed) if id_ is not None)


# --- the model -------------------------------------------------------------------------------------------------------


def prefill(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, RowCache]:
    """Logits after each prompt (B, V), and a cache that holds the prompts."""
    cache = RowCache(model.config)
    longest = max(map(len, prompts))
    padded = [[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    logits = forward(model, cache, padded, [len(prompt) for prompt in prompts])
    if not all(layer.is_initialized for layer in cache.layers) or cache.num_columns != longest:
        raise ValueError("it does not keep keys and values of its tokens")
    return logits, cache


def forward(model: PreTrainedModel, cache: RowCache, new_ids: list[list[int]], lengths: Sequence[int]) -> torch.Tensor:
    """Logits (B, V) after `new_ids` (B, N), which are put into the cache; `lengths` (B,) count the tokens of each row.

    Rows end together. What of a row lies before its first token is padding: hidden by the mask and without a position.
    """
    known, device = _parameters(model), model.device
    input_ids = torch.tensor(new_ids, device=device)
    num_new, num_columns = input_ids.shape[1], cache.num_columns + input_ids.shape[1]
    inputs: dict[str, Any] = {"input_ids": input_ids, "past_key_values": cache, "use_cache": True}
    if min(lengths) < num_columns:
        first = torch.tensor([[num_columns - length] for length in lengths], device=device)
        inputs["attention_mask"] = (torch.arange(num_columns, device=device) >= first).long()  # (B, T)
    if "position_ids" in known:
        positions = torch.tensor([[length - num_new] for length in lengths], device=device)  # (B, 1)
        if num_new > 1:
            positions = (positions + torch.arange(num_new, device=device)).clamp(min=0)
        inputs["position_ids"] = positions  # (B, N)
    if "logits_to_keep" in known:
        inputs["logits_to_keep"] = 1
    return model(**inputs).logits[:, -1]


_PARAMETERS: "weakref.WeakKeyDictionary[torch.nn.Module, frozenset[str]]" = weakref.WeakKeyDictionary()


def _parameters(model: Any) -> frozenset[str]:
    """Names that the model's own forward takes; an adapter's passes on whatever it gets."""
    if model not in _PARAMETERS:  # looked up once: each look takes as long as some layers of a small model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        _PARAMETERS[model] = frozenset(inspect.signature(inner.forward).parameters)
    return _PARAMETERS[model]


_ALONE: "weakref.WeakKeyDictionary[torch.nn.Module, str]" = weakref.WeakKeyDictionary()
OFF = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest logit; half precision: 0.05


def why_alone(model: PreTrainedModel) -> str:
    """Why this model has to do one row at a time; "" if it can do several. Found out by trying, once for each model.

    Rows of several lengths are begun together, one of them leaves, another joins, and the logits at each step are held
    against those of the row by itself, without a cache.
    """
    if model not in _ALONE:
        try:
            off = _largest_difference(model)
        except (
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
            AttributeError,
            KeyError,
            NotImplementedError,
        ) as error:
            told = redaction.words(error, 200)
            _ALONE[model] = f"a {model.config.model_type} model cannot do several rows of a batch at once: {told}"
        else:
            near = off <= OFF.get(model.dtype, 0.05)
            what = f"a {model.config.model_type} model gives other logits for a row in a batch, by {off:.2g}"
            _ALONE[model] = "" if near else f"{what} of the largest"
    return _ALONE[model]


@torch.no_grad()
def _largest_difference(model: PreTrainedModel) -> float:
    """How far logits of rows in a batch lie from those of the rows alone, as a share of the largest."""
    size = model.config.get_text_config().vocab_size
    first, second, third = (
        [(start + step * 7) % size for step in range(num)] for start, num in ((1, 9), (2, 4), (3, 6))
    )
    pairs = []

    def alone(rows: list[list[int]]) -> torch.Tensor:
        found = [
            model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[:, -1] for row in rows
        ]
        return torch.cat(found)

    def go_on(rows: list[list[int]]) -> None:
        for row in rows:
            row.append((row[-1] + 5) % size)
        logits = forward(model, cache, [[row[-1]] for row in rows], [len(row) for row in rows])
        pairs.append((logits, alone(rows)))

    logits, cache = prefill(model, [first, second])
    pairs.append((logits, alone([first, second])))
    go_on([first, second])
    cache.keep([1])
    cache.trim(cache.num_columns - len(second))
    go_on([second])
    logits, joining = prefill(model, [third])
    cache.join(joining)
    go_on([second, third])
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)
