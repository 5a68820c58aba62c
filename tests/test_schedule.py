"""The learning rate is a pure function of the step."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codex_accel import schedule
from codex_accel import train_schema as keys
from codex_accel.errors import UserError
from codex_accel.schedule import Schedule, resolve_length

NAMES = ("constant", "linear", "step", "cosine", "inverse_sqrt", "wsd")


def made(name: str, **changes) -> Schedule:
    values = {
        "max_steps": 101,
        "warmup_steps": 0,
        "final_lr_scale": 0.1,
        "step_size": 30,
        "gamma": 0.1,
        "decay_steps": 20,
    }
    return Schedule(name=name, **{**values, **changes})


def test_every_name_of_the_schema_has_a_shape():
    names = keys.Schedule.model_fields["name"].annotation.__args__
    assert set(names) == set(NAMES)
    assert all(0.0 <= made(name).scale_at(50) <= 1.0 for name in names)


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_is_linear_and_starts_above_zero(name):
    """nanoGPT's get_lr: learning_rate * (it + 1) / (warmup_iters + 1). By hand for 4 steps: fifths."""
    scales = [made(name, warmup_steps=4).scale_at(step) for step in range(5)]
    assert scales == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_first_step_without_warm_up_is_the_peak(name):
    assert made(name).scale_at(0) == 1.0


def test_constant_stays():
    assert {made("constant").scale_at(step) for step in range(101)} == {1.0}


def test_linear_is_half_way_at_the_midpoint():
    """By hand: from 1 to 0.1 over steps 0 to 100, so 0.55 at step 50 and 0.775 at step 25."""
    assert [made("linear").scale_at(step) for step in (25, 50, 100)] == pytest.approx([0.775, 0.55, 0.1], abs=1e-15)


def test_cosine_at_thirds_and_the_midpoint():
    """By hand, Loshchilov and Hutter 2017, equation 5: floor + (1 - floor) (1 + cos(pi t)) / 2 with floor 0.1: t = 1/3
    gives cos = 1/2 and 0.775; t = 1/2 gives 0.55; t = 2/3 gives 0.325."""
    cosine = made("cosine", max_steps=301)
    assert [cosine.scale_at(step) for step in (100, 150, 200)] == pytest.approx([0.775, 0.55, 0.325], abs=1e-12)


def test_cosine_after_warm_up_counts_from_its_end():
    """By hand: warm-up 20 of 121 steps leaves 20 to 120; the midpoint is step 70."""
    assert made("cosine", max_steps=121, warmup_steps=20).scale_at(70) == pytest.approx(0.55, abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_last_step_is_the_final_scale(name, floor):
    assert made(name, final_lr_scale=floor, warmup_steps=7).scale_at(100) == pytest.approx(floor, abs=1e-12)


def test_step_drops_by_gamma_every_step_size():
    """By hand: 30 steps a level, factor 0.1, counted from the end of warm-up at step 10."""
    falling = made("step", warmup_steps=10)
    assert [falling.scale_at(s) for s in (10, 39, 40, 69, 70)] == pytest.approx([1, 1, 0.1, 0.1, 0.01], abs=1e-15)


def test_inverse_sqrt_halves_at_four_times_the_warm_up():
    """Vaswani et al. 2017, section 5.3: proportional to step ** -0.5 after warm-up, so 1/2 at 4 w and 1/3 at 9 w."""
    root = made("inverse_sqrt", warmup_steps=10)
    assert [root.scale_at(step) for step in (10, 40, 90)] == pytest.approx([1.0, 1 / 2, 1 / 3], abs=1e-12)


def test_wsd_is_flat_and_then_falls_linearly():
    """By hand: the last 20 of 101 steps fall from 1 at step 80 to 0.1 at step 100; 0.55 at step 90."""
    stable = made("wsd", warmup_steps=10)
    assert [stable.scale_at(s) for s in (10, 50, 80, 90, 100)] == pytest.approx([1, 1, 1, 0.55, 0.1], abs=1e-12)


@settings(max_examples=100)
@given(
    name=st.sampled_from(NAMES),
    max_steps=st.integers(1, 10**6),
    warmup_steps=st.integers(0, 10**6),
    final_lr_scale=st.floats(0, 1),
    step_size=st.integers(1, 10**6),
    gamma=st.floats(0, 1),
    decay_steps=st.integers(1, 10**6),
    step=st.integers(0, 2 * 10**6),
)
def test_scale_is_always_from_zero_to_one(name, step, **lengths):
    scale = Schedule(name=name, **lengths).scale_at(step)
    assert math.isfinite(scale)
    assert 0.0 <= scale <= 1.0 + 1e-12


@settings(max_examples=100)
@given(name=st.sampled_from(NAMES), max_steps=st.integers(2, 60), warmup=st.integers(0, 30), floor=st.floats(0, 1))
def test_scale_never_rises_after_warm_up(name, max_steps, warmup, floor):
    shape = made(name, max_steps=max_steps, warmup_steps=warmup, final_lr_scale=floor)
    scales = [shape.scale_at(step) for step in range(warmup, max_steps + 5)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(scales))


def test_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="unknown schedule 'triangle'"):
        made("triangle").scale_at(3)


# --- lengths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "steps"),
    [(0, 0), (100, 100), (1, 1), (0.1, 20), (1.0, 200), (0.0, 0), ("2 epochs", 25), ("0.5 epochs", 6), ("0 epochs", 0)],
)
def test_length_in_steps_fraction_or_epochs(length, steps):
    """By hand: 200 steps in all, 12.5 steps an epoch."""
    assert resolve_length(length, max_steps=200, steps_per_epoch=12.5) == steps


def test_build_resolves_every_length():
    settings_ = keys.Schedule(name="wsd", warmup="1 epochs", step_size=0.25, decay=30, final_lr_scale=0.2, gamma=0.5)
    assert schedule.build(settings_, max_steps=400, steps_per_epoch=50) == Schedule(
        name="wsd", max_steps=400, warmup_steps=50, final_lr_scale=0.2, step_size=100, gamma=0.5, decay_steps=30
    )


def test_a_drop_every_zero_steps_is_refused():
    with pytest.raises(UserError, match=r"schedule\.step_size = 0: is less than a step"):
        schedule.build(keys.Schedule(name="step", step_size=0), max_steps=5, steps_per_epoch=1)


def test_warm_up_and_decay_longer_than_the_run_are_refused():
    settings = keys.Schedule(name="wsd", warmup=3, decay=3)
    with pytest.raises(UserError, match=r"warmup \(3\) and decay \(3\) take more than the run's 5 steps"):
        schedule.build(settings, max_steps=5, steps_per_epoch=1)
