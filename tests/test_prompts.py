"""Prompts get the ids that they have in training, and lines that are no prompts are told."""

import functools
import json

import pytest
from conftest import ROOT, run_script

from codex_accel import chat, documents, prompts, tokenizer
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import GenerateConfig
from codex_accel.records import Part, Record

CHATML = (ROOT / "configs" / "chat" / "chatml.jinja").read_text()
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MESSAGES = [
    {"role": "user", "content": "Who <|im_end|> is it?"},
    {"role": "assistant", "content": "Me."},
    {"role": "user", "content": " Why?\n"},
]
CONFIG = GenerateConfig(checkpoint="c")
load = functools.cache(tokenizer.load)


@pytest.fixture(scope="module")
def chatty(shared, tmp_path_factory):
    """A function from a template to the tokenizer of stories260K with the tokens of ChatML and this template."""
    root = tmp_path_factory.mktemp("chat")

    def make(template: str):
        folder = root / str(len(template))
        if not folder.exists():
            (root / "t.jinja").write_text(template)
            extra = ["special_tokens.additional=['<|im_start|>', '<|im_end|>']", f"chat_template={root}/t.jinja"]
            run_script("train_tokenizer", f"base={shared}/models/stories260K", f"output_dir={folder}", *extra)
        return load(folder)

    return make


@pytest.mark.parametrize("name", ["models/stories260K", "tokenizers/gpt2", "tokenizers/mistral_v1"])
@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("text", ["Once upon", " a</s>b ", "你好\n"])
def test_a_prompt_has_the_ids_that_it_has_in_a_document(shared, name, text, add_bos):
    loaded = load(shared / name)
    parts = (Part(text, is_target=False), Part(" and so on", is_target=True))
    document, _ = documents.encode(loaded, [Record("f", 1, parts)], add_bos=add_bos, add_eos=True)
    found = prompts.encode_prompt(loaded, text, add_bos=add_bos)
    assert list(found) == document.input_ids[: len(found)].tolist()
    assert loaded.eos_id not in found[1:]
    [span] = document.spans.tolist()
    assert span[0] == len(found)


def test_an_empty_prompt_is_bos_or_nothing(shared):
    loaded = load(shared / "models" / "stories260K")
    assert prompts.encode_prompt(loaded, "") == (1,)
    assert prompts.encode_prompt(loaded, "", add_bos=False) == ()


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("template", [CHATML, LLAMA2], ids=["chatml", "llama2"])
def test_messages_have_the_ids_that_they_have_in_a_document(chatty, template, add_bos):
    """What comes after them there is the answer: the first target."""
    loaded = chatty(template)
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    assert dict(loaded.template_facts["variables"]) == {**variables, "unk_token": "<unk>"}
    render = chat.template(template, set(loaded.special_ids), where="t", variables=variables.items())
    parts = render([*MESSAGES, {"role": "assistant", "content": "So."}])
    document, _ = documents.encode(loaded, [Record("f", 1, parts)], add_bos=add_bos, add_eos=False)
    found = prompts.encode_chat(loaded, MESSAGES, add_bos=add_bos)
    assert list(found) == document.input_ids[: len(found)].tolist()
    assert document.spans.tolist()[-1][0] == len(found)


def test_messages_have_the_ids_of_transformers(chatty):
    """For words that its tokenizer does not take for special tokens, and without the BOS that ChatML does not place."""
    from transformers import AutoTokenizer

    loaded = chatty(CHATML)
    theirs = AutoTokenizer.from_pretrained(loaded.folder)
    messages = [{"role": "system", "content": "Be brief."}, *MESSAGES[1:]]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    found = prompts.encode_chat(loaded, messages, add_bos=False)
    special = {id_: name for name, id_ in loaded.special_ids.items()}
    assert [special[id_] for id_ in found if id_ in special] == ["<|im_start|>", "<|im_end|>"] * 3 + ["<|im_start|>"]
    parts = chat.template(CHATML, ["<|im_start|>", "<|im_end|>"], where="t", is_prompt=True)(messages)
    assert "".join(part.text for part in parts) == expected
    assert not any(part.is_target for part in parts)


def test_the_name_of_a_special_token_in_a_message_stays_text(chatty):
    loaded = chatty(CHATML)
    ids = prompts.encode_chat(loaded, MESSAGES[:1])
    assert ids.count(loaded.special_ids["<|im_end|>"]) == 1


@pytest.mark.parametrize(("template", "name"), [(CHATML, "<|im_end|>"), (LLAMA2, "</s>")], ids=["chatml", "llama2"])
def test_the_token_that_ends_a_turn_is_found_in_the_template(chatty, template, name):
    loaded = chatty(template)
    assert prompts.turn_end_ids(loaded) == (loaded.special_ids[name],)


def test_a_template_without_special_tokens_has_none_at_the_end_of_a_turn(chatty, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:")
    loaded = chatty(CHATML)
    assert prompts.turn_end_ids(loaded, template_file=str(tmp_path / "t.jinja")) == ()


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (MESSAGES[:2], "nothing to answer: the last message is the assistant's"),
        ([], "nothing to answer"),
        ([{"role": "wizard", "content": "a"}], "unknown role: that of message 1"),
        ([{"role": "system", "content": "a"}, MESSAGES[0]], "refused by the chat template: Only user and assistant"),
    ],
)
def test_messages_that_cannot_be_answered_are_told(chatty, messages, reason):
    with pytest.raises(ValueError, match=reason):
        prompts.encode_chat(chatty(LLAMA2), messages)


def test_messages_without_a_template_are_an_error(shared):
    loaded = load(shared / "models" / "stories260K")
    with pytest.raises(UserError, match="stories260K: has no chat template, which messages need"):
        prompts.encode_chat(loaded, MESSAGES)
    with pytest.raises(UserError, match=r"none\.jinja: cannot be read"):
        prompts.encode_chat(loaded, MESSAGES, template_file="none.jinja")


# --- lines ------------------------------------------------------------------------------------------------------------

GOOD = [
    {"prompt": "a", "id": [1, "x"]},
    "b\n",
    {"messages": [{"role": "user", "content": "c", "name": "d"}], "answer": 7},
    {"prompt": "", "messages": None, "id": 0},
]
BAD = {
    "[1, 2]": "a JSON list, not an object",
    '{"promt": "a"}': "neither 'prompt' nor 'messages': there are 'promt'",
    '{"prompt": "a", "messages": []}': "both 'prompt' and 'messages'",
    '{"prompt": 7}': "field 'prompt' is of type int, not text",
    '{"prompt": "\\ud800"}': "field 'prompt' holds a lone surrogate: at character 1",
    '{"messages": {}}': "field 'messages' is of type dict, or empty",
    '{"messages": []}': "field 'messages' is of type list, or empty",
    '{"messages": ["a"]}': "message 1 is of type str, not an object",
    '{"messages": [{"role": "user"}]}': "'content' of message 1 is of type NoneType, not text",
    '{"prompt": "a", "temperature": 1}': "'temperature' is a key of the configuration",
    '{"prompt": "a"': "not JSON",
    '{"prompt": "a", "prompt": "b"}': "duplicate key: 'prompt'",
}


def read(tmp_path, where: str, data: bytes, *, plain: bool = False) -> list[prompts.Prompt]:
    """The prompts of a file, or of standard input."""
    (tmp_path / "p.jsonl").write_bytes(data)
    if where == "file":
        return prompts.read(str(tmp_path / "p.jsonl"), plain=plain, config=CONFIG)
    with open(tmp_path / "p.jsonl", "rb") as stream:
        return prompts.read_stdin(stream, plain=plain)


@pytest.mark.parametrize("where", ["file", "stdin"])
def test_lines_become_prompts_with_what_they_were(tmp_path, where):
    data = b"\xef\xbb\xbf" + b"\r\n\n".join(json.dumps(value).encode() for value in GOOD)
    found = read(tmp_path, where, data)
    assert [each.text for each in found] == ["a", "b\n", None, ""]
    assert [each.place.rpartition(":")[2] for each in found] == ["1", "3", "5", "7"]
    assert [each.given for each in found] == [
        {"id": [1, "x"], "prompt": "a"},
        {"prompt": "b\n"},
        {"messages": [{"role": "user", "content": "c"}]},
        {"id": 0, "prompt": ""},
    ]


@pytest.mark.parametrize("where", ["file", "stdin"])
def test_every_bad_line_is_told_with_its_place(tmp_path, where):
    data = "\n".join(['{"prompt": "good"}', *BAD]).encode() + b"\n\xff\n"
    with pytest.raises(UserError) as caught:
        read(tmp_path, where, data)
    *told, last = caught.value.problems
    place = f"{tmp_path}/p.jsonl" if where == "file" else "standard input"
    for number, (line, reason) in enumerate(zip(told[:-1], BAD.values(), strict=True), 2):
        assert line.startswith(f"{place}:{number}: {reason}")
    assert told[-1].startswith(f"{place}:{len(BAD) + 2}: not utf-8: byte 0xff")
    assert last.startswith(f"{len(BAD) + 1} bad prompts in all")


def test_no_more_bad_lines_are_told_than_can_be_read(tmp_path):
    with pytest.raises(UserError) as caught:
        read(tmp_path, "file", b"7\n" * 500)
    assert len(caught.value.problems) == prompts.TOLD + 1
    assert caught.value.problems[-1].startswith("500 bad prompts")


@pytest.mark.parametrize("where", ["file", "stdin"])
def test_plain_lines_are_prompts_as_they_stand(tmp_path, where):
    found = read(tmp_path, where, b' {"prompt": 1}\r\n\n  \nb \n', plain=True)
    assert [(each.text, each.place.rpartition(":")[2]) for each in found] == [(' {"prompt": 1}', "1"), ("b ", "4")]


@pytest.mark.parametrize("where", ["file", "stdin"])
def test_lines_that_are_all_blank_are_an_error(tmp_path, where):
    with pytest.raises(UserError, match="holds no prompt, only blank lines"):
        read(tmp_path, where, b"\n  \n")
