"""Special tokens added at the end of a tokenizer that stands, so that a model can learn them.

Rule: every id of the base means the same text as before, every text gets the same ids, and no text becomes a new token.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken

from codex_accel import manifest
from codex_accel import tokenizer as tokenizer_module
from codex_accel.errors import UserError
from codex_accel.schema import TokenizerConfig
from codex_accel.tokenizer import ROLES, Tokenizer, settings_of

DEFINING = ("normalizer", "pre_tokenizer", "model", "decoder")  # parts of tokenizer.json that ids and texts follow from


def base_of(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer that `base` names, checked if it has a manifest; None if one is to be trained."""
    if config.base is None:
        return None
    folder = Path(config.base)
    if not folder.is_dir():
        raise UserError(config.problem("base", f"'{folder}' is no folder. Give one that holds a tokenizer."))
    if (folder / manifest.MANIFEST).exists():
        manifest.require(folder, kinds=("tokenizer", "model", "checkpoint"), verify=config.verify, key="base")
    return tokenizer_module.load(folder, key="base")


def save_extended(base: Tokenizer, folder: Path, config: TokenizerConfig) -> None:
    """Write `base` with `special_tokens.additional` after its ids, as a folder that `AutoTokenizer` loads.

    It has one form, the one that defines the base: a tokenizer.model beside a tokenizer.json is left behind. Its chat
    template comes along. Raises: UserError for a name that is a token already.
    """
    names = config.special_tokens.additional
    for name in names:
        if (known := _id_of(base, name)) is not None:
            what = f"{name!r} is a token of '{config.base}' already, with the id {known}. Leave it out."
            raise UserError(config.problem("special_tokens.additional", what))
    if base.processor is not None:
        (folder / "tokenizer.model").write_bytes(_with_control_pieces(base, names))
    else:
        backend = tokenizers.Tokenizer.from_str(_settings_text(base))
        backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
    text = json.dumps(_settings(base, names), indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    if base.chat_template is not None:
        (folder / "chat_template.jinja").write_text(base.chat_template, encoding="utf-8")
    try:
        num = num_new(base, tokenizer_module.load(folder))
    except ValueError as error:  # `tokenizers` counts tokens, so it fills a gap in the ids
        what = f"'{config.base}' has gaps in its ids, so nothing can be added at its end ({error}). Take another."
        raise UserError(config.problem("base", what)) from error
    assert num == len(names)


def num_new(base: Tokenizer, other: Tokenizer) -> int:
    """How many tokens `other` has after the ids of `base`, 0 if it gives the same ids.

    Raises: ValueError with the reason if an id of the base may mean another text in `other`, or a text get other ids.
    """
    if (base.processor is None) != (other.processor is None):
        raise ValueError("one is a sentencepiece model, the other a tokenizer.json")
    if base.processor is not None and other.processor is not None:
        before, after = (tokenizer_module.model_of(each) for each in (base.processor, other.processor))
        num = len(after.pieces) - len(before.pieces)
        del after.pieces[len(before.pieces) :]
        if before.pieces != after.pieces or before.normalizer_spec != after.normalizer_spec:
            raise ValueError("the pieces or the normalizer differ")
        return num
    first, second = json.loads(_settings_text(base)), json.loads(_settings_text(other))
    if differing := [part for part in DEFINING if first[part] != second[part]]:
        raise ValueError(f"the {differing[0].replace('_', '-')} of tokenizer.json differs")
    before, after = ({token["id"]: token for token in each["added_tokens"]} for each in (first, second))
    for id_, token in before.items():
        if after.pop(id_, None) != token:
            raise ValueError(f"the token {token['content']!r} of id {id_} is not the same")
    if early := [token for id_, token in after.items() if id_ < base.vocab_size]:
        raise ValueError(f"the token {early[0]['content']!r} is not at the end")
    return other.vocab_size - base.vocab_size


def _settings_text(tokenizer: Tokenizer) -> str:
    """Its tokenizer.json in the one form that `tokenizers` writes, whoever wrote the file."""
    assert tokenizer.backend is not None
    return tokenizer.backend.to_str()


def _id_of(base: Tokenizer, name: str) -> int | None:
    if base.backend is not None:
        return base.backend.token_to_id(name)
    assert base.processor is not None
    id_ = base.processor.piece_to_id(name)
    return id_ if base.processor.id_to_piece(id_) == name else None


def _with_control_pieces(base: Tokenizer, names: Sequence[str]) -> bytes:
    """The sentencepiece model with control symbols at its end, which no text gives."""
    assert base.processor is not None
    model = tokenizer_module.model_of(base.processor)
    for name in names:
        model.pieces.add(piece=name, score=0.0, type=type(model.pieces[0]).CONTROL)
    data = model.SerializeToString()
    sentencepiece.SentencePieceProcessor(model_proto=data)  # raises if it is not one
    return data


def _settings(base: Tokenizer, names: Sequence[str]) -> dict[str, Any]:
    """tokenizer_config.json: the tokens by their roles, and how long a text may be.

    Other keys of the base's are left out: they name classes that would build the tokenizer anew.
    """
    name_of = {id_: name for name, id_ in base.special_ids.items()}
    roles = {f"{role}_token": name_of.get(id_) for role in ROLES if (id_ := getattr(base, f"{role}_id")) is not None}
    others = [name for name in base.special_ids if name not in roles.values()]
    longest = settings_of(base.folder).get("model_max_length")
    class_ = "PreTrainedTokenizerFast" if base.processor is None else "LlamaTokenizer"
    return {
        "tokenizer_class": class_,
        **roles,
        "additional_special_tokens": [*others, *names],
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest if isinstance(longest, int) else 10**9,
    }
