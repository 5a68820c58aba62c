"""What is wrong with a tokenizer, how well it compresses, and which tokenizers and models are at hand.

Rule: everything is looked up on the disk, nothing is downloaded, and what is missing is named.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codex_accel.errors import UserError
from codex_accel.tokenizer import Tokenizer

BLOCK_CHARACTERS = 1 << 20  # texts that are encoded at once
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors")


@dataclass
class Measure:
    """Sums over some texts."""

    num_texts: int = 0
    num_bytes: int = 0  # UTF-8
    num_tokens: int = 0
    num_unknown: int = 0
    num_changed: int = 0  # texts that do not come back from their ids
    first_changed: str = ""

    @property
    def bytes_per_token(self) -> float:
        """Compression: more is better."""
        return self.num_bytes / self.num_tokens if self.num_tokens else 0.0


def measure(tokenizer: Tokenizer, texts: Iterable[tuple[str, str]]) -> dict[str, Measure]:
    """Sums by group, of (group, text) pairs; each text is encoded by itself and decoded again."""
    result: dict[str, Measure] = defaultdict(Measure)
    for block in _blocks(texts):
        ids, counts = tokenizer.encode_batch([text for _, text in block])
        start = 0
        for (group, text), count in zip(block, counts.tolist(), strict=True):
            found, part = result[group], ids[start : start + count]
            start += count
            found.num_texts += 1
            found.num_bytes += len(text.encode())
            found.num_tokens += count
            found.num_unknown += 0 if tokenizer.unk_id is None else int((part == tokenizer.unk_id).sum())
            if tokenizer.decode(part.tolist()) != text:
                found.num_changed += 1
                found.first_changed = found.first_changed or text
    return dict(result)


def _blocks(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    block: list[tuple[str, str]] = []
    size = 0
    for group, text in texts:
        block.append((group, text))
        size += len(text)
        if size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def problems_of(tokenizer: Tokenizer, *, model: Path | None = None) -> list[str]:
    """Why a model should not be trained with this tokenizer; empty if nothing speaks against it.

    Raises: UserError if the model folder has no vocabulary size.
    """
    problems = [] if tokenizer.eos_id is not None else ["has no EOS token, so no document can end"]
    for id_, names in sorted(collisions(tokenizer).items()):
        problems.append(f"id {id_} stands for {' and '.join(map(repr, names))}")
    if model is not None and tokenizer.vocab_size > (room := model_vocab_size(model)):
        problems.append(f"has ids up to {tokenizer.vocab_size - 1}, the model '{model}' only below {room}")
    return problems


def collisions(tokenizer: Tokenizer) -> dict[int, list[str]]:
    """Ids that more than one token has, as the files say, with the tokens."""
    path = tokenizer.folder / "tokenizer.json"
    if path.is_file():
        document = json.loads(path.read_text(encoding="utf-8"))
        pairs = [*_vocabulary(document["model"]), *((t["content"], t["id"]) for t in document["added_tokens"])]
    elif tokenizer.backend is not None:
        pairs = list(tokenizer.backend.get_vocab(with_added_tokens=True).items())
    else:
        return {}  # a sentencepiece model is a list, its ids are the places
    names: dict[int, set[str]] = defaultdict(set)
    for name, id_ in pairs:
        names[id_].add(name)
    return {id_: sorted(found) for id_, found in names.items() if len(found) > 1}


def _vocabulary(model: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """(token, id) of a model in tokenizer.json: a mapping, or a list with scores."""
    if isinstance(model["vocab"], dict):
        yield from model["vocab"].items()
    else:
        yield from ((piece, id_) for id_, (piece, _) in enumerate(model["vocab"]))


def model_vocab_size(folder: Path) -> int:
    """`vocab_size` of the folder's config.json. Raises: UserError if there is none."""
    path = folder / "config.json"
    try:
        found = json.loads(path.read_bytes())
        return int((found.get("text_config") or found)["vocab_size"])
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Give a model folder with config.json.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: has no vocab_size. Give the folder of a language model.") from error


# --- what is at hand ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A folder that holds a tokenizer, a model or both."""

    name: str  # what from_pretrained takes
    path: Path
    tokenizer: str  # the files that make it; empty: none
    model: str  # its model_type; empty: none
    missing: tuple[str, ...]  # of what belongs to it


def below(folder: Path) -> Iterator[Place]:
    """Every tokenizer and model in `folder` and below it, sorted by path; hidden folders are left out."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if place := place_of(Path(root), set(names), name=root):
            yield place


def cached(cache: Path) -> Iterator[Place]:
    """What the cache of Hugging Face holds under the name of each repository, newest revision of `main`."""
    for repository in sorted(cache.glob("models--*")):
        name = repository.name.removeprefix("models--").replace("--", "/")
        reference = repository / "refs" / "main"
        revision = reference.read_text().strip() if reference.is_file() else ""
        snapshot = repository / "snapshots" / revision
        names = {path.name for path in snapshot.iterdir() if path.exists()} if revision and snapshot.is_dir() else set()
        place = place_of(snapshot, names, name=name)
        unfinished = tuple(
            f"an unfinished download, {path.name[:12]}" for path in repository.glob("blobs/*.incomplete")
        )
        if place is None:
            yield Place(name, repository, "", "", ("any tokenizer or model of revision main", *unfinished))
        else:
            yield Place(name, snapshot, place.tokenizer, place.model, (*place.missing, *unfinished))


def place_of(folder: Path, names: set[str], *, name: str) -> Place | None:
    """What a folder with these files holds; None if neither a tokenizer nor a model."""
    tokenizer = next((file for file in ("tokenizer.json", "tokenizer.model") if file in names), "")
    if not tokenizer and {"vocab.json", "merges.txt"} <= names:
        tokenizer = "vocab.json, merges.txt"
    model = _model_type(folder / "config.json") if "config.json" in names else ""
    if not tokenizer and not model:
        return None
    missing = []
    if tokenizer == "tokenizer.json" and "tokenizer_config.json" not in names:
        missing.append("tokenizer_config.json")
    if model:
        missing += [] if tokenizer else ["a tokenizer"]
        missing += _missing_weights(folder, names)
    return Place(name, folder, tokenizer, model, tuple(missing))


def _model_type(path: Path) -> str:
    """`model_type` of a config.json; empty if that is no configuration of a model."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return ""
    return str(found.get("model_type", "")) if isinstance(found, dict) else ""


def _missing_weights(folder: Path, names: set[str]) -> list[str]:
    """Files of weights that are not there."""
    for index in (f"{name}.index.json" for name in WEIGHTS):
        if index in names:
            try:
                shards = set(json.loads((folder / index).read_bytes())["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                return [f"a readable {index}"]
            return sorted(shards - names)
    return [] if names & set(WEIGHTS) else ["weights"]


def describe(place: Place) -> str:
    """A line for people: what it is, where it lies, what is missing."""
    what = " + ".join(part for part in (f"model {place.model}" if place.model else "", place.tokenizer) if part)
    where = "" if place.name == str(place.path) else f"  in {place.path}"
    note = f"  missing: {', '.join(place.missing)}" if place.missing else ""
    return f"{what or 'nothing':<32}  {place.name}{where}{note}"


def total(measures: Iterable[Measure]) -> Measure:
    """The sums over all groups."""
    sums: Counter[str] = Counter()
    first = ""
    for found in measures:
        first = first or found.first_changed
        sums.update({name: value for name, value in vars(found).items() if name.startswith("num_")})
    return Measure(**sums, first_changed=first)
