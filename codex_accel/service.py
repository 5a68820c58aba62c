"""The loop of a model that serves: requests join a running batch, and each of their texts leaves at its own end.

Rule: one thread has the model. What becomes of a request is a function of the request alone (`generation`), whoever
shares the batch: no other request's end, error, limit or reader changes it, or waits for it.

A text whose reader is slow waits in a buffer, which the request's own `max_new_tokens` bounds.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from codex_accel import generation
from codex_accel.policy import Policy
from codex_accel.serve_schema import Limits
from codex_accel.text_stream import MaskedStream
from codex_accel.tokenizer import Tokenizer

Reason = Literal["eos", "stop", "length", "time", "content_filter"]
PREFILL_TOKENS = 8192  # of prompts that are begun together, padding included
STEPS_BETWEEN = 4  # that rows under way get before others join; each joining copies the cache


class Busy(Exception):
    """There is no room to wait in."""


class Closed(Exception):
    """No more requests are taken."""


@dataclass(frozen=True)
class Outcome:
    """What came of a text. `ids` are None where they would tell what was masked, or the text was cut off."""

    text: str
    ids: tuple[int, ...] | None
    finish_reason: Reason
    num_output_tokens: int
    num_near_ties: int
    num_findings: int


@dataclass(eq=False)
class Row:
    """A text that is asked for. `pieces` are what has come of it and was not taken yet."""

    job: "Job"
    request: generation.Request
    opening: MaskedStream  # masks what follows the prompt
    pieces: deque[str] = field(default_factory=deque)
    outcome: Outcome | None = None
    masked: MaskedStream | None = None  # a copy of `opening`, once the text has begun
    ending: Reason | None = None  # why it is to end, if not by itself
    text: list[str] = field(default_factory=list)
    unmasked: list[str] = field(default_factory=list)  # of a text that is masked at its end
    repeated: str = ""  # of a text that is made again, what was given out before
    num_tokens: int = 0
    is_suspect: bool = False  # was in a batch that failed, so it runs alone

    @property
    def size(self) -> int:
        """Tokens that it may come to."""
        return len(self.request.input_ids) + self.request.max_new_tokens


@dataclass(eq=False)
class Job:
    """The texts of one request. It is over when `error` is set, or all rows have an outcome."""

    deadline_s: float  # on the monotonic clock
    streams: bool  # whether pieces are news, or the end alone
    on_news: Any = None  # for the caller's use
    rows: list[Row] = field(default_factory=list)
    error: Exception | None = None
    cancelled: bool = False
    started_s: float | None = None  # when the first row got a place

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes."""
        return self.cancelled or self.error is not None or all(row.outcome is not None for row in self.rows)


class Service:
    """A model with its waiting and its running texts.

    `submit` and `cancel` are for any thread; `run` is the loop, on the thread that calls it, until `close`. After each
    round `on_news` is called on that thread with the jobs that have something new.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        limits: Limits,
        policy: Policy | None,
        on_news: Callable[[list[Job]], None] = lambda _: None,
    ):
        self.model, self.tokenizer, self.limits, self.policy, self.on_news = model, tokenizer, limits, policy, on_news
        self.max_running = 1 if generation.why_alone(model) else limits.max_running
        self._may_block = policy is not None and any(rule.action == "block" for rule in policy.rules)
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._closed = False
        self._running: dict[int, Row] = {}  # by the number in the batch
        self._num_steps = 0  # since rows joined last
        self._news: dict[Job, None] = {}
        self._new_batch()

    # --- for any thread ---------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Texts without a place."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Texts in the batch."""
        return len(self._running)

    def require_room(self, num_texts: int = 1) -> None:
        """Raises: Busy, Closed, as `submit` would now."""
        if self._closed:
            raise Closed
        if len(self._waiting) + len(self._running) + num_texts > self.limits.max_waiting + self.max_running:
            raise Busy

    def submit(
        self,
        requests: Sequence[generation.Request],
        *,
        streams: bool,
        openings: Sequence[MaskedStream] = (),
        on_news: Any = None,
    ) -> Job:
        """Wait in line with these. `openings` mask each text as what follows its prompt; by itself if there are none.

        Raises: Busy if there is no room for all of them, Closed after `close`.
        """
        job = Job(time.monotonic() + self.limits.max_time_s, streams, on_news)
        openings = openings or [MaskedStream(self.policy)] * len(requests)
        job.rows = [Row(job, request, opening) for request, opening in zip(requests, openings, strict=True)]
        with self._changed:
            self.require_room(len(requests))
            self._waiting.extend(job.rows)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for this one any more: it leaves the line, and the batch before its next token."""
        job.cancelled = True
        with self._changed:
            self._changed.notify()

    def abort(self, error: Exception) -> None:
        """End all that was taken with this error."""
        jobs = list(dict.fromkeys(row.job for row in (*tuple(self._waiting), *tuple(self._running.values()))))
        for job in jobs:
            job.error = job.error or error
        with self._changed:
            self._changed.notify()
        self.on_news(jobs)

    def close(self) -> None:
        """Take no more; `run` returns when all that were taken are over."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    # --- the loop ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()  # of a small model a step takes a sixth less than with `no_grad`
    def run(self) -> None:
        """Until `close`, and the end of what was taken before it."""
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closed):
                    self._changed.wait()
                if self._closed and not self._waiting and not self._running:
                    return
                joining = self._admit()
            self._end_rows()
            try:
                self._join(joining)
                finished = self._batch.step() if self._running else []
            except Exception as error:
                self._lose_batch(error, joining)
                finished = []
            for number, continuation in finished:
                self._finish(self._running.pop(number), continuation)
            self._count_step()
            news, self._news = self._news, {}
            if news:
                self.on_news(list(news))

    def _new_batch(self) -> None:
        self._batch = generation.Batch(self.model, self.tokenizer, on_text=self._take)
        self._num_added = 0
        self._running.clear()

    def _admit(self) -> list[Row]:
        """Those of the waiting that get a place now, in their order; what nobody waits for leaves the line."""
        now = time.monotonic()
        for row in list(self._waiting):
            if row.job.cancelled or row.job.error is not None:
                self._waiting.remove(row)
            elif now >= row.job.deadline_s:
                self._waiting.remove(row)
                self._close_row(row, None, "time")
        if self._running and self._num_steps < STEPS_BETWEEN:
            return []
        rows = list(self._running.values())
        joining: list[Row] = []
        while self._waiting and self._has_place(self._waiting[0], rows):
            row = self._waiting.popleft()
            rows.append(row)
            joining.append(row)
        return joining

    def _has_place(self, row: Row, beside: list[Row]) -> bool:
        if not beside:
            return True
        if row.is_suspect or any(other.is_suspect for other in beside):
            return False
        widest = max(other.size for other in (*beside, row))
        return len(beside) < self.max_running and (len(beside) + 1) * widest <= self.limits.batch_tokens

    def _join(self, joining: list[Row]) -> None:
        """Begin with these rows, those of like lengths together."""
        joining.sort(key=lambda row: len(row.request.input_ids))
        group: list[Row] = []
        for row in joining:
            row.job.started_s = row.job.started_s or time.monotonic()
            row.masked = row.opening.copy()
            if group and (len(group) + 1) * len(row.request.input_ids) > PREFILL_TOKENS:
                self._begin(group)
                group = []
            group.append(row)
        if group:
            self._begin(group)

    def _begin(self, rows: list[Row]) -> None:
        for number, row in enumerate(rows, self._num_added):  # before `add`, which gives each its first token
            self._running[number] = row
        self._num_added += len(rows)
        self._num_steps = 0
        self._batch.add([row.request for row in rows])
        for row in rows:
            row.num_tokens = 1

    def _take(self, number: int, text: str) -> bool:
        """A piece of a row's text, from the batch; returns whether the row goes on."""
        row = self._running[number]
        if row.job.cancelled:
            return False
        assert row.masked is not None
        if row.job.streams or self._may_block:
            self._emit(row, row.masked.feed(text))
        else:  # nobody sees it before its end, and to mask it as a whole takes less than piece by piece
            row.unmasked.append(text)
        if row.masked.blocked:
            row.ending = "content_filter"
        elif time.monotonic() >= row.job.deadline_s:
            row.ending = "time"
        return row.ending is None

    def _emit(self, row: Row, text: str) -> None:
        row.text.append(text)
        if row.repeated:
            size = min(len(row.repeated), len(text))
            if row.repeated[:size] != text[:size]:
                raise RuntimeError("a text came out otherwise when it was made again")
            row.repeated, text = row.repeated[size:], text[size:]
        if text and row.job.streams:
            row.pieces.append(text)
            self._news[row.job] = None

    def _end_rows(self) -> None:
        """Take out rows of which nothing is wanted any more; one past its time ends with what it has."""
        now = time.monotonic()
        for number, row in list(self._running.items()):
            if row.job.cancelled or row.job.error is not None:
                self._batch.drop(number)
                del self._running[number]
            elif now >= row.job.deadline_s:
                self._batch.drop(number)
                self._close_row(self._running.pop(number), None, "time")

    def _count_step(self) -> None:
        self._num_steps += 1
        for row in self._running.values():
            row.num_tokens += 1

    def _finish(self, row: Row, continuation: generation.Continuation) -> None:
        self._close_row(row, continuation, row.ending or continuation.finish_reason)

    def _close_row(self, row: Row, continuation: generation.Continuation | None, reason: Reason) -> None:
        """Give out the rest of a text, and what came of it."""
        num_findings = 0
        if row.masked:  # it has begun
            self._emit(row, row.masked.finish("".join(row.unmasked)))
            reason = "content_filter" if row.masked.blocked else reason
            num_findings = row.masked.num_findings
        row.outcome = Outcome(
            text="".join(row.text),
            ids=None if continuation is None or num_findings else continuation.ids,
            finish_reason=reason,
            num_output_tokens=row.num_tokens if continuation is None else len(continuation.ids),
            num_near_ties=0 if continuation is None else continuation.num_near_ties,
            num_findings=num_findings,
        )
        self._news[row.job] = None

    def _lose_batch(self, error: Exception, joining: list[Row]) -> None:
        """A batch of one has failed by its own request. Of several nobody knows by which: each is done again, alone."""
        rows = list(self._running.values())
        not_begun = [row for row in joining if row not in rows]
        self._new_batch()
        if len(rows) == 1:
            rows[0].job.error = error
            self._news[rows[0].job] = None
            rows = []
        for row in rows:
            row.is_suspect, row.num_tokens, row.ending = True, 0, None
            row.repeated, row.text, row.unmasked = "".join(row.text), [], []
        with self._changed:
            self._waiting.extendleft(reversed(rows + not_begun))
