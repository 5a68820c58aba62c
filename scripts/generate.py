"""Continue prompts with a trained model: one as it comes, or a file of them in batches.

examples:
  python scripts/generate.py --checkpoint runs/quickstart/train/final --prompt "def main("
  python scripts/generate.py --checkpoint DIR --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 1
  python scripts/generate.py --checkpoint DIR --prompts questions.jsonl --chat --output answers.jsonl
  ... | python scripts/generate.py --checkpoint DIR --prompts -

The prompt and its continuation go to standard output, and nothing else does; of prompts, a line of JSON for each.
Secrets are masked in both.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from codex_accel import cli, offline, redaction
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import GenerateConfig
from codex_accel.visible import escaped

AHEAD = 8  # batches' worth of prompts among which like lengths are looked for; answers wait for no more than that


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    config = cli.parse(GenerateConfig, argv, doc=__doc__, stage="generate")
    offline.enforce(allow_network=config.allow_network)
    from codex_accel import manifest, progress, prompts, seeds

    # --- prompts ---------------------------------------------------------------------------------------------------
    folder = manifest.find_model(Path(config.checkpoint), verify=config.verify, key="checkpoint")
    typed = config.prompts == "-" and sys.stdin.isatty()
    if config.prompts is None:
        given = [prompts.Prompt("", config.prompt)]
    elif typed:
        given = []
    elif config.prompts == "-":
        given = prompts.read_stdin(sys.stdin.buffer, plain=config.plain)
    else:
        given = prompts.read(config.prompts, plain=config.plain, config=config)

    from codex_accel import bases
    from codex_accel import tokenizer as tokenizers

    tokenizer = tokenizers.load(bases.tokenizer_beside(folder), key="checkpoint")
    encoded = _encode(config, tokenizer, given)
    _require_output(config, given, typed=typed)

    # --- model -----------------------------------------------------------------------------------------------------
    import torch

    from codex_accel import generation, report, text_stream
    from codex_accel import model as models

    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise UserError(config.problem("device", "cuda: no CUDA device is to be had here. Use device=cpu."))
    device = "cuda" if cuda and config.device != "cpu" else "cpu"
    model = models.load(folder, verify=config.verify).to(device).eval()
    uses_chat = config.chat or any(prompt.messages is not None for prompt in given)
    ends = prompts.turn_end_ids(tokenizer, template_file=config.chat_template) if uses_chat else ()

    def request(number: int, ids: tuple[int, ...]) -> Any:
        return generation.Request(
            input_ids=ids,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=seeds.derive(config.seed, "prompt", number),
            stop=tuple(config.stop),
            end_ids=ends,
        )

    def lack_of_room(ids: tuple[int, ...]) -> str:
        return generation.lack_of_room(model, len(ids), config.max_new_tokens)

    def answer(number: int, text: str, ids: tuple[int, ...]) -> None:
        """To standard output, token by token, without secrets."""
        shown = text_stream.MaskedStream(redaction.policy(), tokenizer.decode(ids))
        _show("" if config.chat or typed else redaction.text(text))

        def take(_: int, piece: str) -> bool:
            _show(shown.feed(piece))
            return shown.blocked is None

        try:
            generation.generate(model, tokenizer, [request(number, ids)], on_text=take)
        finally:  # Ctrl-C too leaves a whole line
            _show(f"{shown.finish()}\n")
        _tell(shown.num_findings, shown.blocked)

    # --- one prompt, or those of a terminal ------------------------------------------------------------------------
    if config.prompts is None:
        if lack := lack_of_room(encoded[0]):
            raise UserError(config.problem("max_new_tokens", lack))
        answer(0, config.prompt, encoded[0])
        return 0
    if typed:
        for number, prompt in enumerate(_typed(prompts)):
            try:
                [ids] = _encode(config, tokenizer, [prompt])
                if lack := lack_of_room(ids):
                    raise UserError(f"{prompt.place}: max_new_tokens: {lack}")
                answer(number, prompt.text or "", ids)
            except UserError as error:
                print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr)
        return 0

    # --- many, in batches ------------------------------------------------------------------------------------------
    lacks = [(prompt, lack_of_room(ids)) for prompt, ids in zip(given, encoded, strict=True)]
    prompts.require_none([f"{prompt.place}: max_new_tokens: {lack}" for prompt, lack in lacks if lack])
    if why := generation.why_alone(model):
        print(f"note: one prompt at a time, because {why}", file=sys.stderr)
    requests = [request(number, ids) for number, ids in enumerate(encoded)]
    found: dict[int, Any] = {}
    num_written = num_findings = 0
    with _lines_to(config.output) as out, progress.bar("generate", total=len(given), unit="prompts") as show:
        for batch in _in_order(requests, config.batch_tokens):
            found.update(zip(batch, generation.generate(model, tokenizer, [requests[n] for n in batch]), strict=True))
            while num_written in found:
                shown = generation.shown(found.pop(num_written), requests[num_written], tokenizer)
                out.write(report.ndjson_line(_line(given[num_written], encoded[num_written], shown)))
                num_written += 1
                num_findings += shown.num_findings
            out.flush()
            show(num_written + len(found), "")
    _tell(num_findings)
    return 0


def _encode(config: GenerateConfig, tokenizer: Any, given: Sequence[Any]) -> list[tuple[int, ...]]:
    """Ids of each prompt. Raises: UserError with all prompts that have none."""
    from codex_accel import prompts

    encoded: list[tuple[int, ...]] = []
    problems = []
    for prompt in given:
        try:
            messages = prompt.messages
            if messages is None and config.chat:
                messages = ({"role": "user", "content": prompt.text},)
            if messages is None:
                ids = prompts.encode_prompt(tokenizer, prompt.text, add_bos=config.add_bos)
            else:
                if config.system is not None and messages[0]["role"] != "system":
                    messages = ({"role": "system", "content": config.system}, *messages)
                options = {"template_file": config.chat_template, "add_bos": config.add_bos}
                ids = prompts.encode_chat(tokenizer, messages, **options)
            if not ids:
                raise ValueError("is empty and there is no BOS token before it. Give a prompt")
            encoded.append(ids)
        except ValueError as error:
            problems.append(f"{prompt.place}: {error}." if prompt.place else config.problem("prompt", f"{error}."))
    if problems and not given[0].place:
        raise UserError(*problems)
    prompts.require_none(problems)
    return encoded


def _typed(prompts: Any) -> Iterator[Any]:
    """Lines of a terminal, each a prompt."""
    number = 0
    while True:
        if sys.stdout.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        if not line:
            return
        number += 1
        text = line.decode(errors="replace").rstrip("\r\n")
        if text.strip():
            yield prompts.Prompt(f"{prompts.STDIN}:{number}", text)


def _in_order(requests: Sequence[Any], batch_tokens: int) -> Iterator[list[int]]:
    """Batches of stretches of `requests`, so that an answer is not far behind those before it."""
    from codex_accel import generation

    start, size = 0, 0
    for stop in range(1, len(requests) + 1):
        size += len(requests[stop - 1].input_ids) + requests[stop - 1].max_new_tokens
        if size >= AHEAD * batch_tokens or stop == len(requests):
            for batch in generation.plan_batches(requests[start:stop], batch_tokens=batch_tokens):
                yield [start + index for index in batch]
            start, size = stop, 0


def _line(prompt: Any, ids: tuple[int, ...], found: Any) -> dict[str, Any]:
    """The answer to a prompt."""
    return {
        **redaction.value(prompt.given),
        "text": found.text,
        "finish_reason": found.finish_reason,
        "num_prompt_tokens": len(ids),
        "num_output_tokens": found.num_tokens,
        "num_near_ties": found.num_near_ties,
        "num_findings": found.num_findings,
    }


def _tell(num_findings: int, blocked: str | None = None) -> None:
    """What was masked, to standard error."""
    if blocked:
        print(f"note: the text ends where the rule '{blocked}' forbids more", file=sys.stderr)
    elif num_findings:
        print(f"note: {num_findings} secret{'s' * (num_findings > 1)} masked in what the model wrote", file=sys.stderr)


def _require_output(config: GenerateConfig, given: Sequence[Any], *, typed: bool) -> None:
    """Raise UserError, before the model is loaded, if the file of answers cannot be written, or holds the prompts.

    What is there stays as it is: whatever else is wrong is told before the file is made or emptied.
    """
    if config.output is None:
        return
    path = Path(config.output)
    if typed:
        raise UserError(config.problem("output", "prompts are typed, and answers come beside them. Remove it."))
    if path.exists() and not config.overwrite:
        raise UserError(config.problem("output", f"'{path}' exists. Name another file, or say overwrite=true."))
    read = {prompt.place.rpartition(":")[0] for prompt in given} if config.prompts != "-" else set()
    if path.exists() and any(path.samefile(name) for name in read):
        raise UserError(config.problem("output", f"'{path}' holds the prompts. Name another file."))
    try:
        if not path.exists():
            path.touch()
            path.unlink()
        elif path.is_file():
            path.open("ab").close()
        elif path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as error:
        raise UserError(config.problem("output", f"'{path}': {error.strerror}. Name another file.")) from error


def _lines_to(output: str | None) -> contextlib.AbstractContextManager[IO[str]]:
    return contextlib.nullcontext(sys.stdout) if output is None else open(output, "w", encoding="utf-8")


def _show(text: str) -> None:
    """To standard output at once; what would command a terminal is shown as an escape."""
    print(escaped(text, kept="\n\t") if sys.stdout.isatty() else text, end="", flush=True)


if __name__ == "__main__":
    cli.run(main)
