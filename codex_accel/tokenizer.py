"""Tokenizers: trained from text, kept as a folder that `AutoTokenizer` loads, applied to records.

Rule: text never becomes a special token. A literal "[EOS]" in the data is encoded as the characters that it is; only
the functions here, and templates, place special tokens.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from codex_accel.errors import UserError
from codex_accel.records import Record
from codex_accel.schema import SpecialTokens, TokenizerConfig
from codex_accel.tokens import Document

PAYLOAD = ("tokenizer.json", "tokenizer_config.json")

# The split pattern of OpenAI's cl100k_base, from tiktoken's tiktoken_ext/openai_public.py.
GPT4_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

NORMALIZERS = {"nfc": normalizers.NFC, "nfkc": normalizers.NFKC, "lowercase": normalizers.Lowercase}


def _byte_level(pattern: str | None) -> pre_tokenizers.PreTokenizer:
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        return bytes_
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_])


PRE_TOKENIZERS = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "gpt4": lambda: _byte_level(GPT4_PATTERN),
    "whitespace": lambda: _byte_level(r" ?\S+|\s+"),
    "none": lambda: _byte_level(None),
}


def train(config: TokenizerConfig, texts: Iterable[str]) -> tokenizers.Tokenizer:
    """A tokenizer of the configured type, trained on `texts`; the same texts in the same order give the same one."""
    special = config.special_tokens
    names = [special.pad, special.bos, special.eos]
    if config.type == "char":
        names.append(special.unk)
    names += special.additional
    result = _train_bpe(config, texts, names) if config.type == "bpe" else _train_char(config, texts, names)
    result.add_special_tokens(names)  # their ids, 0, 1, 2, ..., are given already; this marks them as special
    result.encode_special_tokens = True
    for name in names:
        if result.encode(name, add_special_tokens=False).tokens == [name]:
            what = f"the text {name!r} alone makes this token. Choose a name that is no word of the data."
            raise UserError(config.problem("special_tokens", what))
    return result


def _train_bpe(config: TokenizerConfig, texts: Iterable[str], special: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019): any text has ids, so there is no unknown token."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if config.vocab_size < len(special) + len(alphabet):
        needed = len(special) + len(alphabet)
        raise UserError(config.problem("vocab_size", f"{config.vocab_size} is too small: {needed} or more are needed."))
    result = tokenizers.Tokenizer(models.BPE())
    if config.normalizer != "none":
        result.normalizer = NORMALIZERS[config.normalizer]()
    result.pre_tokenizer = PRE_TOKENIZERS[config.pre_tokenizer]()
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    result.train_from_iterator(texts, trainer)
    return result


def _train_char(config: TokenizerConfig, texts: Iterable[str], special: list[str]) -> tokenizers.Tokenizer:
    """One id a character, in order of code points; the rarest ones beyond `vocab_size` become the unknown token."""
    normalizer = None if config.normalizer == "none" else NORMALIZERS[config.normalizer]()
    if config.vocab_size <= len(special):
        needed = len(special) + 1
        raise UserError(config.problem("vocab_size", f"{config.vocab_size} is too small: {needed} or more are needed."))
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text if normalizer is None else normalizer.normalize_str(text))
    room = max(0, config.vocab_size - len(special))
    kept = sorted(counts, key=lambda character: (-counts[character], character))[:room]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(kept)])}
    result = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=config.special_tokens.unk))
    if normalizer is not None:
        result.normalizer = normalizer
    result.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    result.decoder = decoders.Fuse()
    return result


def save(tokenizer: tokenizers.Tokenizer, folder: Path, special: SpecialTokens, *, has_unk: bool) -> None:
    """Write the files of `PAYLOAD`, which `AutoTokenizer.from_pretrained` reads."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": special.pad,
        "bos_token": special.bos,
        "eos_token": special.eos,
        **({"unk_token": special.unk} if has_unk else {}),
        "additional_special_tokens": special.additional,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer with the ids that the toolkit places itself (None where the tokenizer has no such token)."""

    folder: Path
    backend: tokenizers.Tokenizer
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None

    @property
    def vocab_size(self) -> int:
        """Ids that can occur: one more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, on all cores, without special tokens."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)


def load(folder: Path, *, key: str = "tokenizer") -> Tokenizer:
    """The tokenizer of a folder with `tokenizer.json`. Raises UserError if that is missing or damaged."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{key} = '{folder}': has no tokenizer.json. Give a folder made by train_tokenizer.")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
        named = _special_names(folder)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: is not a tokenizer ({error}).") from error
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    ids = {role: backend.token_to_id(name) if name else None for role, name in named.items()}
    return Tokenizer(folder, backend, ids["bos"], ids["eos"], ids["pad"], ids["unk"])


def _special_names(folder: Path) -> dict[str, str | None]:
    """Text of the bos, eos, pad and unk tokens, from tokenizer_config.json and the older special_tokens_map.json."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= json.loads((folder / name).read_text(encoding="utf-8"))
    result: dict[str, str | None] = {}
    for role in ("bos", "eos", "pad", "unk"):
        value = settings.get(f"{role}_token")
        result[role] = value["content"] if isinstance(value, dict) else value
    return result


def encode_records(tokenizer: Tokenizer, records: list[Record], *, add_bos: bool, add_eos: bool) -> list[Document]:
    """Documents of `records`, in order: [BOS] part part ... [EOS], each part encoded on its own.

    Every token of a text record is a target; of a prompt/completion record only the completion's, with EOS.
    """
    encoded = iter(tokenizer.encode([text for record in records for text, _ in record.parts]))
    return [_document(tokenizer, record, encoded, add_bos=add_bos, add_eos=add_eos) for record in records]


def _document(tokenizer: Tokenizer, record: Record, encoded: Any, *, add_bos: bool, add_eos: bool) -> Document:
    ids: list[int] = [tokenizer.bos_id] if add_bos and tokenizer.bos_id is not None else []
    spans: list[tuple[int, int]] = []
    for _, is_target in record.parts:
        start = len(ids)
        ids += next(encoded)
        if is_target:
            spans.append((start, len(ids)))
    if add_eos and tokenizer.eos_id is not None:
        ids.append(tokenizer.eos_id)
        if record.parts[-1][1]:
            spans[-1] = (spans[-1][0], len(ids))
    everything = all(is_target for _, is_target in record.parts)
    return Document(
        input_ids=np.array(ids, dtype=np.uint32),
        target_spans=() if everything else tuple(spans),
        num_bytes=sum(len(text.encode()) for text, is_target in record.parts if is_target),
        record_id=record.id.hex(),
    )
