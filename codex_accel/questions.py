"""The samples of a task put to a model: text that it writes, or the likeliest of several continuations.

Rule: what goes into the model is what it met in training: BOS and the prompt, or what the chat template makes.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from codex_accel import batches as batches_
from codex_accel import generation, journal, metrics, prompts, seeds, tasks
from codex_accel.batches import Score, Work
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import EvaluateConfig, Task
from codex_accel.evaluation import Window
from codex_accel.tasks import Bad, Sample
from codex_accel.tokenizer import Tokenizer
from codex_accel.tokens import Document

Asked = Mapping[str, metrics.Metric]
NEAR_TIE = 1e-4  # nats between the two likeliest choices


@dataclass(frozen=True)
class Surroundings:
    """What the samples of a task meet: the tokenizer, and the room that the model has."""

    config: EvaluateConfig
    tokenizer: Tokenizer
    context_length: int  # tokens that go into the model


@dataclass(frozen=True)
class _Prompt:
    """A sample as it goes into the model."""

    sample: Sample
    ids: np.ndarray  # (L,)
    num_cut: int  # tokens left out at its beginning
    choices: list[np.ndarray]  # ids (L,) of each


def of_task(name: str, samples: list[Sample], bad: list[Bad], around: Surroundings, asked: Asked) -> Work:
    """What has to be done for a task. Raises UserError for samples without room, unless they are cut or skipped."""
    task = around.config.tasks[name]
    return (_choose if task.kind == "choice" else _write)(name, task, samples, bad, around, asked)


def turn_ends(task: Task, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end the assistant's words, if the task is a chat. Raises UserError if there is no chat template."""
    if not task.chat and task.file.messages is None:
        return ()
    return prompts.turn_end_ids(tokenizer, template_file=task.file.chat_template)


def _prompt_ids(task: Task, sample: Sample, around: Surroundings) -> np.ndarray:
    """Ids (L,): BOS where there is one and it is wanted, then the prompt; or what the chat template makes of messages.

    Raises: ValueError, with a reason without data, for messages that the template refuses.
    """
    tokenizer, add_bos = around.tokenizer, around.config.add_bos
    if sample.messages is not None:
        messages = [{"role": role, "content": content} for role, content in sample.messages]
        file = task.file.chat_template
        return np.array(prompts.encode_chat(tokenizer, messages, template_file=file, add_bos=add_bos))
    return np.array(prompts.encode_prompt(tokenizer, sample.prompt, add_bos=add_bos))


def _fit(
    name: str, task: Task, given: list[tuple[Sample, list[np.ndarray]]], room: int, bad: list[Bad], around: Surroundings
) -> tuple[list[_Prompt], list[Bad]]:
    """Samples as prompts of at most `room` tokens, less what their choices take, and all bad ones, by `on_long`.

    BOS stays where a prompt's beginning is cut off.
    """
    kept, new_bad, told = [], [], []
    for sample, choices in given:
        try:
            ids = _prompt_ids(task, sample, around)
        except ValueError as error:
            new_bad.append(Bad(sample.file, sample.line, str(error)))
            told.append(new_bad[-1])
            continue
        places = room - max(map(len, choices), default=0)
        num_cut = max(len(ids) - places, 0)
        reason, is_long = "", num_cut and (task.on_long != "truncate" or places < 2)
        if not len(ids):
            reason = "an empty prompt, and the tokenizer has no BOS to start from"
        elif not all(map(len, choices)):
            reason = "a choice without a token"
        elif is_long:
            reason = f"a prompt of {len(ids)} tokens, and the model has room for {max(places, 0)} before the answer"
        elif num_cut:
            begins = ids[0] == around.tokenizer.bos_id
            ids = np.concatenate([ids[:1], ids[num_cut + 1 :]]) if begins else ids[num_cut:]
        if not reason:
            kept.append(_Prompt(sample, ids, num_cut, choices))
            continue
        new_bad.append(Bad(sample.file, sample.line, reason))
        if not is_long or task.on_long != "skip":
            told.append(new_bad[-1])
    tasks.require_good(told, on_bad_sample=around.config.on_bad_sample)
    if not kept:
        raise UserError(around.config.problem(f"tasks.{name}.file", "gives no sample that can be scored."))
    return kept, bad + new_bad


# --- the model writes ----------------------------------------------------------------------------------------------


def _write(name: str, task: Task, samples: list[Sample], bad: list[Bad], around: Surroundings, asked: Asked) -> Work:
    """Text is generated for each sample and, without its secrets, held against its references."""
    config, sampling = around.config, task.sampling
    room = around.context_length - sampling.max_new_tokens
    fitted, bad = _fit(name, task, [(sample, []) for sample in samples], room, bad, around)
    ends = turn_ends(task, around.tokenizer)
    nth = _nth([prompt.sample.id for prompt in fitted])
    requests = [
        generation.Request(
            input_ids=tuple(prompt.ids.tolist()),
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            stop=tuple(sampling.stop),
            end_ids=ends,
            seed=seeds.derive(sampling.seed, prompt.sample.id, nth[n]),
        )
        for n, prompt in enumerate(fitted)
    ]
    batches = generation.plan_batches(requests, batch_tokens=config.batch_tokens, batch_size=config.batch_size)
    keys = tuple(journal.unit_key("text", name, [(fitted[n].sample.id, nth[n]) for n in batch]) for batch in batches)

    def run(model: Any, batch: Sequence[int]) -> list[Any]:
        found = generation.generate(model, around.tokenizer, [requests[n] for n in batch])
        return [
            _written(generation.shown(each, requests[n], around.tokenizer))
            for n, each in zip(batch, found, strict=True)
        ]

    def collect(results: list[list[Any]]) -> Score:
        made = batches_.in_order(batches, results)
        texts = [
            metrics.Text(each["text"], prompt.sample.references, prompt.sample.weight)
            for each, prompt in zip(made, fitted, strict=True)
        ]
        measured = metrics.measure(asked, texts, **config.bootstrap)
        lines = [
            {
                **tasks.line(name, prompt.sample),
                **tasks.output(each["text"]),
                "finish_reason": each["finish_reason"],
                "num_prompt_tokens": len(prompt.ids),
                "num_cut_tokens": prompt.num_cut,
                "num_output_tokens": each["num_tokens"],
                "num_near_ties": each["num_near_ties"],
                "num_findings": each["num_findings"],
                "scores": scores,
            }
            for prompt, each, scores in zip(fitted, made, measured.sample_scores, strict=True)
        ]
        counts = {
            **tasks.counts(lines, bad),
            "num_cut_prompts": sum(prompt.num_cut > 0 for prompt in fitted),
            "num_empty_outputs": sum(not each["text"].strip() for each in made),
            "num_ended_by_length": sum(each["finish_reason"] == "length" for each in made),
            "num_masked_outputs": sum(each["num_findings"] > 0 for each in made),
            "num_output_tokens": sum(each["num_tokens"] for each in made),
            "num_near_ties": sum(each["num_near_ties"] for each in made),
        }
        return Score(measured.values, measured.intervals, counts, measured.facts, lines + tasks.skipped(name, bad))

    def check(model: Any, results: list[list[Any]], number: int) -> dict[str, Any]:
        made = batches_.in_order(batches, results)
        chosen = tasks.spread(range(len(fitted)), number)
        again = {n: run(model, [n])[0] for n in chosen}
        differ = [n for n in chosen if any(again[n][key] != made[n][key] for key in ("ids", "text"))]
        without = sum(made[n]["num_near_ties"] == 0 for n in differ)
        return {"num_samples": len(chosen), "num_other_texts": len(differ), "num_other_without_near_tie": without}

    return Work(keys, lambda model, number: run(model, batches[number]), collect, check)


def _written(shown: generation.Shown) -> dict[str, Any]:
    """What the journal keeps of a text, as JSON: nothing that tells a secret."""
    return {**dataclasses.asdict(shown), "ids": None if shown.ids is None else list(shown.ids)}


def _nth(ids: list[str]) -> list[int]:
    """Which one of its equals each is, from 0, so that equal samples have draws and results of their own."""
    seen: collections.Counter[str] = collections.Counter()
    found = []
    for id_ in ids:
        found.append(seen[id_])
        seen[id_] += 1
    return found


# --- the model chooses ---------------------------------------------------------------------------------------------


def _choose(name: str, task: Task, samples: list[Sample], bad: list[Bad], around: Surroundings, asked: Asked) -> Work:
    """Each choice is scored as the continuation of its prompt."""
    config, tokenizer = around.config, around.tokenizer
    joint = "" if task.chat or task.file.messages is not None else tasks.delimiter(task)
    given = [(each, _continuations(tokenizer, each, joint)) for each in samples]
    fitted, bad = _fit(name, task, given, around.context_length + 1, bad, around)
    documents: list[Document] = []
    windows: list[Window] = []
    owners: list[int] = []
    for number, prompt in enumerate(fitted):
        for ids in prompt.choices:
            start, whole = len(prompt.ids), np.concatenate([prompt.ids, ids])
            windows.append(Window(len(documents), 0, len(whole) - 1, start))
            documents.append(Document(whole, ((start, len(whole)),), 0, prompt.sample.id))
            owners.append(number)
    batches, run = batches_.of_windows(documents, windows, config)
    named = [(f"{name}/{n}/{fitted[owner].sample.id}", windows[n]) for n, owner in enumerate(owners)]
    keys = tuple(batches_.window_key([named[n] for n in batch]) for batch in batches)

    def collect(results: list[list[Any]]) -> Score:
        found: list[list[float]] = [[] for _ in fitted]
        for owner, (nll, _, _) in zip(owners, batches_.in_order(batches, results), strict=True):
            found[owner].append(-nll)
        if not np.isfinite(np.concatenate(found)).all():
            what = "gives log-likelihoods that are no numbers. Look at the model's training."
            raise UserError(config.problem("checkpoint", what))
        choices = [
            metrics.Choice(tuple(values), prompt.sample.choices, prompt.sample.answer)
            for values, prompt in zip(found, fitted, strict=True)
        ]
        measured = metrics.measure(asked, choices, **config.bootstrap)
        lines = [
            {
                **tasks.line(name, prompt.sample),
                "choices": list(prompt.sample.choices),
                "loglikelihoods": values,
                "answer": prompt.sample.answer,
                "predicted": int(np.argmax(values)),
                "num_prompt_tokens": len(prompt.ids),
                "num_cut_tokens": prompt.num_cut,
                "scores": scores,
            }
            for prompt, values, scores in zip(fitted, found, measured.sample_scores, strict=True)
        ]
        counts = {
            **tasks.counts(lines, bad),
            "num_cut_prompts": sum(prompt.num_cut > 0 for prompt in fitted),
            "num_near_ties": sum(_is_tie(values) for values in found),
        }
        return Score(measured.values, measured.intervals, counts, measured.facts, lines + tasks.skipped(name, bad))

    def check(model: Any, results: list[list[Any]], number: int) -> dict[str, Any]:
        scored = batches_.in_order(batches, results)
        chosen = tasks.spread(range(len(windows)), number)
        largest = max((abs(run(model, [n])[0][0] - scored[n][0]) for n in chosen), default=0.0)
        return {"num_choices": len(chosen), "largest_loglikelihood_difference": largest}

    return Work(keys, lambda model, number: run(model, batches[number]), collect, check)


def _is_tie(values: list[float]) -> bool:
    """Whether the two likeliest are closer than rounding."""
    ordered = sorted(values)
    return len(ordered) > 1 and ordered[-1] - ordered[-2] < NEAR_TIE


def _continuations(tokenizer: Tokenizer, sample: Sample, joint: str) -> list[np.ndarray]:
    """Ids (L,) of each choice as what goes on after the prompt, as a completion does; `joint` begins each."""
    end = "" if sample.messages is not None else sample.prompt[-1:]  # of a tokenizer that strips it, all that matters
    texts = [text for choice in sample.choices for text in (end, joint + choice)]
    ids, counts = tokenizer.encode_batch(texts, continued=np.tile([False, True], len(sample.choices)))
    return np.split(ids.astype(np.int64), np.cumsum(counts)[:-1])[1::2]
