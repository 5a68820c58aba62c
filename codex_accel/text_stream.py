"""Tokens into text as they come, up to a stop string; and that text as it may be shown, without secrets.

Rule: the pieces joined are the text of all tokens, however they are cut; a piece never ends in a part of a character or
in what may become a stop string, nor, of what is shown, of a secret; and the time is linear in the number of tokens.
"""

import codecs
import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import decoders

from codex_accel import byte_pairs, redaction, safety
from codex_accel.policy import Policy
from codex_accel.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # for bytes that are no character
MAX_BYTES_OPEN = 3  # of a character that has begun
MAX_CONTEXT = 16  # tokens


class TextStream:
    """The text that tokens add to a prompt; special tokens add none.

    `add` and `finish` return what can be told for certain by then. `stopped` tells that a stop string has come: it and
    all behind it is left out. Of several, the one that ends first counts, and of those the longest.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()):
        self._decoder = _decoder(tokenizer, prompt_ids)
        self._stop, self._held, self.stopped = tuple(stop), "", False
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All that was returned so far."""
        return "".join(self._pieces)

    def add(self, id_: int) -> str:
        """Text that is certain now that this token has come."""
        return self._cut(self._decoder.add(id_), ends=False)

    def finish(self) -> str:
        """The rest: bytes that became no character, and what could have become a stop string."""
        return self._cut(self._decoder.finish(), ends=True)

    def _cut(self, new: str, *, ends: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + new, ""
        found = [(at + len(stop), -len(stop)) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            end, minus = min(found)
            text, self.stopped = text[: end + minus], True
        elif not ends:
            longest = max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._held = text[: len(text) - longest], text[len(text) - longest :]
        self._pieces.append(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, short of all of it."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


# --- what is shown ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Masked:
    """A text with its secrets masked; `blocked` is the rule that ended it, if one did."""

    text: str
    num_findings: int = 0
    blocked: str | None = None


def masked(text: str, *, before: str = "") -> Masked:
    """What a `MaskedStream` makes of a text that is all there."""
    policy = redaction.policy()
    if policy is None or not any(safety.mask(each, policy=policy).findings for each in {text, before + text}):
        return Masked(text)
    stream = MaskedStream(policy, before)
    return Masked(stream.finish(text), stream.num_findings, stream.blocked)


class MaskedStream:
    """A model's text with its secrets masked by a policy; nothing is masked with None.

    Besides those that it writes, it has secrets whose beginning or name ends the text that it goes on from: after
    `password=` any word is one. So what comes is looked at by itself and then as what follows `before`, which is not
    repeated, until nothing there can matter any more. `blocked` names the rule that ended the text: what comes after is
    not shown.
    """

    def __init__(self, policy: Policy | None, before: str = ""):
        self.policy = policy
        self._own = None if policy is None else safety.StreamMasker(policy)
        self._joint: safety.StreamMasker | None = None
        self._repeated, self._begun, self._num_before = "", "", 0
        self._num_joint, self._num_shown = 0, 0  # findings of `_joint` when it was let go; characters that went through
        if policy is None or not before:
            return
        self._joint = safety.StreamMasker(policy)
        self._joint.feed(before)
        if self._joint.blocked or (self._joint.num_held and self._ends_in_secret(before)):
            before, self._joint = safety.mask(before, policy=policy.without_blocks).text, safety.StreamMasker(policy)
            self._joint.feed(before)
        self._repeated = before[len(before) - self._joint.num_held :]  # will come with what follows
        self._num_before = len(before)

    def copy(self) -> "MaskedStream":
        """Another that goes on from here, for one more text after the same `before`."""
        made = copy.copy(self)
        made._own = self._own and self._own.copy()
        made._joint = self._joint and self._joint.copy()
        return made

    def _ends_in_secret(self, before: str) -> bool:
        """Whether what is held back of `before` has a secret that is whole."""
        assert self._joint is not None
        sent = len(before) - self._joint.num_held
        return any(found.end > sent for found in safety.mask(before, policy=self.policy).findings)

    @property
    def blocked(self) -> str | None:
        """The rule that ended the text, if one did."""
        found = [masker.blocked for masker in (self._own, self._joint) if masker and masker.blocked]
        return found[0] if found else None

    @property
    def num_findings(self) -> int:
        """Secrets that were masked so far."""
        own = len(self._own.findings) if self._own else 0
        return own + (self._findings_of_joint() if self._joint else self._num_joint)

    def _findings_of_joint(self) -> int:
        assert self._joint is not None
        return sum(found.end > self._num_before for found in self._joint.findings)

    def feed(self, text: str) -> str:
        """What can be shown now that `text` is here."""
        if self._own is None:
            return text
        text = self._own.feed(text)
        if self._joint is None:
            return text
        self._num_shown += len(text)
        shown = self._new(self._joint.feed(text), ends=False)
        if self._num_shown > safety.CONTEXT and self._joint.is_idle and not (self._joint.blocked or self._repeated):
            self._num_joint, self._joint = self._findings_of_joint(), None
        return shown

    def finish(self, text: str = "") -> str:
        """The rest; `finish(text)` is short for `feed(text) + finish()` and saves a look."""
        if self._own is None:
            return text
        text = self._own.flush(text)
        return self._new(self._joint.flush(text), ends=True) if self._joint else text

    def _new(self, text: str, *, ends: bool) -> str:
        """What of it is not the end of `before`."""
        if not self._repeated:
            return text
        self._begun += text
        pairs = enumerate(zip(self._begun, self._repeated, strict=False))
        shared = next((at for at, (a, b) in pairs if a != b), min(len(self._begun), len(self._repeated)))
        if shared == len(self._begun) and not ends and shared < len(self._repeated):
            return ""
        new, self._begun, self._repeated = self._begun[shared:], "", ""
        return new


# --- tokens into text ------------------------------------------------------------------------------------------------


def _decoder(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> "_Bytes | _Window":
    if tokenizer.backend is not None and isinstance(tokenizer.backend.decoder, decoders.ByteLevel):
        return _Bytes(tokenizer, prompt_ids)
    return _Window(tokenizer, prompt_ids)


class _Bytes:
    """For a byte-level vocabulary: a token is a run of bytes, whatever stands around it."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for id_ in prompt_ids[-MAX_BYTES_OPEN:]:  # a prompt of ids may end within a character
            self._decoder.decode(self._bytes(id_))

    def _bytes(self, id_: int) -> bytes:
        assert self._tokenizer.backend is not None
        token = self._tokenizer.backend.id_to_token(id_)  # None for ids that only the model has
        if token is None or token in self._tokenizer.special_ids:
            return b""
        data = byte_pairs.bytes_of(token)
        return token.encode() if data is None else data

    def add(self, id_: int) -> str:
        return self._decoder.decode(self._bytes(id_))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """For all others: the text of a few tokens before and the new ones, less the text of those before.

    A decoder may drop the space that a text begins with, so there are always some before, once there is any text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._silent = functools.cache(self._is_silent)
        self._context: list[int] = []
        for id_ in reversed(prompt_ids[-4 * MAX_CONTEXT :]):
            if _is_clean(tokenizer.decode(self._context)) or len(self._context) == MAX_CONTEXT:
                break
            if not self._silent(id_):
                self._context.insert(0, id_)
        self._pending: list[int] = []  # tokens whose text may not be a whole character yet

    def _is_silent(self, id_: int) -> bool:
        backend, processor = self._tokenizer.backend, self._tokenizer.processor
        if backend is not None and backend.id_to_token(id_) is None:
            return True  # of embeddings that no token belongs to
        if processor is not None and id_ >= processor.get_piece_size():
            return True
        return id_ in self._tokenizer.special_ids.values() and not self._tokenizer.decode([id_])

    def _text(self, ids: list[int]) -> str:
        before = self._tokenizer.decode(self._context) if self._context else ""
        return self._tokenizer.decode(self._context + ids)[len(before) :]

    def add(self, id_: int) -> str:
        if self._silent(id_):
            return ""
        self._pending.append(id_)
        text, loose = self._text(self._pending), ""
        if text.endswith(REPLACEMENT) and len(self._pending) > MAX_BYTES_OPEN:
            loose = self._text([self._pending.pop(0)])  # no character begins with it
            text = self._text(self._pending)
        return loose if text.endswith(REPLACEMENT) else loose + self._spelled()

    def finish(self) -> str:
        return self._spelled()

    def _spelled(self) -> str:
        """The text of the pending tokens. A byte that is no character is one by itself, and spoils none behind it: with
        byte fallback a whole run of bytes is none if one of them is.
        """
        found, waiting = "", self._pending
        while waiting:
            texts = ((end, self._text(waiting[:end])) for end in range(len(waiting), 0, -1))
            end, text = next((each for each in texts if REPLACEMENT not in each[1]), (1, self._text(waiting[:1])))
            self._pending = waiting[:end]
            found += self._let_go(text)
            waiting = waiting[end:]
        return found

    def _let_go(self, text: str) -> str:
        """Take the pending tokens as what stands before, if they can be that."""
        known = _is_clean(self._tokenizer.decode(self._context)) if self._context else False
        if _is_clean(text):
            self._context = self._pending
        elif not known and REPLACEMENT not in text and len(self._context) < MAX_CONTEXT:
            self._context = self._context + self._pending
        self._pending = []
        return text


def _is_clean(text: str) -> bool:
    """Whether it holds more than white space and no bytes that are no character."""
    return bool(text.strip()) and REPLACEMENT not in text
