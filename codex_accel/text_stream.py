"""Tokens into text as they come, up to a stop string.

Rule: the pieces joined are the text of all tokens, however they are cut; a piece never ends in a part of a character or
in what may become a stop string; and the time is linear in the number of tokens.
"""

import codecs
import functools
from collections.abc import Sequence

from tokenizers import decoders

from codex_accel import byte_pairs
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
        return loose if text.endswith(REPLACEMENT) else loose + self._let_go(text)

    def finish(self) -> str:
        return self._let_go(self._text(self._pending)) if self._pending else ""

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
