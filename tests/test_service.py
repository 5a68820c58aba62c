"""Requests of many are answered as if each were alone, and what happens to one happens to no other."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from codex_accel import generation, policy, tokenizer
from codex_accel import model as models
from codex_accel.errors import UserError
from codex_accel.generation import Request
from codex_accel.prompts import encode_prompt
from codex_accel.serve_schema import Limits
from codex_accel.service import Busy, Closed, Service
from codex_accel.text_stream import MaskedStream

PROMPTS = ["Once", "One day, a big dog went to the park. He saw", "", "Lily and Tom", "Sara said", "The cat"]


@pytest.fixture(scope="module")
def loaded(shared):
    return tokenizer.load(shared / "models" / "stories260K")


@pytest.fixture(scope="module")
def model(shared):
    return models.load(shared / "models" / "stories260K").eval()


@pytest.fixture
def start(model, loaded):
    """A running service of stories260K, or of another model; all of them end with the test."""
    started = []

    def make(*, of=None, rules=None, on_news=lambda _: None, **limits) -> Service:
        made = Service(of or model, loaded, limits=Limits(**limits), policy=rules, on_news=on_news)
        thread = threading.Thread(target=made.run)
        thread.start()
        started.append((made, thread))
        return made

    yield make
    for service, thread in started:
        service.close()
        thread.join(60)
        assert not thread.is_alive()
        assert (service.num_waiting, service.num_running) == (0, 0)


def until(condition, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.002)


def asked(loaded, prompt: str, max_new_tokens: int = 24, **options) -> Request:
    return Request(encode_prompt(loaded, prompt), max_new_tokens, **options)


def wait(*jobs) -> list:
    """Outcomes of the first text of each."""
    until(lambda: all(job.is_over for job in jobs))
    return [job.rows[0].outcome for job in jobs]


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_are_those_of_one_request_at_a_time(start, model, loaded):
    requests = [asked(loaded, prompt, 10 + 7 * number) for number, prompt in enumerate(PROMPTS)]
    service = start(max_running=3)
    jobs = []
    for request in requests:  # each comes while others are under way, or wait
        jobs.append(service.submit([request], streams=False))
        until(lambda: service.num_waiting == 0 or len(jobs) > 3)
    for outcome, request in zip(wait(*jobs), requests, strict=True):
        [alone] = generation.generate(model, loaded, [request])
        assert outcome.num_near_ties == 0
        assert (outcome.text, outcome.ids, outcome.finish_reason) == (alone.text, alone.ids, alone.finish_reason)


def test_drawn_texts_follow_their_own_seed(start, model, loaded):
    requests = [asked(loaded, "Once", temperature=1.0, seed=seed) for seed in (1, 2, 1)]
    first, other, again = wait(*[start().submit([request], streams=False) for request in requests])
    [alone] = generation.generate(model, loaded, requests[:1])
    assert first.text == again.text == alone.text != other.text


def test_a_model_that_does_one_row_at_a_time_is_served_too(start, loaded):
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "state_size": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", vocab_size=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, **shape)
    mamba = AutoModelForCausalLM.from_config(config).eval()
    requests = [Request((5, 9, 11), 6), Request((7,), 4), Request((8, 8), 5)]
    service = start(of=mamba)
    found = wait(*[service.submit([request], streams=False) for request in requests])
    assert [outcome.ids for outcome in found] == [each.ids for each in generation.generate(mamba, loaded, requests)]


def test_pieces_joined_are_the_text(start, loaded):
    job = start().submit([asked(loaded, "Once", 60)], streams=True)
    [outcome] = wait(job)
    assert len(job.rows[0].pieces) > 10
    assert "".join(job.rows[0].pieces) == outcome.text


def test_a_job_may_have_several_texts(start, loaded):
    service = start()
    job = service.submit([asked(loaded, prompt, 5) for prompt in PROMPTS], streams=False)
    wait(job)
    assert [len(row.outcome.ids) for row in job.rows] == [5] * len(PROMPTS)


@settings(max_examples=4)
@given(plan=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20), st.booleans()), min_size=1, max_size=8))
def test_whatever_comes_and_goes_the_others_have_their_texts(model, loaded, plan):
    """(prompt, new tokens, whether it is cancelled at once); in batches of 4 rows at most."""
    service = Service(model, loaded, limits=Limits(max_running=4), policy=None)
    jobs = []
    for number, size, cancelled in plan:
        jobs.append(service.submit([asked(loaded, PROMPTS[number], size)], streams=False))
        if cancelled:
            service.cancel(jobs[-1])
    service.close()
    service.run()
    for job, (number, size, cancelled) in zip(jobs, plan, strict=True):
        [alone] = generation.generate(model, loaded, [asked(loaded, PROMPTS[number], size)])
        assert cancelled or job.rows[0].outcome.ids == alone.ids
    assert (service.num_waiting, service.num_running) == (0, 0)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_no_more_run_together_than_may(start, loaded):
    seen = []
    service = start(max_running=2, on_news=lambda _: seen.append(service.num_running))
    jobs = [service.submit([asked(loaded, "Once", 12)], streams=True) for _ in range(7)]
    wait(*jobs)
    assert max(seen) == 2


def test_rows_times_their_tokens_stay_below_batch_tokens(start, loaded):
    seen = []
    service = start(batch_tokens=100, on_news=lambda _: seen.append([r.size for r in service._running.values()]))
    jobs = [service.submit([asked(loaded, "Once", size)], streams=True) for size in (20, 20, 40, 20, 98, 20, 120)]
    assert all(outcome.finish_reason == "length" for outcome in wait(*jobs))
    assert all(len(sizes) * max(sizes) <= 100 or len(sizes) == 1 for sizes in seen if sizes)
    assert max(map(len, seen)) > 1


def test_who_finds_no_room_is_told(start, loaded):
    service = start(max_running=1, max_waiting=2, max_texts=1)
    jobs = [service.submit([asked(loaded, "Once", 200)], streams=False) for _ in range(3)]
    with pytest.raises(Busy):
        service.submit([asked(loaded, "Once")], streams=False)
    for job in jobs:
        service.cancel(job)
    until(lambda: service.num_waiting + service.num_running == 0)
    assert wait(service.submit([asked(loaded, "Once")], streams=False))[0].finish_reason == "length"


def test_a_closed_service_takes_nothing_and_ends_what_it_has(start, loaded):
    service = start()
    job = service.submit([asked(loaded, "Once", 60)], streams=False)
    service.close()
    with pytest.raises(Closed):
        service.submit([asked(loaded, "Once")], streams=False)
    assert len(wait(job)[0].ids) == 60


def test_a_text_that_takes_too_long_ends_where_it_is(start, loaded, model):
    service = start(max_running=1, max_time_s=0.2)
    job = service.submit([asked(loaded, "Once", 450)] * 2, streams=False)  # their time ends at the same instant
    until(lambda: job.is_over)
    cut, never = (row.outcome for row in job.rows)
    assert (cut.finish_reason, never.finish_reason) == ("time", "time")
    assert 0 < cut.num_output_tokens < 450
    [whole] = generation.generate(model, loaded, [asked(loaded, "Once", cut.num_output_tokens)])
    assert whole.text.startswith(cut.text)
    assert never.num_output_tokens == 0


def test_cancelling_frees_the_place(start, loaded):
    service = start(max_running=1)
    left = service.submit([asked(loaded, "Once", 480)], streams=False)
    until(lambda: service.num_running == 1)
    waiting = service.submit([asked(loaded, "Lily", 4)], streams=False)
    service.cancel(left)
    assert wait(waiting)[0].finish_reason == "length"
    assert left.rows[0].num_tokens < 480


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned():
    """A random Llama that gives numbers, but for prompts with token 5, whose embedding is not finite."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=512, tie_word_embeddings=False, **shape)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        made.get_input_embeddings().weight[5] = float("nan")
        made.get_output_embeddings().weight[5] = 0.0  # far from the largest logit, so that no text comes to it
    return made


@pytest.mark.parametrize("streams", [True, False])
def test_an_error_of_one_request_ends_no_other(start, poisoned, loaded, streams):
    """All of them share a batch when it fails; what a stream has sent before is not sent again."""
    good = [Request((7, 8, 9), 30), Request((30, 31), 40), Request((40,), 35)]
    alone = generation.generate(poisoned, loaded, good)
    service = start(of=poisoned, rules=policy.default_policy())
    jobs = [service.submit([request], streams=streams) for request in good]
    until(lambda: all(job.rows[0].num_tokens > 6 for job in jobs))
    bad = service.submit([Request((9, 5, 6), 10)], streams=False)
    until(lambda: bad.is_over and all(job.is_over for job in jobs))
    assert isinstance(bad.error, UserError)
    assert "logits that are not finite" in str(bad.error)
    for job, expected in zip(jobs, alone, strict=True):
        assert job.error is None
        assert (job.rows[0].outcome.ids, job.rows[0].outcome.text) == (expected.ids, expected.text)
        assert "".join(job.rows[0].pieces) == (expected.text if streams else "")
    assert wait(service.submit(good[:1], streams=False))[0].ids == alone[0].ids


# --- secrets ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def rules(tmp_path):
    """A policy that looks for words of this model's texts."""

    def make(action: str, *words: str) -> policy.Policy:
        lines = ["version: test", "rules:", f"- {{id: words, action: {action}, literals: {list(words)}}}"]
        (tmp_path / "policy.yaml").write_text("\n".join(lines))
        return policy.load(tmp_path / "policy.yaml")

    return make


def test_what_the_policy_masks_does_not_leave_as_token_ids(start, loaded, rules):
    """stories260K goes on from "Once" with " upon a time, there was ..."."""
    clean, masked = (
        wait(start(rules=made).submit([asked(loaded, "Once")], streams=False))[0]
        for made in (rules("redact", "elephant"), rules("redact", "time"))
    )
    assert clean.text.startswith(" upon a time,")
    assert (clean.num_findings, len(clean.ids)) == (0, 24)
    assert masked.text.startswith(" upon a [SECRET],")
    assert (masked.num_findings, masked.ids, masked.num_output_tokens) == (1, None, 24)


@pytest.mark.parametrize("streams", [True, False])
def test_what_the_prompt_makes_a_secret_is_masked_too(start, loaded, rules, streams):
    """The phrase of the rule begins in the prompt; what the prompt holds of it is neither repeated nor counted."""
    chosen = rules("redact", "Once upon a time")
    opening = MaskedStream(chosen, "Once")
    job = start(rules=chosen).submit([asked(loaded, "Once")], streams=streams, openings=[opening])
    [outcome] = wait(job)
    assert outcome.text.startswith("[SECRET], there was")
    assert (outcome.num_findings, outcome.ids) == (1, None)
    assert "".join(job.rows[0].pieces) == (outcome.text if streams else "")


def test_a_stream_is_masked_as_the_whole_text_is(start, loaded, rules):
    service = start(rules=rules("redact", "time", "there was a little"))
    jobs = [service.submit([asked(loaded, "Once", 60)], streams=streams) for streams in (True, False)]
    streamed, whole = wait(*jobs)
    assert streamed == whole
    assert "".join(jobs[0].rows[0].pieces) == whole.text
    assert (whole.num_findings, whole.text[:40]) == (2, " upon a [SECRET], [SECRET] girl named Li")


@pytest.mark.parametrize("streams", [True, False])
def test_a_rule_that_blocks_ends_the_text(start, loaded, rules, streams):
    service = start(rules=rules("block", "time"))
    job = service.submit([asked(loaded, "Once", 300)], streams=streams)
    [outcome] = wait(job)
    assert (outcome.text, outcome.finish_reason, outcome.ids) == (" upon a ", "content_filter", None)
    assert outcome.num_output_tokens < 30
    assert "".join(job.rows[0].pieces) == (outcome.text if streams else "")
