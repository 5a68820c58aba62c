"""Counts of one split of a dataset, gathered block by block and merged unit by unit.

Rule: only sums, a histogram of lengths and the few examples of lowest rank are held, so memory does not grow with the
number of documents, and the result does not depend on how the documents were shared out.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from codex_accel import chat, splits
from codex_accel.records import Record
from codex_accel.tokenizer import Tokenizer
from codex_accel.tokens import Document, Documents

NUM_EXAMPLES, EXAMPLE_TOKENS = 4, 320  # documents shown in the report, and tokens of each
SUMS = ("num_tokens", "num_target_tokens", "num_bytes", "num_unknown_tokens", "num_without_eos", "num_without_target")


class Tally:
    """Counts of the documents of one split in one unit."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.sums = dict.fromkeys(SUMS, 0)
        self.lengths: Counter[int] = Counter()
        self.examples: list[tuple[int, dict[str, Any]]] = []  # (rank, example), lowest rank first
        self.first_without_target = ""  # file:line

    def add(self, documents: Documents, records: Sequence[Record], text_bytes: np.ndarray) -> None:
        """Count documents (D) with their records and the UTF-8 bytes of their texts, (D,)."""
        num_targets = documents.num_targets()
        self.sums["num_tokens"] += int(documents.lengths.sum())
        self.sums["num_target_tokens"] += int(num_targets.sum())
        self.sums["num_bytes"] += int(text_bytes.sum())
        if self.tokenizer.unk_id is not None:
            self.sums["num_unknown_tokens"] += int((documents.input_ids == self.tokenizer.unk_id).sum())
        self.sums["num_without_eos"] += self._num_without_eos(documents, records)
        empty = np.flatnonzero(num_targets == 0)
        self.sums["num_without_target"] += len(empty)
        if len(empty) and not self.first_without_target:
            self.first_without_target = f"{records[empty[0]].file}:{records[empty[0]].line}"
        lengths, counts = np.unique(documents.lengths, return_counts=True)
        self.lengths.update(dict(zip(lengths.tolist(), counts.tolist(), strict=True)))
        self._choose_examples(documents, records)

    def _num_without_eos(self, documents: Documents, records: Sequence[Record]) -> int:
        """Documents that do not end in EOS; one that a template has placed counts if only white space follows it."""
        if not len(documents.input_ids):
            return len(documents)
        last = documents.input_ids[np.cumsum(documents.lengths) - 1]
        ends = (documents.lengths > 0) & (last == (-1 if self.tokenizer.eos_id is None else self.tokenizer.eos_id))
        name = next((name for name, id_ in self.tokenizer.special_ids.items() if id_ == self.tokenizer.eos_id), None)
        return sum(
            not chat.ends(records[index].parts, bos=None, eos=name)[1] for index in np.flatnonzero(~ends).tolist()
        )

    def _choose_examples(self, documents: Documents, records: Sequence[Record]) -> None:
        heads = np.array([int.from_bytes(record.id[:8], "big") for record in records], dtype=np.uint64)
        ranks = splits.ranks(heads, seed=1)
        for index in np.argsort(ranks, kind="stable")[:NUM_EXAMPLES]:
            rank = int(ranks[index])
            if len(self.examples) < NUM_EXAMPLES or rank < self.examples[-1][0]:
                chosen = np.zeros(len(documents), dtype=bool)
                chosen[index] = True
                (document,) = documents.where(chosen)
                self.examples.append((rank, _example(self.tokenizer, document, records[index])))
                self.examples = lowest(self.examples)

    def document(self) -> dict[str, Any]:
        """Everything, as JSON."""
        lengths = sorted(self.lengths.items())
        return {"sums": self.sums, "lengths": lengths, "examples": self.examples}


def lowest(examples: Iterable[Any]) -> list[Any]:
    """The examples of lowest rank, one of each content."""
    of_rank = {example[0]: example for example in reversed(list(examples))}
    return [of_rank[rank] for rank in sorted(of_rank)][:NUM_EXAMPLES]


def merge(documents: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The tally of several units, from their JSON in order of the units."""
    sums, lengths, examples = dict.fromkeys(SUMS, 0), Counter[int](), list[Any]()
    for document in documents:
        for name in SUMS:
            sums[name] += document["sums"][name]
        lengths.update(dict(document["lengths"]))
        examples = lowest(examples + document["examples"])
    return {"sums": sums, "lengths": sorted(lengths.items()), "examples": examples}


def _example(tokenizer: Tokenizer, document: Document, record: Record) -> dict[str, Any]:
    """A document as the model sees it: its first tokens, each with what it is to the loss."""
    special = set(tokenizer.special_ids.values())
    shown = document.input_ids[:EXAMPLE_TOKENS].tolist()
    target = document.is_target(0, len(shown))
    if not document.target_spans:
        target[:1] = True  # the first token is never predicted, but belongs to the text
    kinds = [
        "special" if id_ in special else "target" if is_target else "prompt"
        for id_, is_target in zip(shown, target, strict=True)
    ]
    return {
        "record_id": document.record_id,
        "file": record.file,
        "line": record.line,
        "num_tokens": len(document.input_ids),
        "num_left_out": len(document.input_ids) - len(shown),
        "tokens": list(_readable(tokenizer, zip(shown, kinds, strict=True))),
    }


def _readable(tokenizer: Tokenizer, tokens: Iterable[tuple[int, str]]) -> Iterator[dict[str, str]]:
    """Text and kind of each token; tokens that are parts of one character come together, as far as they make one."""
    parts: list[int] = []
    for id_, kind in tokens:
        text = tokenizer.token_text(id_)
        if parts or "\\x" in text:
            parts.append(id_)
            text = tokenizer.decode(parts)
            if "\ufffd" in text and len(parts) < 4:
                continue
            if "\ufffd" in text:
                text = "".join(map(tokenizer.token_text, parts))
        parts = []
        yield {"text": text, "kind": kind}
    if parts:
        yield {"text": "".join(map(tokenizer.token_text, parts)), "kind": kind}
