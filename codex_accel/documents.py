"""Records into documents: [BOS] part part ... [EOS], with the spans that are to be predicted.

Rule: each part is encoded on its own and text never becomes a special token; only a template's special parts, and BOS
and EOS here, are placed as such. Of a record whose every part is a target, every token is one; else only the target
parts are, and EOS if the last part is.

Shapes: D records, P parts, N tokens.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from codex_accel import chat, sources
from codex_accel.errors import UserError
from codex_accel.records import BadRecord, Reader, Record
from codex_accel.sources import RawFile
from codex_accel.tokenizer import Tokenizer
from codex_accel.tokens import Document, Documents


def encode(
    tokenizer: Tokenizer, records: Sequence[Record], *, add_bos: bool, add_eos: bool
) -> tuple[Documents, np.ndarray]:
    """Documents of `records` in order, and the UTF-8 bytes of each record's text, (D,).

    BOS or EOS that a chat template has placed already is not placed twice.
    """
    parts = [part for record in records for part in record.parts]
    num_parts = np.array([len(record.parts) for record in records])  # (D,), each 1 or more
    first = np.cumsum(num_parts) - num_parts  # (D,) place of each record's first part
    special = np.array([part.is_special for part in parts])  # (P,)
    target = np.array([part.is_target for part in parts])
    num_bytes = np.array([0 if part.is_special else _num_bytes(part.text) for part in parts])

    goes_on = np.ones(len(parts), dtype=bool)
    goes_on[first] = False
    ids, part_lengths = tokenizer.encode_batch(
        [part.text for part in parts if not part.is_special], continued=goes_on[~special]
    )
    if special.any():
        lengths = np.ones(len(parts), dtype=np.int64)
        lengths[~special] = part_lengths
        is_special = np.repeat(special, lengths)
        stream = np.empty(len(is_special), dtype=ids.dtype)
        stream[~is_special] = ids
        stream[is_special] = [tokenizer.special_ids[part.text] for part in parts if part.is_special]
        ids, part_lengths = stream, lengths

    bos, eos = _wanted(tokenizer, records, add_bos=add_bos, add_eos=add_eos, placed=bool(special.any()))  # (D,)
    lengths = np.add.reduceat(part_lengths, first) + bos + eos
    starts = np.cumsum(lengths) - lengths
    input_ids = np.empty(int(lengths.sum()), dtype=ids.dtype)
    is_text = np.ones(len(input_ids), dtype=bool)
    for wanted, place, id_ in ((bos, starts, tokenizer.bos_id), (eos, starts + lengths - 1, tokenizer.eos_id)):
        if id_ is not None:
            input_ids[place[wanted]] = id_
            is_text[place[wanted]] = False
    input_ids[is_text] = ids

    spans, num_spans = _spans(part_lengths, target, num_parts, first, bos, eos)
    documents = Documents(
        input_ids=input_ids,
        lengths=lengths,
        spans=spans,
        num_spans=num_spans,
        num_bytes=np.add.reduceat(num_bytes * target, first),
        record_ids=np.frombuffer(b"".join(record.id for record in records), dtype="V16"),
    )
    return documents, np.add.reduceat(num_bytes, first)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _wanted(
    tokenizer: Tokenizer, records: Sequence[Record], *, add_bos: bool, add_eos: bool, placed: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Booleans (D,): where BOS and EOS are placed here; `placed` tells that a template has placed special tokens."""
    bos = np.full(len(records), add_bos and tokenizer.bos_id is not None)
    eos = np.full(len(records), add_eos and tokenizer.eos_id is not None)
    if placed:
        name_of = {id_: name for name, id_ in tokenizer.special_ids.items()}
        bos_name, eos_name = (name_of.get(-1 if id_ is None else id_) for id_ in (tokenizer.bos_id, tokenizer.eos_id))
        there = np.array([chat.ends(record.parts, bos=bos_name, eos=eos_name) for record in records])
        bos, eos = bos & ~there[:, 0], eos & ~there[:, 1]
    return bos, eos


def _spans(
    part_lengths: np.ndarray,
    target: np.ndarray,
    num_parts: np.ndarray,
    first: np.ndarray,
    bos: np.ndarray,
    eos: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Target spans (S, 2) and their number for each record (D,); neighbouring target parts make one span."""
    stop = np.cumsum(part_lengths)
    shift = np.repeat(bos - (stop[first] - part_lengths[first]), num_parts)  # from the stream to the document
    start, stop = stop - part_lengths + shift, stop + shift
    is_first, is_last = np.zeros(len(target), dtype=bool), np.zeros(len(target), dtype=bool)
    is_first[first], is_last[first + num_parts - 1] = True, True
    stop[is_last & target] += np.repeat(eos, num_parts)[is_last & target]
    marked = target & ~np.repeat(np.logical_and.reduceat(target, first), num_parts)
    opens = marked & (is_first | ~np.roll(target, 1))
    closes = marked & (is_last | ~np.roll(target, -1))
    return np.stack([start[opens], stop[closes]], axis=1), np.add.reduceat(opens.astype(np.int64), first)


def from_files(
    raw_files: Iterable[RawFile], tokenizer: Tokenizer, *, add_bos: bool, add_eos: bool
) -> Iterator[Document]:
    """Documents straight from raw files, for evaluation. Raises UserError at the first bad record."""
    for raw in raw_files:
        for item in Reader(sources.whole(raw), max_record_bytes=1 << 30):
            if isinstance(item, BadRecord):
                raise UserError(f"{item.file}:{item.line}: {item.reason}. Mend the record; scoring leaves none out.")
            yield from encode(tokenizer, [item], add_bos=add_bos, add_eos=add_eos)[0]
