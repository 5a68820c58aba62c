"""Tokenizers: loaded from a folder, applied to texts.

Rule: text never becomes a special token. A literal "[EOS]" in the data is encoded as the characters that it is; only
the toolkit itself, and chat templates, place special tokens.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from codex_accel import byte_pairs, files, pieces
from codex_accel.errors import UserError

PAYLOAD = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")  # the last for type sentencepiece only
FILES = (
    *PAYLOAD,
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template.jinja",
)  # all that `load` reads
GPT2_END = "<|endoftext|>"
ROLES = ("bos", "eos", "pad", "unk")


@dataclass
class Tokenizer:
    """A loaded tokenizer with the ids that the toolkit places itself (None where the tokenizer has no such token).

    Exactly one of `backend` and `processor` does the work, `processor` where there is no tokenizer.json.
    """

    folder: Path  # or the *.model file
    backend: tokenizers.Tokenizer | None = field(repr=False)
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
        assert self.backend is not None
        if not all(token.special for token in self.backend.get_added_tokens_decoder().values()):
            return None  # such a token is found in the text before it is cut into words, and may hold a space
        settings = _settings_without_vocabulary(self.backend)
        if settings["normalizer"] is None and settings["pre_tokenizer"] == EACH_CHARACTER:
            return re.compile("")
        if (settings["normalizer"], settings["pre_tokenizer"]) == (SPACE_SIGN, None):
            return re.compile("\n") if _breaks_at_lines(self.backend) else None
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
    def template_facts(self) -> dict[str, Any]:
        """What `chat.template` must know: names of special tokens, which of them swallow white space beside them, and
        the variables `bos_token` and the like, of the roles that have one.
        """
        name_of = {id_: name for name, id_ in self.special_ids.items()}
        ids = {role: getattr(self, f"{role}_id") for role in ROLES}
        added = self.backend.get_added_tokens_decoder().values() if self.backend else ()
        return {
            "special_tokens": tuple(self.special_ids),
            "variables": tuple((f"{role}_token", name_of[id_]) for role, id_ in ids.items() if id_ in name_of),
            "strip_left": tuple(token.content for token in added if token.lstrip),
            "strip_right": tuple(token.content for token in added if token.rstrip),
        }

    @functools.cached_property
    def vocab_size(self) -> int:
        """Ids that can occur: one more than the largest id. Of a large vocabulary it takes tens of milliseconds."""
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

    def encode_batch(self, texts: list[str], *, continued: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The same ids as `encode`, all in one array (N,) of unsigned integers, and how many each text has, int64 (T,).

        `continued` (T,) tells which texts go on where the one before ended: a tokenizer that begins each text with a
        space of its own begins those without, unless it has just dropped the space that stands there. Runs on the
        calling thread alone and leaves the interpreter to others, so threads give the parallelism.
        """
        if continued is not None and continued.any() and self._without_prefix is not None:
            bare = continued & ~_after_space(texts) if self._strips else continued
            with_prefix, without = (list(itertools.compress(texts, chosen)) for chosen in (~bare, bare))
            return _merge(bare, self.encode_batch(with_prefix), self._without_prefix.encode_batch(without))
        if self.processor is None and not isinstance(self._fast, str):
            return byte_pairs.encode_batch(self._fast, texts)
        dtype = byte_pairs.dtype_for(self.vocab_size)
        if self.processor is not None:
            return byte_pairs.in_blocks(texts, None, self._encode_block, dtype=dtype)
        assert self.backend is not None
        backend = self.backend
        return byte_pairs.in_blocks(
            texts, self._cut, lambda block: byte_pairs.encode_slowly(backend, block), dtype=dtype
        )

    def _encode_block(self, block: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the texts by sentencepiece, and the number of each."""
        assert self.processor is not None
        found = self.processor.encode(block, num_threads=1)
        counts = np.array([len(ids) for ids in found], np.int64)
        return np.fromiter(itertools.chain.from_iterable(found), np.uint32, count=int(counts.sum())), counts

    @functools.cached_property
    def _without_prefix(self) -> "Tokenizer | None":
        """This tokenizer without the space that it puts before a text; None if it puts none."""
        if self.processor is not None:
            return _without_dummy_prefix(self)
        assert self.backend is not None
        settings = json.loads(self.backend.to_str())
        changed = {**settings, **{key: _bare(settings[key]) for key in ("normalizer", "pre_tokenizer")}}
        if changed == settings:
            return None
        backend = tokenizers.Tokenizer.from_str(json.dumps(changed))
        backend.encode_special_tokens = True
        return dataclasses.replace(self, backend=backend)

    @functools.cached_property
    def _strips(self) -> bool:
        """Whether white space at both ends of a text is dropped."""
        if self.processor is not None:
            return model_of(self.processor).normalizer_spec.remove_extra_whitespaces
        settings = _settings_without_vocabulary(self.backend)
        return any(step["type"] == "Strip" and step["strip_left"] for step in _steps(settings["normalizer"]))

    def check_on(self, texts: list[str]) -> str:
        """Compare the fast path with `tokenizers` on these texts; at the first difference it is left for good.

        Returns what differed, empty if nothing did.
        """
        if isinstance(self._fast, str) or (place := byte_pairs.first_difference(self._fast, texts)) is None:
            return ""
        self._fast = f"tiktoken gave other ids for text number {place + 1} of the first block"
        return self._fast

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, without special tokens and ids that are no token, as those of padded embeddings."""
        if self.processor is not None:
            size = self.processor.get_piece_size()
            return self.processor.decode([int(token) for token in ids if token < size])
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


def _merge(
    is_second: np.ndarray, first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and counts of texts in their order, from those of two groups; `is_second` (T,) tells which is which."""
    counts = np.empty(len(is_second), np.int64)
    counts[~is_second], counts[is_second] = first[1], second[1]
    ids = np.empty(int(counts.sum()), first[0].dtype)
    from_second = np.repeat(is_second, counts)
    ids[~from_second], ids[from_second] = first[0], second[0]
    return ids, counts


def _after_space(texts: list[str]) -> np.ndarray:
    """Booleans (T,): which texts begin with white space, or follow one that ends with it."""
    begins = np.array([text[:1].isspace() for text in texts])
    ends = np.array([text[-1:].isspace() for text in texts])
    return begins | np.append(False, ends[:-1])


def _bare(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer of tokenizer.json without the space that it puts before a text.

    What puts one before every word, after another step has cut the text into words, stays: it stands for the spaces
    between them.
    """
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    if step["type"] == "ByteLevel":
        return {**step, "add_prefix_space": False}
    if step["type"] == "Sequence" and "normalizers" in step:
        return {**step, "normalizers": [bare for inner in step["normalizers"] if (bare := _bare(inner)) is not None]}
    if step["type"] == "Sequence":
        first, *others = step["pretokenizers"] or [None]
        others = [_bare(inner) if inner.get("prepend_scheme") == "first" else inner for inner in others]
        return {**step, "pretokenizers": [inner for inner in (_bare(first), *others) if inner is not None]}
    return step


def _steps(step: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A normalizer of tokenizer.json, or those that it is a sequence of."""
    if step is not None and step["type"] == "Sequence":
        for inner in step["normalizers"]:
            yield from _steps(inner)
    elif step is not None:
        yield step


def model_of(processor: sentencepiece.SentencePieceProcessor) -> Any:
    """The protocol buffer of a sentencepiece model."""
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(  # type: ignore[attr-defined]  # made at run time
        processor.serialized_model_proto()
    )


def _without_dummy_prefix(loaded: Tokenizer) -> Tokenizer | None:
    assert loaded.processor is not None
    model = model_of(loaded.processor)
    if not model.normalizer_spec.add_dummy_prefix:
        return None
    model.normalizer_spec.add_dummy_prefix = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    return dataclasses.replace(loaded, processor=processor)


EACH_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
SPACE_SIGN = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def _breaks_at_lines(backend: tokenizers.Tokenizer) -> bool:
    """Whether a line end is always a byte token by itself, so that the text before and after it get ids of their own.

    So it is in models of type sentencepiece. Of others the sums of scores may differ in the last bit, where a tie is
    broken otherwise.
    """
    model = json.loads(backend.to_str())["model"]
    pairs = model["vocab"].items() if isinstance(model["vocab"], dict) else model["vocab"]
    tokens = {token for token, _ in pairs}
    has_bytes = model.get("byte_fallback") and all(f"<0x{byte:02X}>" in tokens for byte in range(256))
    is_exact = model["type"] == "BPE" or all((score * pieces.SCORE_STEPS).is_integer() for _, score in pairs)
    return bool(has_bytes) and is_exact and not any("\n" in token for token in tokens)


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


def defining_files(path: Path) -> list[Path]:
    """The files that say which ids a text gets, of a folder or a *.model file: one form of those that `load` reads."""
    if path.suffix == ".model" and path.is_file():
        return [path]
    for names in (("tokenizer.json",), ("merges.txt", "vocab.json"), ("tokenizer.model",)):
        if all((path / name).is_file() for name in names):
            return [path / name for name in names]
    return []


def digest(path: Path) -> str:
    """SHA-256 over `defining_files`: of the file, or of several files' digests one after the other."""
    digests = [files.sha256_file(file) for file in defining_files(path)]
    return digests[0] if len(digests) == 1 else files.sha256_bytes("".join(digests).encode())


def load(path: Path, *, key: str = "tokenizer") -> Tokenizer:
    """The tokenizer of a folder with tokenizer.json, vocab.json and merges.txt, or tokenizer.model, or a *.model file.

    Raises: UserError if there is none of these, or it is damaged.
    """
    found = defining_files(path)
    if not found:
        what = "has no tokenizer.json, no vocab.json with merges.txt and no tokenizer.model."
        raise UserError(f"{key} = '{path}': {what} Give a folder made by train_tokenizer.")
    is_whole = found[0].name == "tokenizer.json"
    try:
        if found[0].suffix == ".model":
            return _load_sentencepiece(path, found[0])
        backend = tokenizers.Tokenizer.from_file(str(found[0])) if is_whole else _load_gpt2(path)
    except UserError:
        raise
    except Exception as error:  # the libraries raise bare Exception
        names = " with ".join(str(file) for file in found)
        raise UserError(f"{names}: is not a tokenizer ({error}). Copy the folder again, or train one.") from error
    settings = settings_of(path)
    named = {role: _name(settings.get(f"{role}_token"), path, role) for role in ROLES}
    template = chat_template_of(path, settings)
    if not is_whole and not settings and backend.token_to_id(GPT2_END) is not None:
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
    all_ids = range(processor.get_piece_size())
    special = {processor.id_to_piece(i): i for i in all_ids if processor.is_control(i) or processor.is_unknown(i)}
    template = chat_template_of(path, settings_of(path)) if path.is_dir() else None
    return Tokenizer(path, None, bos, eos, pad, unk, special, template, processor)


SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")  # the second over the first, which is older


def settings_of(folder: Path) -> dict[str, Any]:
    """What the files of `SETTINGS` say. Raises: UserError if one of them is no JSON object."""
    settings: dict[str, Any] = {}
    for path in (folder / name for name in SETTINGS):
        if path.is_file():
            try:
                settings |= dict(json.loads(path.read_bytes()))
            except (ValueError, TypeError, RecursionError) as error:
                raise UserError(f"{path}: is no JSON object ({error}). Copy the folder again, or train one.") from error
    return settings


def _name(value: Any, folder: Path, role: str) -> str | None:
    """A special token as these files write it: its text, or an object with it. Raises: UserError if it is neither."""
    name = value.get("content") if isinstance(value, dict) else value
    if not isinstance(name, str | None) or (name is None and value is not None):
        what = f"{role}_token = {value!r} is no text. Write the token's name, or an object with its content."
        raise UserError(f"{folder / SETTINGS[1]}: {what}")
    return name


def chat_template_of(folder: Path, settings: dict[str, Any]) -> str | None:
    """The chat template of a folder: chat_template.jinja, else the (default) one in its settings.

    Raises: UserError if it is no text.
    """
    path = folder / "chat_template.jinja"
    if path.is_file():
        return read_template(path)
    found = settings.get("chat_template")
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    if not isinstance(found, str | None):
        what = "chat_template is neither a text nor a list of templates with names. Mend it or remove it."
        raise UserError(f"{folder / SETTINGS[1]}: {what}")
    return found


def read_template(path: Path) -> str:
    """The text of a file with a chat template. Raises: UserError if it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read as UTF-8 text ({error}). Give a file with a Jinja template."
        raise UserError(f"{path}: {what}") from error
