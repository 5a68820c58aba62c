"""Tokens are drawn from the model's distribution, cut as transformers cuts it, and near-ties are noticed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from codex_accel import sampling
from codex_accel.errors import UserError
from codex_accel.sampling import Settings


def logits_of(seed: int, rows: int = 1, size: int = 50, dtype=torch.float32) -> torch.Tensor:
    return (3 * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))).to(dtype)


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 5.0),
    top_k=st.none() | st.integers(1, 80),
    top_p=st.none() | st.floats(0.01, 1.0),
)
def test_candidates_are_those_of_transformers(seed, temperature, top_k, top_p):
    logits = logits_of(seed, rows=3)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k is not None else []
    warpers += [TopPLogitsWarper(top_p)] if top_p is not None and top_p < 1 else []
    theirs = LogitsProcessorList(warpers)(None, logits)
    assert torch.equal(sampling.candidates(logits, Settings(temperature, top_k, top_p)), theirs)


@pytest.mark.parametrize(
    "settings", [Settings(1.0), Settings(2.0, 10), Settings(0.7, None, 0.9), Settings(1.5, 20, 0.8)]
)
def test_draws_have_the_distribution_of_the_candidates(settings):
    """Of numbers spread evenly over [0, 1), each token gets its share to within one number."""
    logits, number = logits_of(5), 20_000
    numbers = [(place + 0.5) / number for place in range(number)]
    tokens, _ = sampling.choose(logits.expand(number, -1), [settings] * number, numbers)
    expected = sampling.candidates(logits, settings)[0].double().softmax(-1) * number
    found = torch.bincount(torch.tensor(tokens), minlength=50)
    assert float((found - expected).abs().max()) <= 1.0
    assert not found[expected == 0].any()


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_no_number_draws_a_token_that_is_cut_off(number):
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]])
    [token], _ = sampling.choose(logits, [Settings(1.0)], [number])
    assert token == (1 if number == 0 else 3)


def test_rows_of_a_batch_have_settings_of_their_own():
    logits = logits_of(2, rows=4)
    settings = [Settings(), Settings(1.0, 1), Settings(1.0), Settings()]
    tokens, _ = sampling.choose(logits, settings, [0.0, 0.9, 0.3, 0.0])
    assert [tokens[0], tokens[1], tokens[3]] == [int(logits[row].argmax()) for row in (0, 1, 3)]
    alone = [
        sampling.choose(logits[row : row + 1], [settings[row]], [[0.0, 0.9, 0.3, 0.0][row]])[0][0] for row in range(4)
    ]
    assert tokens == alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_token_is_the_same_whatever_the_other_rows_do(dtype):
    """Rows of bfloat16 have ties; rows that are all greedy go another way on a CPU."""
    logits = torch.cat([logits_of(seed, rows=40, dtype=dtype) for seed in range(5)])
    greedy = [Settings()] * len(logits)
    tokens, near = sampling.choose(logits, greedy, [0.0] * len(logits))
    mixed = sampling.choose(torch.cat([logits, logits[:1]]), [*greedy, Settings(1.0)], [0.0] * (len(logits) + 1))
    assert (tokens, near) == (mixed[0][:-1], mixed[1][:-1])
    assert tokens == logits.argmax(-1).tolist()
    assert any(near) == (dtype == torch.bfloat16)


def test_logits_that_are_no_numbers_are_an_error_beside_drawn_rows_too():
    logits = logits_of(1, rows=2)
    logits[0, 7] = torch.nan
    with pytest.raises(UserError, match="logits that are not finite"):
        sampling.choose(logits, [Settings(), Settings(1.0)], [0.0, 0.5])


@pytest.mark.parametrize("settings", [[Settings()] * 2, [Settings()] * 2 + [Settings(1.0)]])
def test_small_logits_are_near_each_other_below_a_limit_of_its_own(settings):
    logits = torch.tensor([[0.5, 0.5 - 9e-5], [0.5, 0.5 - 2e-4], [0.0, 0.0]])[: len(settings)]
    assert sampling.choose(logits, settings, [0.0] * len(settings))[1][:2] == [True, False]


def test_of_equal_logits_the_first_is_taken_and_noticed():
    logits = torch.tensor([[0.0, 7.0, 7.0, 1.0], [0.0, 7.0, 6.9, 1.0], [0.0, 7.0, 7.00005, 1.0]])
    assert sampling.choose(logits, [Settings()] * 3, [0.0] * 3) == ([1, 1, 2], [True, False, True])


@pytest.mark.parametrize(
    ("dtype", "gap", "near"),
    [
        (torch.bfloat16, 0.25, True),
        (torch.bfloat16, 1.0, False),
        (torch.float16, 0.125, True),
        (torch.float16, 0.5, False),
    ],
)
def test_a_near_tie_of_half_precision_is_some_steps_of_the_type(dtype, gap, near):
    """At 20 a step of bfloat16 is 0.125 and one of float16 0.016; what moves them: docs/generate.md."""
    logits = torch.tensor([[0.0, 20.0, 20.0 - gap]], dtype=dtype)
    assert sampling.choose(logits, [Settings()], [0.0])[1] == [near]


def test_a_draw_beside_the_edge_of_two_tokens_is_noticed():
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0]])  # edges at 0.25, 0.5, 0.75
    numbers = [0.3, 0.25 + 1e-6, 0.5 - 1e-6, 1e-6, 1 - 1e-6]
    _, near = sampling.choose(logits.expand(5, -1), [Settings(1.0)] * 5, numbers)
    assert near == [False, True, True, False, False]


def test_a_low_temperature_widens_what_rounding_could_turn():
    """Two logits that move apart by 9e-5, less than NEAR, move their edge from 0.5 to 0.5022 at temperature 0.01."""
    told = [
        sampling.choose(torch.tensor([[moved, 0.0]]), [Settings(0.01)], [number])
        for moved, number in ((0.0, 0.501), (9e-5, 0.501), (0.0, 0.52))
    ]
    assert told == [([1], [True]), ([0], [True]), ([1], [False])]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    logits = logits_of(1, rows=2)
    logits[1, 3] = bad
    with pytest.raises(UserError, match="the model gives logits that are not finite"):
        sampling.choose(logits, [Settings()] * 2, [0.0] * 2)


def test_draws_are_those_of_the_seed():
    assert sampling.draws(3, 5) == sampling.draws(3, 9)[:5] != sampling.draws(4, 5)
