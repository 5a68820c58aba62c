"""A body is understood as it stands or refused with what is wrong, whatever comes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codex_accel import api
from codex_accel.api import Asked, Refused


def refusal(parse, body) -> Refused:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(Refused) as caught:
        parse(data)
    return caught.value


def completion(data: bytes) -> Asked:
    return api.completion(data, "m")


def chat(data: bytes) -> Asked:
    return api.chat(data, "m")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)
KEYS = ["prompt", "messages", "model", "stop", "seed", "n", "top_k", "stream", "max_tokens", "tools", "logit_bias"]
BODIES = st.one_of(
    st.binary(max_size=60),
    st.builds(lambda value: json.dumps(value).encode(), JSON),
    st.builds(
        lambda value: json.dumps({"model": "m", **value}).encode(),
        st.dictionaries(st.sampled_from(KEYS), JSON | st.just([{"role": "user", "content": "x"}]), max_size=5),
    ),
)


@pytest.mark.security
@pytest.mark.parametrize("parse", [api.infer, completion, chat])
@given(data=BODIES)
def test_any_body_is_a_request_or_is_refused_in_ascii(parse, data):
    try:
        found = parse(data)
    except Refused as refused:
        found = refused
    if isinstance(found, Refused):
        assert 400 <= found.status < 500
        assert len(found.message) < 3000
        assert json.loads(api.dump(found.body))["error"]["code"] == found.code
    else:
        assert isinstance(found, Asked)


def test_all_problems_are_told_at_once_with_hints():
    told = refusal(api.infer, {"promt": "a", "top_p": 2, "stop": [1], "temperature": 1e-9})
    for words in (
        "'promt': unknown key. Did you mean 'prompt'?",
        "top_p: should be less than or equal to 1",
        "stop: is a",
    ):
        assert words in told.message
    assert (told.status, told.code) == (400, "invalid_request")


def test_values_are_not_repeated():
    secret = "sk-" + "a1B2" * 12
    for body in ({secret: 1}, {"prompt": "", "stop": {"x": secret}}, {"prompt": "", "seed": secret}, [secret], secret):
        assert secret not in refusal(api.infer, body).message


@pytest.mark.parametrize(
    ("body", "prompts"),
    [
        ({}, ("",)),
        ({"prompt": None}, ("",)),
        ({"prompt": "a"}, ("a",)),
        ({"prompt": ["a", "b"]}, ("a", "b")),
        ({"prompt": [3, 4]}, ((3, 4),)),
        ({"prompt": [[3], [4, 5]]}, ((3,), (4, 5))),
    ],
)
def test_the_forms_of_openais_prompts(body, prompts):
    assert completion(json.dumps({"model": "m", **body}).encode()).prompts == prompts


@pytest.mark.parametrize("prompt", [[], [True], [-1], [1.5], [[]], ["a", 1], {"a": 1}, 3, "\ud800", [None]])
def test_what_is_no_prompt_is_refused(prompt):
    assert refusal(completion, {"model": "m", "prompt": prompt}).param == "prompt"


def test_parts_of_a_message_are_joined_and_empty_keys_say_nothing():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "c", "tool_calls": None}]
    found = chat(json.dumps({"model": "m", "messages": messages}).encode())
    assert found.prompts == (({"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}),)


@pytest.mark.parametrize(
    "message",
    [
        "hi",
        {"role": "user"},
        {"content": "x"},
        {"role": "user", "content": 1},
        {"role": "u", "content": "x", "name": "n"},
    ]
    + [{"role": "user", "content": [part]} for part in ("a", {"type": "image_url"}, {"type": "text"}, {"text": "a"})],
)
def test_what_is_no_message_is_refused(message):
    assert refusal(chat, {"model": "m", "messages": [message]}).param == "messages"


@pytest.mark.parametrize(
    ("more", "fits"),
    [
        ({"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "echo": False, "best_of": 1}, True),
        ({"frequency_penalty": 0.5}, False),
        ({"logit_bias": {"5": 1}}, False),
        ({"echo": True}, False),
        ({"logprobs": 0}, False),
        ({"best_of": True}, False),
        ({"suffix": "x"}, False),
    ],
)
def test_a_key_that_would_change_nothing_may_only_say_what_holds(more, fits):
    body = {"model": "m", "prompt": "a", **more}
    if fits:
        assert completion(json.dumps(body).encode()) == Asked(("a",))
    else:
        assert "is not supported here" in refusal(completion, body).message


def test_another_model_is_not_found():
    told = refusal(completion, {"model": "gpt-4", "prompt": "a"})
    assert (told.status, told.code) == (404, "model_not_found")
    assert "'m'" in told.message


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "not_json"),
        (b"\xff", "not_utf8"),
        (b'{"prompt": "a", "prompt": "b"}', "not_json"),
        (b'{"prompt": "a", "temperature": NaN}', "not_json"),
        (b'{"prompt": "a", "temperature": 1e999}', "not_json"),
        (b"[" * 100_000, "not_json"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "not_json"),
        (b"[]", "not_an_object"),
        (b"9" * 5000, "not_json"),
    ],
)
@pytest.mark.security
def test_json_is_strict(data, code):
    assert refusal(api.infer, data).code == code


@given(value=JSON)
def test_replies_are_ascii_and_mean_what_they_say(value):
    assert json.loads(api.dump(value)) == value
    assert api.dump(value).isascii()
    assert b"\n" not in api.event([value])[:-2]
