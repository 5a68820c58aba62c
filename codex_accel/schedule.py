"""Learning rate as a pure function of the step.

Rule: `scale_at(step)` depends on the step and on numbers fixed before the first one, so a resumed run needs no
scheduler state and a plot of the whole schedule can be made without training. Steps count from 0; the step that is
about to be taken is the argument.
"""

import math
from dataclasses import dataclass
from typing import Any

from codex_accel.errors import UserError


def resolve_length(length: int | float | str, *, max_steps: int, steps_per_epoch: float) -> int:
    """A length of the config in steps: 100 -> 100; 0.1 -> a tenth of `max_steps`; "2 epochs" -> two epochs."""
    if isinstance(length, str):
        return round(float(length.removesuffix(" epochs")) * steps_per_epoch)
    if isinstance(length, float):
        return round(length * max_steps)
    return length


@dataclass(frozen=True)
class Schedule:
    """A schedule with every length in steps."""

    name: str
    max_steps: int
    warmup_steps: int
    final_lr_scale: float
    step_size: int
    gamma: float
    decay_steps: int

    def scale_at(self, step: int) -> float:
        """The learning rate of optimizer step `step` as a share of the peak, from 0 to 1.

        Warm-up is linear and ends at the peak: (step + 1) / (warmup_steps + 1), as in nanoGPT. After it, with t from 0
        at the end of warm-up to 1 at the last step: constant 1; linear and cosine (Loshchilov and Hutter 2017) from 1
        to `final_lr_scale`; step `gamma` ** (steps since warm-up // step_size); inverse_sqrt sqrt(warmup / step)
        (Vaswani et al. 2017); wsd 1, then linear to `final_lr_scale` over the last `decay_steps` (Hu et al. 2024).
        """
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        since = step - self.warmup_steps
        t = min(1.0, since / max(1, self.max_steps - 1 - self.warmup_steps))
        floor = self.final_lr_scale
        match self.name:
            case "constant":
                return 1.0
            case "linear":
                return 1.0 - (1.0 - floor) * t
            case "cosine":
                return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * t))
            case "step":
                return self.gamma ** (since // self.step_size)
            case "inverse_sqrt":
                return math.sqrt(max(1, self.warmup_steps) / max(1, self.warmup_steps, step))
            case "wsd":
                left = self.max_steps - 1 - step
                return 1.0 if left >= self.decay_steps else floor + (1.0 - floor) * max(0, left) / self.decay_steps
        raise ValueError(f"unknown schedule {self.name!r}")


def build(settings: Any, *, max_steps: int, steps_per_epoch: float) -> Schedule:
    """The `schedule` section of a config with its lengths resolved to steps."""

    def steps(length: int | float | str) -> int:
        return resolve_length(length, max_steps=max_steps, steps_per_epoch=steps_per_epoch)

    warmup_steps, decay_steps, step_size = steps(settings.warmup), steps(settings.decay), steps(settings.step_size)
    if settings.name == "wsd" and warmup_steps + decay_steps > max_steps:
        raise UserError(
            f"schedule: warmup ({warmup_steps}) and decay ({decay_steps}) take more than the run's {max_steps} steps. "
            "Shorten one of them."
        )
    if settings.name == "step" and step_size < 1:
        raise UserError(f"schedule.step_size = {settings.step_size}: is less than a step. Make it longer.")
    return Schedule(
        name=settings.name,
        max_steps=max_steps,
        warmup_steps=warmup_steps,
        final_lr_scale=settings.final_lr_scale,
        step_size=max(1, step_size),
        gamma=settings.gamma,
        decay_steps=max(1, decay_steps),
    )
