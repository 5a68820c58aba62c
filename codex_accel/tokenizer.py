"""Tokenizers: loaded from a folder, applied to texts.

Rule: text never becomes a special token. A literal "[EOS]" in the data is encoded as the characters that it is; only
the toolkit itself, and chat templates, place special tokens.
"""

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from codex_accel import byte_pairs
from codex_accel.errors import UserError

PAYLOAD = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")  # the last for type sentencepiece only
GPT2_END = "<|endoftext|>"
ROLES = ("bos", "eos", "pad", "unk")


@dataclass
class Tokenizer:
    """A loaded tokenizer with the ids that the toolkit places itself (None where the tokenizer has no such token).

    Exactly one of `backend` and `processor` does the work, `processor` where there is no tokenizer.json.
    """

    folder: Path  # or the *.model file
    backend: tokenizers.Tokenizer | None
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    special_ids: dict[str, int] = field(default_factory=dict)  # of all special tokens, by name
    chat_template: str | None = None
    processor: sentencepiece.SentencePieceProcessor | None = None

    @functools.cached_property
    def _fast(self) -> byte_pairs.BytePairs | str:
        """The fast path, or why it is not taken; made when first needed, by several threads at once if it comes so."""
        if self.backend is None:
            return "it is a sentencepiece model"
        try:
            return byte_pairs.build(self.backend)
        except ValueError as error:
            return str(error)

    @functools.cached_property
    def _cut(self) -> re.Pattern[str] | None:
        """Where `tokenizers` may get a long text in pieces and the ids stay the same; None: nowhere that is known."""
        settings = _settings_without_vocabulary(self.backend)
        if settings["normalizer"] is None and settings["pre_tokenizer"] == EACH_CHARACTER:
            return re.compile("")
        return byte_pairs.CUT if byte_pairs.pattern_of(settings) else None

    @property
    def engine(self) -> str:
        """The library that makes the ids in `encode_batch`: tiktoken, tokenizers or sentencepiece."""
        if self.processor is not None:
            return "sentencepiece"
        return "tokenizers" if isinstance(self._fast, str) else "tiktoken"

    @property
    def engine_reason(self) -> str:
        """Why the engine is not tiktoken; empty if it is."""
        return self._fast if isinstance(self._fast, str) else ""

    @property
    def vocab_size(self) -> int:
        """Ids that can occur: one more than the largest id."""
        if self.processor is not None:
            return self.processor.get_piece_size()
        assert self.backend is not None
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, on all cores, without special tokens."""
        if self.processor is not None:
            return self.processor.encode(texts)
        assert self.backend is not None
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_batch(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The same ids as `encode`, all in one array, uint32 (N,), and how many each text has, int64 (T,).

        Runs on the calling thread alone and leaves the interpreter to others, so threads give the parallelism.
        """
        if self.processor is not None:
            found = self.processor.encode(texts, num_threads=1)
            counts = np.array([len(ids) for ids in found], np.int64)
            flat = (token for ids in found for token in ids)
            return np.fromiter(flat, np.uint32, count=int(counts.sum())), counts
        if not isinstance(self._fast, str):
            return byte_pairs.encode_batch(self._fast, texts)
        assert self.backend is not None
        owners, pieces = byte_pairs.segments(texts, self._cut)
        ids, counts = byte_pairs.encode_slowly(self.backend, pieces)
        return byte_pairs.joined([ids], [counts], owners, len(texts))

    def check_on(self, texts: list[str]) -> str:
        """Compare the fast path with `tokenizers` on these texts; at the first difference it is left for good.

        Returns what differed, empty if nothing did.
        """
        if isinstance(self._fast, str) or (place := byte_pairs.first_difference(self._fast, texts)) is None:
            return ""
        self._fast = f"tiktoken gave other ids for text number {place + 1} of the first block"
        return self._fast

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens left out."""
        if self.processor is not None:
            return self.processor.decode([int(token) for token in ids])
        assert self.backend is not None
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def token_text(self, id_: int) -> str:
        """One token for people to read: its text, or the bytes of partial characters such as `\\xe2\\x82`."""
        if self.processor is not None:
            return _piece_text(self.processor.id_to_piece(int(id_)))
        assert self.backend is not None
        token = self.backend.id_to_token(int(id_))
        if token is None:
            raise ValueError(f"no token has the id {id_}")
        if token in self.special_ids:
            return token
        if isinstance(self.backend.decoder, decoders.ByteLevel):
            data = byte_pairs.bytes_of(token)
            return token if data is None else data.decode(errors="backslashreplace")
        if isinstance(self.backend.model, models.WordLevel):
            return token
        return _piece_text(token)


EACH_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}


def _settings_without_vocabulary(backend: tokenizers.Tokenizer | None) -> dict[str, Any]:
    """Normalizer and pre-tokenizer as tokenizer.json has them."""
    assert backend is not None
    empty = tokenizers.Tokenizer(models.BPE())
    if backend.normalizer is not None:
        empty.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        empty.pre_tokenizer = backend.pre_tokenizer
    return json.loads(empty.to_str())


def _piece_text(piece: str) -> str:
    """A sentencepiece token with its spaces; a byte such as `<0xE2>` as `\\xe2`."""
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)]).decode(errors="backslashreplace")
    return piece.replace("\u2581", " ")


# --- loading ------------------------------------------------------------------------------------------------------


def load(path: Path, *, key: str = "tokenizer") -> Tokenizer:
    """The tokenizer of a folder with tokenizer.json, vocab.json and merges.txt, or tokenizer.model, or a *.model file.

    Raises: UserError if there is none of these, or it is damaged.
    """
    files = {
        "json": path / "tokenizer.json",
        "merges": path / "merges.txt",
        "model": path if path.suffix == ".model" and path.is_file() else path / "tokenizer.model",
    }
    kind = next((kind for kind, file in files.items() if file.is_file()), None)
    if kind is None:
        what = "has no tokenizer.json, no vocab.json with merges.txt and no tokenizer.model."
        raise UserError(f"{key} = '{path}': {what} Give a folder made by train_tokenizer.")
    try:
        if kind == "model":
            return _load_sentencepiece(path, files[kind])
        backend = tokenizers.Tokenizer.from_file(str(files[kind])) if kind == "json" else _load_gpt2(path)
        settings = settings_of(path)
        named = {role: _name(settings.get(f"{role}_token")) for role in ROLES}
        template = chat_template_of(path, settings)
    except Exception as error:  # the libraries raise bare Exception
        raise UserError(f"{files[kind]}: is not a tokenizer ({error}).") from error
    if kind == "merges" and not settings and backend.token_to_id(GPT2_END) is not None:
        named = {"bos": GPT2_END, "eos": GPT2_END, "pad": None, "unk": None}
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    ids = {role: backend.token_to_id(name) if name else None for role, name in named.items()}
    special = {token.content: id_ for id_, token in sorted(backend.get_added_tokens_decoder().items()) if token.special}
    special |= {name: id_ for role in ROLES if (name := named[role]) and (id_ := ids[role]) is not None}
    return Tokenizer(path, backend, ids["bos"], ids["eos"], ids["pad"], ids["unk"], special, template)


def _load_gpt2(folder: Path) -> tokenizers.Tokenizer:
    """Byte-level BPE of the older two files, with GPT-2's pattern."""
    vocabulary, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    result = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    result.decoder = decoders.ByteLevel()
    if GPT2_END in vocabulary:
        result.add_special_tokens([AddedToken(GPT2_END, special=True, normalized=False)])
    return result


def _load_sentencepiece(path: Path, file: Path) -> Tokenizer:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = {role: getattr(processor, f"{role}_id")() for role in ROLES}
    bos, eos, pad, unk = (ids[role] if ids[role] >= 0 else None for role in ROLES)
    pieces = range(processor.get_piece_size())
    special = {processor.id_to_piece(i): i for i in pieces if processor.is_control(i) or processor.is_unknown(i)}
    template = chat_template_of(path, settings_of(path)) if path.is_dir() else None
    return Tokenizer(path, None, bos, eos, pad, unk, special, template, processor)


def settings_of(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, over the older special_tokens_map.json."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= json.loads((folder / name).read_text(encoding="utf-8"))
    return settings


def _name(value: Any) -> str | None:
    """A special token as these files write it: its text, or an object with it."""
    return value["content"] if isinstance(value, dict) else value


def chat_template_of(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template of a folder: chat_template.jinja, else the (default) one in tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found
