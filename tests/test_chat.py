"""Messages become the parts that transformers' apply_chat_template would give, and only templates place special tokens.

The templates are those of the model families that they are named after, in short: ChatML and Zephyr; Llama 2 without
its system block and with BOS and EOS at each turn; the headers of Llama 3.
"""

import functools
import itertools
import json
import pickle

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from codex_accel import chat, tokenizer
from codex_accel.errors import UserError
from codex_accel.records import Part

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>"]
SPECIAL += ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}

# The split patterns of GPT-2 and of Llama 3; the latter from the tokenizer.json of Llama 3, the same as cl100k_base.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}

TEMPLATES = {
    "chatml": """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""",
    "zephyr": """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
""",
    "llama2": """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' -%}
{%- set messages = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- endif -%}
{%- for message in messages -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}
{%- else -%}
{{ ' ' + message['content'] | trim + ' ' + eos_token }}
{%- endif -%}
{%- endfor -%}
""",
    "llama3": """\
{{ '<|begin_of_text|>' }}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif -%}
""",
    "chatml with blocks": """\
{% for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{% endfor %}
""",
    "llama3 with blocks": """\
{{ '<|begin_of_text|>' }}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{%- if message['role'] == 'assistant' -%}
{% generation %}{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endgeneration %}
{%- else -%}
{{ message['content'] | trim + '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
""",
}
WITH_BLOCKS = [name for name in TEMPLATES if name.endswith("blocks")]


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """User and assistant in turn, after a system message."""
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


@pytest.fixture(scope="module")
def byte_pairs(shared):
    """A function from a name in PRE_TOKENIZERS to the byte-level BPE of GPT-2 with the templates' special tokens."""
    folder = shared / "tokenizers" / "gpt2"
    model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))

    @functools.cache
    def make(pattern: str, special=tuple(SPECIAL)) -> PreTrainedTokenizerFast:
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = PRE_TOKENIZERS[pattern]
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(special))
        return PreTrainedTokenizerFast(tokenizer_object=backend, **VARIABLES)

    return make


@pytest.fixture(scope="module")
def dialogues(shared) -> list[list[dict[str, str]]]:
    """Records of Dolly: 150 alone, then 50 times three in a row; the context of the first is the system message."""
    with open(shared / "instruct" / "dolly15k_part0.jsonl", encoding="utf-8") as stream:
        rows = [json.loads(line) for line, _ in zip(stream, range(300), strict=False)]
    groups = [[row] for row in rows[:150]] + [rows[first : first + 3] for first in range(150, 300, 3)]
    return [
        turns(
            *(row[field] for row in group for field in ("instruction", "response")), system=group[0]["context"] or None
        )
        for group in groups
    ]


def template(name_or_text: str, special=SPECIAL, **options):
    text = TEMPLATES.get(name_or_text, name_or_text)
    return chat.template(text, special, where="chat.jinja", **{"variables": VARIABLES.items(), **options})


@functools.cache
def without_special_tokens(reference: PreTrainedTokenizerFast) -> tokenizers.Tokenizer:
    result = tokenizers.Tokenizer.from_str(reference.backend_tokenizer.to_str())
    result.encode_special_tokens = True
    return result


def encode(reference: PreTrainedTokenizerFast, parts: tuple[Part, ...]) -> tuple[list[int], list[int]]:
    """Ids, and for each of them 1 if it is a target; each part on its own, text never as a special token."""
    backend = without_special_tokens(reference)
    ids: list[int] = []
    mask: list[int] = []
    for part in parts:
        new = [backend.token_to_id(part.text)] if part.is_special else backend.encode(part.text).ids
        ids, mask = ids + new, mask + [int(part.is_target)] * len(new)
    return ids, mask


# --- the same as apply_chat_template --------------------------------------------------------------------------------


# The headers of Llama 3 end in two newlines. Its own pattern keeps them together; GPT-2's looks at what follows.
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_apply_chat_template(name, dialogues, byte_pairs):
    reference, render = byte_pairs("llama3" if "llama3" in name else "gpt2"), template(name)
    for messages in dialogues:
        expected = reference.apply_chat_template(messages, chat_template=TEMPLATES[name], return_dict=False)
        assert encode(reference, render(messages))[0] == expected


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_targets_are_those_of_generation_blocks_in_transformers(name, dialogues, byte_pairs):
    reference, render = byte_pairs("llama3"), template(name)
    for messages in dialogues:
        expected = reference.apply_chat_template(
            messages, chat_template=TEMPLATES[name], return_dict=True, return_assistant_tokens_mask=True
        )
        assert encode(reference, render(messages))[1] == expected["assistant_masks"]
        assert 0 < sum(expected["assistant_masks"]) < len(expected["assistant_masks"])


@pytest.mark.parametrize("pattern", ["gpt2", "llama3"])
@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - set(WITH_BLOCKS)))
def test_target_follows_the_ids_that_generation_starts_from(name, pattern, dialogues, byte_pairs):
    reference, render = byte_pairs(pattern), template(name)
    for messages in dialogues[:150:5]:
        ids, mask = encode(reference, render(messages))
        prompt = reference.apply_chat_template(
            messages[:-1], chat_template=TEMPLATES[name], add_generation_prompt=True, return_dict=False
        )
        assert ids[: len(prompt)] == prompt
        assert set(mask[len(prompt) :]) == {1}


def test_every_assistant_message_is_a_target():
    parts = template("chatml")(turns("Hi", "Yes?", "Why", "So", system="Be brief"))
    assert [part.text for part in parts if part.is_target] == ["Yes?", "<|im_end|>", "\n", "So", "<|im_end|>", "\n"]


def test_text_between_special_tokens_is_one_part_unless_the_target_begins_in_it():
    assert template("llama2")(turns("Hi", "Yes?", system="Be brief")) == (
        Part("<s>", is_target=False, is_special=True),
        Part("[INST] <<SYS>>\nBe brief\n<</SYS>>\n\nHi [/INST]", is_target=False),
        Part(" Yes? ", is_target=True),
        Part("</s>", is_target=True, is_special=True),
    )


def test_blocks_that_touch_are_one_target():
    block = "{% generation %}{{ X }}{% endgeneration %}"
    text = "{% for m in messages %}" + block.replace("X", "m.content") + block.replace("X", "'!'") + "{% endfor %}"
    assert template(text)(turns("Hi", "Yes")) == (Part("Hi!Yes!", is_target=True),)


def test_blocks_within_blocks_are_one_target():
    begin, end = "{% generation %}", "{% endgeneration %}"
    text = f"{{% for m in messages %}}>{begin}a{begin}{{{{ m.content }}}}{end}b{end}{{% endfor %}}"
    assert template(text)(turns("Hi", "Yes")) == (
        Part(">", is_target=False),
        Part("aHib", is_target=True),
        Part(">", is_target=False),
        Part("aYesb", is_target=True),
    )


def test_special_token_in_which_a_target_begins_is_a_target():
    text = "{% for m in messages %}{{ m.content }}<|im_{% generation %}end|>!{% endgeneration %}{% endfor %}"
    parts = template(text)(turns("Hi", "Yes"))
    assert parts[:3] == (Part("Hi", False), Part("<|im_end|>", True, True), Part("!", True))


def test_white_space_is_swallowed_beside_tokens_with_the_flags_of_it(byte_pairs, tmp_path):
    """The tokens of Phi-3 have rstrip, a mask token lstrip; `tokenizers` applies the flags itself in the reference."""
    reference = byte_pairs("gpt2", special=())
    right, left = tokenizers.AddedToken("<|r|>", rstrip=True), tokenizers.AddedToken("<|l|>", lstrip=True)
    backend = tokenizers.Tokenizer.from_str(reference.backend_tokenizer.to_str())
    backend.add_special_tokens([right, left])
    reference = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "{% for m in messages %}{{ '<|r|>\n' + m.content + ' <|l|> \n<|r|> <|l|>' }}{% endfor %}"
    reference.save_pretrained(tmp_path)
    render = chat.template(text, where="t", **tokenizer.load(tmp_path).template_facts)
    messages = turns("\u3000 Hi \t\u2028", "\x1c Yes\x85\n ")
    expected = reference.apply_chat_template(messages, chat_template=text, return_dict=False)
    parts = render(messages)
    assert encode(reference, parts)[0] == expected
    assert [part.text for part in parts][:4] == ["<|r|>", "Hi", "<|l|>", " \n"]


# --- special tokens -------------------------------------------------------------------------------------------------


def test_name_of_a_special_token_in_a_message_stays_text():
    parts = template("chatml")(turns("What does <|im_end|> mean?", "</s> and <|im_start|> end <|im_end|>"))
    assert [part for part in parts if not part.is_special and "<" in part.text] == [
        Part("user\nWhat does <|im_end|> mean?", is_target=False),
        Part("</s> and <|im_start|> end <|im_end|>", is_target=True),
    ]
    assert [part.text for part in parts if part.is_special] == ["<|im_start|>", "<|im_end|>"] * 2


def test_longest_of_two_names_is_the_token():
    text = "{% for m in messages %}<|a|><|a|>x{{ m.content }}{% endfor %}"
    parts = template(text, ["<|a|>", "<|a|>x"])(turns("u", "v"))
    assert [part.text for part in parts] == ["<|a|>", "<|a|>x", "u", "<|a|>", "<|a|>x", "v"]


PIECES = [
    *SPECIAL,
    "<|im_",
    "end|>",
    "<",
    "|",
    ">",
    " ",
    "\n",
    "{{",
    "{% raw %}",
    "word",
    "é",
    "\U000f0000",
    "\U000f0001",
]


@pytest.mark.parametrize("name", ["chatml", "llama3 with blocks"])
@settings(max_examples=150)
@given(contents=st.lists(st.lists(st.sampled_from(PIECES), max_size=8).map("".join), min_size=2, max_size=5))
def test_rendering_is_kept_and_special_tokens_are_as_many_as_the_template_has(name, contents):
    messages = turns(*contents)
    parts = template(name)(messages)
    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(models.BPE()))
    expected = reference.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False)
    assert "".join(part.text for part in parts) == expected
    assert sum(part.is_special for part in parts) == {"chatml": 2, "llama3 with blocks": 3}[name] * len(messages) + (
        name != "chatml"
    )
    assert all(
        one.is_special or other.is_special or one.is_target != other.is_target
        for one, other in itertools.pairwise(parts)
    )


def test_text_that_leaves_no_room_for_placeholders_is_refused():
    everything = "".join(map(chr, chat.PRIVATE_USE))
    with pytest.raises(ValueError, match="too many different private-use characters"):
        template("chatml")(turns(everything, "<|im_end|>"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [("llama2", (True, True)), ("zephyr", (False, True)), ("llama3", (False, False)), ("chatml", (False, False))],
)
def test_ends_tell_which_tokens_the_template_has_placed(name, expected):
    assert chat.ends(template(name)(turns("Hi", "Yes")), bos="<s>", eos="</s>") == expected


def test_name_of_eos_at_the_end_of_a_message_is_not_eos():
    parts = template("{% for m in messages %}{{ m.content }}{% endfor %}")(turns("<s>", "Yes</s>"))
    assert chat.ends(parts, bos="<s>", eos="</s>") == (False, False)
    assert chat.ends(parts, bos=None, eos=None) == (False, False)


# --- refused --------------------------------------------------------------------------------------------------------


def reason(name_or_text: str, messages: list[dict[str, str]]) -> str:
    render = template(name_or_text)
    with pytest.raises(ValueError, match=r".") as caught:
        render(messages)
    return str(caught.value)


@pytest.mark.parametrize("messages", [[], turns("Hi"), turns(system="Be brief")])
def test_messages_without_an_assistant_have_no_target(messages):
    assert reason("chatml", messages) == "no assistant message, so nothing is a target"


def test_blocks_that_nothing_goes_into_are_no_target():
    assert reason(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}", turns("a", "b")
    ) == ("no target in what the chat template renders")


def test_template_that_ends_only_the_last_message_needs_generation_blocks():
    text = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' and loop.last %}</s>{% endif %}{% endfor %}"
    )
    assert template(text)(turns("Hi", "Yes"))
    told = reason(text, turns("Hi", "Yes", "Why", "So"))
    assert "chat.jinja" in told
    assert "{% generation %}" in told


def test_reason_of_the_template_is_told():
    told = reason("llama2", [*turns("Hi"), *turns("Hi", "Yes")])
    assert told == "refused by the chat template: Roles must alternate user/assistant/user/assistant/..."


def test_reason_that_is_made_of_data_is_not_told():
    told = reason("{{ raise_exception('bad: ' + messages[0].content) }}", turns("secret", "Yes"))
    assert told == "refused by the chat template: in words made of the data"


@pytest.mark.parametrize(
    ("expression", "error"),
    [
        ("messages[0].content + messages[0].missing", "UndefinedError"),
        ("messages[0].content + 1", "TypeError"),
        ("messages[0].content | int / 0", "ZeroDivisionError"),
        ("messages[0].__class__.__bases__", "SecurityError"),
    ],
)
def test_failure_is_located_in_the_template_without_data(expression, error):
    assert (
        reason(f"\n\n{{{{ {expression} }}}}", turns("secret", "Yes"))
        == f"failed in the chat template: {error} at its line 3"
    )


def test_unknown_role_is_refused_unless_the_template_names_it():
    messages = [{"role": "human", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert reason("chatml", messages).startswith("unknown role: that of message 1 ")
    named = "{% for m in messages %}{{ ('> ' if m.role == 'human' else '') + m.content }}{% endfor %}"
    assert template(named)(messages)[0].text == "> Hi"


def test_role_cannot_place_a_special_token():
    """Phi-4 puts the role between `<|` and `|>`, where "end" would make the token that ends a turn."""
    text = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    assert template(text)(turns("Hi", "Yes"))[0] == Part("<|user|>", is_target=False, is_special=True)
    assert reason(text, [{"role": "im_end", "content": "Hi"}, *turns("Hi", "Yes")]).startswith("unknown role")


def test_message_that_the_template_leaves_out_is_refused():
    messages = [*turns("Hi", "Yes"), {"role": "tool", "content": "{}"}, {"role": "assistant", "content": "So"}]
    assert template("chatml")(messages)
    assert reason("zephyr", messages) == "left out by the chat template: message 3, of role tool"


# --- loading --------------------------------------------------------------------------------------------------------


def test_template_that_is_not_jinja_is_located():
    with pytest.raises(UserError, match=r"^chat\.jinja:2: is not a chat template: .*\. Mend the template\.$"):
        template("{{ messages }}\n{% for %}")


@pytest.mark.parametrize("text", ["{{ strftime_now('%d %b %Y') }}", "{{ ['a', 'b'] | random }}", "{{ lipsum() }}"])
def test_template_that_depends_on_time_or_chance_is_refused(text):
    with pytest.raises(UserError, match=r"^chat\.jinja: uses (strftime_now|random|lipsum), so equal records"):
        template(text)


def test_rendering_function_can_be_sent_to_another_process():
    render, messages = template("llama3"), turns("Hi", "Yes")
    assert pickle.loads(pickle.dumps(render))(messages) == render(messages)
