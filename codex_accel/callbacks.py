"""Functions that are called at named moments of a run.

Rule: a callback is a function; what it remembers is kept in the checkpoints, so a resumed run calls it as if it had
never stopped. `CALLBACKS` is extended by the entry points `codex_accel.callbacks`. Nothing here imports torch before it
is needed.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic

from codex_accel import events, plugins, redaction, seeds
from codex_accel.config import did_you_mean
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import GenerateConfig
from codex_accel.events import LineLog
from codex_accel.schema import Positive
from codex_accel.train_schema import TrainConfig

MOMENTS = ("on_step", "on_evaluate", "on_save", "on_end")
DECIDING = MOMENTS[:2]  # the next checkpoint holds what comes of them, or they come again; on_save is after it
SAMPLES, HISTORY = "samples.ndjson", "history.ndjson"  # in the run folder


@dataclass(frozen=True)
class Moment:
    """What a callback is told."""

    name: str  # on_step, on_evaluate, on_save or on_end
    state: Any  # checkpoint.TrainerState; its step is the number of steps taken
    values: Mapping[str, Any]
    config: TrainConfig
    model: Any  # the bare model
    tokenizer: Any  # tokenizer.Tokenizer
    events: LineLog
    steps_per_epoch: float
    elapsed_s: float  # training time, restarts included
    is_main_process: bool = True  # every process calls; the main one writes files, and its answer counts
    memory: dict[str, Any] = field(default_factory=dict)  # of this callback; JSON, kept in checkpoints

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.config.output_dir)


Callback = Callable[[Moment], str | None]
Callbacks = dict[str, dict[str, Callback]]  # name -> moment -> function


def load(config: TrainConfig) -> Callbacks:
    """The callbacks of the configuration. Raises UserError with all mistakes in their names and settings."""
    called, problems = {}, []
    for name, given in config.callbacks.items():
        key = f"callbacks.{name}"
        try:
            make = plugins.find(plugins.CALLBACKS, CALLBACKS, name, config=config, key=key)
            with plugins.blaming(plugins.CALLBACKS, name, "cannot be made", config=config, key=key):
                called[name] = make(config, **plugins.settings(make, given, config=config, key=key))
                _require_functions(called[name])
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return called


def _require_functions(moments: Any) -> None:
    if not isinstance(moments, dict) or not all(callable(function) for function in moments.values()):
        raise TypeError(f"it gives {moments!r}, not functions by moment ({', '.join(MOMENTS)})")
    for name in moments:
        if name not in MOMENTS:
            raise ValueError(f"no such moment: {name!r}. {did_you_mean(str(name), MOMENTS)}")


def call(called: Callbacks, moment: Moment, accelerator: Any) -> str:
    """Call all that wait for this moment, in order; returns why the run is to end, or "".

    The first reason of a run stays. With more than one process the main one's reasons count, and what any of them
    raises ends all.

    Raises: UserError naming the callback that failed, or whose answer or memory cannot be taken.
    """
    asked = {name: moments[moment.name] for name, moments in called.items() if moment.name in moments}
    if not asked:
        return moment.state.end_reason
    moment = dataclasses.replace(moment, is_main_process=accelerator.is_main_process)
    try:
        reasons, problems = [_ask(name, function, moment) for name, function in asked.items()], []
    except UserError as error:
        reasons, problems = [], error.problems
    reason = next(filter(None, reasons), "")
    if accelerator.num_processes > 1:
        reason, problems = _agreed(accelerator, reason, problems)
    if problems and accelerator.is_main_process:
        raise UserError(*problems)
    if problems:
        raise SystemExit(2)  # the main process tells them
    return moment.state.end_reason or reason


def _ask(name: str, function: Callback, moment: Moment) -> str:
    """What one callback answers; keeps what it remembers."""
    kept, key = moment.state.callbacks.setdefault(name, {}), f"callbacks.{name}"
    memory = kept if moment.name in DECIDING else copy.deepcopy(kept)
    where = f"{moment.name} of step {moment.state.step}"
    with plugins.blaming(plugins.CALLBACKS, name, f"failed at {where}", config=moment.config, key=key):
        reason = function(dataclasses.replace(moment, memory=memory))
        if not isinstance(reason, str | None):
            raise TypeError(f"it answers {reason!r}, neither None nor text that tells why the run is to end")
        if moment.name not in DECIDING and (reason or memory != kept):
            raise ValueError("a checkpoint has been written, so it cannot end the run or remember any more")
        if not _is_json(memory):
            raise TypeError(f"it remembers what is not plain JSON: {redaction.words(repr(memory), 200)}")
        if redaction.value(memory) != memory:
            raise ValueError("it remembers a secret, and a checkpoint would hold it as it stands")
    return redaction.text(f"{name}: {reason}") if reason else ""


def _is_json(memory: dict[str, Any]) -> bool:
    """Whether a checkpoint would give it back as it is: no tuples, no keys that are numbers, no NaN."""
    try:
        return json.loads(json.dumps(memory, allow_nan=False)) == memory
    except (TypeError, ValueError, RecursionError):
        return False


def _agreed(accelerator: Any, reason: str, problems: list[str]) -> tuple[str, list[str]]:
    """The main process's reason, and the problems of the first process that has any."""
    from accelerate.utils import gather_object

    from codex_accel import processes

    if not processes.any_process(accelerator, bool(reason or problems)):
        return "", []
    outcomes = gather_object([(reason, problems)])
    return outcomes[0][0], next((found for _, found in outcomes if found), [])


# --- shipped --------------------------------------------------------------------------------------------------------


def early_stopping(
    config: TrainConfig,
    *,
    metric: Literal["loss", "perplexity", "bits_per_byte", "token_accuracy"] = "loss",
    patience: Positive = 3,
    min_delta: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] = 0.0,
) -> dict[str, Callback]:
    """End the run after `patience` evaluations in a row of which none is better than the best by more than `min_delta`.

    Only `data.validation_split` decides.
    """
    _require_validation(config, "early_stopping")
    if config.evaluation.every_steps is None:
        what = "needs evaluation.every_steps, for there is one evaluation, at the end. Set it, or take it out."
        raise UserError(config.problem("callbacks.early_stopping", what))
    if metric == "bits_per_byte" and config.evaluation.max_windows is not None:
        what = "bits_per_byte needs evaluation.max_windows = null: a part of the split has none. Or take loss."
        raise UserError(config.problem("callbacks.early_stopping.metric", what))
    sign = -1 if metric == "token_accuracy" else 1  # less is better but for the accuracy

    def decide(moment: Moment) -> str | None:
        memory, value = moment.memory, moment.values[metric]
        if moment.values["split"] != config.data.validation_split:
            return None
        best = memory.get("best")
        if math.isfinite(value) and (best is None or sign * (best - value) > min_delta):
            memory.update(best=value, best_step=moment.state.step, num_without=0)
            return None
        memory["num_without"] = memory.get("num_without", 0) + 1
        if memory["num_without"] < patience:
            return None
        found = f"the best is {best:.6g} at step {memory['best_step']}" if best is not None else "none was finite"
        return f"{metric} has not become better in {patience} evaluations; {found}"

    return {"on_evaluate": decide}


def sample_texts(
    config: TrainConfig,
    *,
    prompts: Annotated[list[str], pydantic.Field(min_length=1)],
    max_new_tokens: Positive = 64,
    temperature: Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)] = 0.0,
    seed: int = 0,
) -> dict[str, Callback]:
    """Continue `prompts` at each evaluation; step, prompt and text go to samples.ndjson, a line each.

    Each prompt has draws of its own, which are the same at each evaluation.
    """
    _require_validation(config, "sample_texts")
    shared: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    try:
        for prompt in prompts:
            GenerateConfig(checkpoint="x", prompt=prompt, **shared)
    except pydantic.ValidationError as error:
        what = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise UserError(config.problem("callbacks.sample_texts", what)) from None
    log: LineLog | None = None

    def begin(moment: Moment) -> None:
        nonlocal log
        if log is None:
            _require_room(moment, prompts, max_new_tokens)
            log = _lines_before(moment, SAMPLES, "step", moment.state.step)

    def sample(moment: Moment) -> None:
        if moment.values["split"] != config.data.validation_split:
            return
        from codex_accel import generation
        from codex_accel.prompts import encode_prompt

        begin(moment)
        assert log is not None
        moment.model.eval()  # the loop goes back to training mode
        wanted = [
            generation.Request(
                encode_prompt(moment.tokenizer, prompt), seed=seeds.derive(seed, "sample", number), **shared
            )
            for number, prompt in enumerate(prompts)
        ]
        made = generation.generate(moment.model, moment.tokenizer, wanted)
        for prompt, request, found in zip(prompts, wanted, made, strict=True):
            text = generation.shown(found, request, moment.tokenizer).text  # what only the prompt makes a secret, too
            log.write({"step": moment.state.step, "prompt": prompt, "text": text})
        log.sync()

    return {"on_step": begin, "on_evaluate": sample}


def history(config: TrainConfig) -> dict[str, Callback]:
    """A line an epoch in history.ndjson: its steps, time, mean loss, first and last learning rate.

    A step belongs to the epoch in which it begins. The mean is that of the lines of metrics.ndjson whose loss is
    finite, null without one. The time is training time with evaluations and saves; work that a kill undid does not
    count. The last epoch may be a part of one, which `steps` tells.
    """
    log: LineLog | None = None

    def write(moment: Moment, memory: dict[str, Any]) -> None:
        nonlocal log
        log = log or _lines_before(moment, HISTORY, "epoch", memory["epoch"])
        if not memory["steps"]:
            return
        lines = memory["num_losses"]
        log.write(
            {
                "epoch": memory["epoch"],
                "step": moment.state.step,
                "steps": memory["steps"],
                "time_s": moment.elapsed_s - memory["started_s"],
                "mean_loss": memory["loss_sum"] / lines if lines else None,
                "first_learning_rate": memory["first_learning_rate"],
                "last_learning_rate": memory["last_learning_rate"],
            }
        )
        log.sync()

    def note(moment: Moment) -> None:
        memory, step, rate = moment.memory, moment.state.step, moment.values["learning_rate"]
        epoch = _epoch_of(step, moment.steps_per_epoch)
        if memory.get("next_step") != step:  # the first step that this callback is told of
            memory.update(_new_epoch(epoch, started_s=moment.state.elapsed_s))
        if memory["steps"] == 0:
            memory["first_learning_rate"] = rate
        memory.update(next_step=step + 1, steps=memory["steps"] + 1, last_learning_rate=rate)
        loss = moment.values.get("loss", math.nan)
        if math.isfinite(loss):
            memory.update(loss_sum=memory["loss_sum"] + loss, num_losses=memory["num_losses"] + 1)
        if _epoch_of(step + 1, moment.steps_per_epoch) > epoch:
            write(moment, memory)
            memory.update(_new_epoch(epoch + 1, started_s=moment.elapsed_s))

    def end(moment: Moment) -> None:
        if moment.memory:
            write(moment, moment.memory)

    return {"on_step": note, "on_end": end}


def _epoch_of(step: int, steps_per_epoch: float) -> int:
    """The epoch, from 1, in which step number `step`, from 1, begins; quotients of floats may be an ulp too small."""
    return math.floor((step - 1) / steps_per_epoch + 1e-9) + 1


def _new_epoch(epoch: int, *, started_s: float) -> dict[str, Any]:
    return {"epoch": epoch, "started_s": started_s, "steps": 0, "loss_sum": 0.0, "num_losses": 0}


CALLBACKS: dict[str, Callable[..., dict[str, Callback]]] = {
    "early_stopping": early_stopping,
    "sample_texts": sample_texts,
    "history": history,
}


def _require_validation(config: TrainConfig, name: str) -> None:
    if config.data.validation_split is None:
        what = "needs data.validation_split, for nothing is evaluated. Name one, or take it out."
        raise UserError(config.problem(f"callbacks.{name}", what))


def _require_room(moment: Moment, prompts: list[str], max_new_tokens: int) -> None:
    """Raise UserError, at the first step and not at the first evaluation, if a prompt is empty or too long."""
    tokenizer, longest = moment.tokenizer, getattr(moment.model.config, "max_position_embeddings", None)
    for prompt in prompts:
        length = len(tokenizer.encode([prompt])[0]) + (tokenizer.bos_id is not None)
        if length == 0:
            what = "an empty prompt needs a BOS token, which the tokenizer has not. Give a text."
            raise UserError(moment.config.problem("callbacks.sample_texts.prompts", what))
        if longest is not None and length + max_new_tokens > longest:
            what = (
                f"{max_new_tokens} after the {length} tokens of {prompt!r} goes beyond the model's {longest} positions."
            )
            what += f" Take {max(0, longest - length)} at most."
            raise UserError(moment.config.problem("callbacks.sample_texts.max_new_tokens", what))


def _lines_before(moment: Moment, file_name: str, key: str, limit: int) -> LineLog:
    """A log in the run folder without the lines whose `key` is `limit` or more, which a killed run took back."""
    limit_bytes = moment.config.log.max_bytes
    log = LineLog(moment.run_dir / file_name, enabled=moment.is_main_process, max_bytes=limit_bytes)
    if log.enabled:
        kept = 0
        for line in events.read(log.path):
            try:
                later = json.loads(line.text)[key] >= limit
            except (ValueError, TypeError, LookupError, RecursionError) as error:
                raise UserError(f"{line.path}:{line.number}: is no line of this file. Delete the line.") from error
            if later:
                break
            kept += len(line.text) + 1
        log.cut_back(kept)
    return log
