"""Score a model on held-out documents or on tasks, or score a file of predictions.

examples:
  python scripts/evaluate.py --checkpoint runs/quickstart/train/final --output-dir runs/quickstart/test
  python scripts/evaluate.py --checkpoint DIR file.path=book.txt file.unit=file --output-dir runs/book
  python scripts/evaluate.py --config configs/tasks/evaluate.yaml --checkpoint DIR --output-dir runs/tasks
  python scripts/evaluate.py predictions=answers.jsonl --output-dir runs/answers
  accelerate launch scripts/evaluate.py --checkpoint DIR --output-dir runs/test

The checkpoint may be any local `from_pretrained` folder, or an adapter, which is merged into its base first. A folder
without a manifest is hashed and named as unverified. Run it again after a kill: it goes on with the batches that are
left, on any number of processes, to the same report.
"""

import contextlib
import importlib.metadata
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from codex_accel import cli, files, offline, progress, redaction
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import EvaluateConfig

DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {  # metrics where none are named
    "generate": {"exact_match": {}},
    "choice": {"acc": {}, "acc_norm": {}},
    "predictions": {"exact_match": {}, "f1": {}, "rouge": {}, "bleu": {}, "chrf": {}, "distinct": {}},
}
VERSIONS = ("codex-accel", "torch", "transformers", "tokenizers", "sentencepiece", "jinja2", "peft")  # make the numbers


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    config = cli.parse(EvaluateConfig, argv, doc=__doc__, stage="evaluate")
    offline.enforce(allow_network=config.allow_network)
    final = Path(config.output_dir)
    if cli.is_main_process():
        files.require_free(final, overwrite=config.overwrite)
    if config.predictions is None:
        score_model(config, final)
    elif cli.is_main_process():
        score_predictions(config, final)
    return 0


def score_model(config: EvaluateConfig, final: Path) -> None:
    """Score a checkpoint on documents or tasks, going on where an earlier start stopped."""
    # --- inputs, all checked before the model loads ----------------------------------------------------------------
    from codex_accel import curves, manifest, metrics, records, sources, tasks

    folder = manifest.find_model(Path(config.checkpoint), verify=config.verify, key="checkpoint")
    named = {name: task.metrics or DEFAULTS[task.kind] for name, task in config.tasks.items()}

    def metrics_of(name: str) -> dict[str, metrics.Metric]:
        return metrics.load(config.tasks[name].kind, named[name], config=config, key=f"tasks.{name}.metrics")

    checks: dict[str, Any] = {
        "inputs": lambda: tasks.resolve(config),
        "metrics": lambda: tasks.of_each(config.tasks, metrics_of),
    }
    inputs, asked = tasks.of_each(checks, lambda which: checks[which]()).values()
    raw_files = list({raw.path: raw for each in inputs.values() for raw in (*each.raw, *each.shots)}.values())
    dataset_dir = None
    if config.file is not None:
        raw_files = sources.resolve([config.file], config_problem=config.problem, key="file")
    elif config.dataset is not None:
        dataset_dir = Path(config.dataset)
    elif not config.tasks:
        dataset_dir = manifest.parent_path(folder, kind="dataset", hint="Give dataset=DIR, file.path=FILE or tasks.")
    if dataset_dir is not None:
        manifest.require(dataset_dir, kinds=["dataset"], verify=config.verify, key="dataset")
    read_from = (folder, dataset_dir, *(raw.path for raw in raw_files))
    files.require_apart(final, [path for path in read_from if path is not None])
    of_run = curves.of_model(folder)
    read = tasks.of_each(inputs, lambda name: tasks.read(name, config.tasks[name], inputs[name]))
    tasks.require_good([each for _, bad in read.values() for each in bad], on_bad_sample=config.on_bad_sample)

    import torch
    from accelerate import Accelerator

    from codex_accel import bases, batches, evaluation, generation, journal, processes, questions, run, run_folder
    from codex_accel import documents as documents_
    from codex_accel import model as models
    from codex_accel import tokenizer as tokenizers
    from codex_accel.tokens import TokenStore

    # --- model, documents and samples ------------------------------------------------------------------------------
    use_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=use_cpu, mixed_precision="no")
    processes.require_engine(accelerator)
    if config.device == "cuda" and accelerator.device.type != "cuda":
        raise UserError(config.problem("device", "cuda: no CUDA device is to be had here. Use device=cpu."))
    tokenizer_dir = bases.tokenizer_beside(folder)
    tokenizer = tokenizers.load(tokenizer_dir, key="checkpoint")
    tasks.of_each(config.tasks, lambda name: questions.turn_ends(config.tasks[name], tokenizer))
    model = models.load(folder, verify=config.verify).to(accelerator.device).eval()
    longest = getattr(model.config, "max_position_embeddings", None)
    context_length = config.context_length or longest or 1024
    if longest is not None and context_length > longest:
        what = f"{context_length} is more than the model's max_position_embeddings = {longest}."
        raise UserError(config.problem("context_length", what))
    settings: dict[str, Any] = {"context_length": context_length, "dtype": "float32", "safety": redaction.facts()}
    work: dict[str, batches.Work] = {}
    documents: Any = []
    counts = {}
    if config.tasks:
        around = questions.Surroundings(config, tokenizer, context_length)
        work = tasks.of_each(read, lambda name: questions.of_task(name, *read[name], around, asked[name]))
        settings["tasks"] = {n: tasks.settings(task, metrics=named[n]) for n, task in config.tasks.items()}
        settings["add_bos"] = config.add_bos
        generates = any(task.kind == "generate" for task in config.tasks.values())
        if generates and accelerator.is_main_process and (why := generation.why_alone(model)):
            print(f"note     generates one text at a time: {why}")
    else:
        if dataset_dir is not None:
            run.require_same_tokenizer(tokenizer_dir, dataset_dir, key="dataset")
            documents = TokenStore(dataset_dir, config.split)
            lengths = documents.lengths
        else:
            options = {"add_bos": config.add_bos, "add_eos": config.add_eos}
            documents = list(documents_.from_files(raw_files, tokenizer, **options))
            lengths = [len(document.input_ids) for document in documents]
        windows = evaluation.plan_windows(lengths, context_length=context_length, stride=config.stride)
        chosen = evaluation.choose(windows, config.max_windows)
        if not chosen:
            raise UserError(config.problem("file" if raw_files else "split", "no document has two tokens to score."))
        num_bytes = evaluation.total_bytes(documents) if len(chosen) == len(windows) else None
        work[""] = batches.of_documents(documents, chosen, config, num_bytes=num_bytes)
        counts["num_windows"] = len(windows)
        counts["num_unknown_tokens"] = sum(int((d.input_ids == tokenizer.unk_id).sum()) for d in documents)
        stride = evaluation.stride_of(context_length, config.stride)
        settings |= {"split": None if raw_files else config.split, "stride": stride, "max_windows": config.max_windows}
        if config.file is not None:
            read_as = config.file.model_dump(mode="json", exclude={"path", "chat_template"})
            settings |= {"file": read_as, "add_bos": config.add_bos, "add_eos": config.add_eos}

    # --- what decides the numbers ----------------------------------------------------------------------------------
    parents = [manifest.as_parent(path) for path in (folder, dataset_dir) if path is not None]
    below = {path: manifest.as_parent(path) for path in bases.chain(folder, verify=False, key="checkpoint")[1:]}
    unnamed = [below[path] for path in bases.unnamed_bases(folder)]
    described = [records.describe(raw) for raw in raw_files]
    digests = {parent["kind"]: parent["content_digest"] for parent in parents}
    digests["tokenizer"] = tokenizers.digest(tokenizer_dir)
    digests |= tasks.template_digests(config, tokenizer.chat_template)
    digests |= tasks.file_digests(inputs, {Path(each["path"]): each["sha256"] for each in described})
    if config.file is not None:
        digests["file"] = tasks.digest_of([each["sha256"] for each in described])
    identity = {
        "settings": tasks.without_metrics(settings),  # which are computed when all is scored
        "digests": digests,
        "bases": [each["content_digest"] for each in below.values()],
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        "device": accelerator.device.type,
        "packed": config.packed,
    }

    # --- scores, batch by batch ------------------------------------------------------------------------------------
    place = journal.path_of(final, identity)
    journal.make(place)
    with run_folder.held(place) if accelerator.is_main_process else contextlib.nullcontext():
        book = journal.Journal(place, process_index=accelerator.process_index)
        accelerator.wait_for_everyone()  # all have read what was done before the first of them adds to it
        todo = {key: (each, number) for each in work.values() for number, key in enumerate(each.keys)}
        left = book.left(tuple(todo), process_index=accelerator.process_index, num_processes=accelerator.num_processes)
        num_before = sum(key in book.done for key in todo)
        if accelerator.is_main_process:
            tell(book, num_before, len(todo), journal.others(final, place))
        started = time.monotonic()
        with progress.bar("evaluate", total=len(left), unit="batches") as show:
            for done, key in enumerate(left):
                show(done, "")
                each, number = todo[key]
                book.add(key, each.run(model, number))
            show(len(left), "")
        accelerator.wait_for_everyone()
        seconds = time.monotonic() - started
        if accelerator.is_main_process:
            results = journal.read(place)
            by_work = {name: [results[key] for key in each.keys] for name, each in work.items()}
            scores = {name: each.collect(by_work[name]) for name, each in work.items()}
            if config.tasks:
                parts = ("metrics", "intervals", "counts", "facts")
                document = {key: {name: getattr(score, key) for name, score in scores.items()} for key in parts}
            else:
                document = of_losses(scores[""], config, raw_files=bool(raw_files))
                document["counts"] |= counts
                if config.compression:
                    document["metrics"]["compression"] = compression(config, documents, tokenizer, scores[""].metrics)
            document |= {"settings": settings, "digests": digests}
            if config.self_check:
                checked = {name: each.check(model, by_work[name], config.self_check) for name, each in work.items()}
                document["self_check"] = checked if config.tasks else checked[""]
            speed = {"evaluation_s": seconds, "num_batches_before": num_before}
            if not config.tasks and not num_before:
                speed["tokens_per_s"] = document["metrics"]["num_target_tokens"] / seconds
            write(
                final,
                config,
                document,
                [line for score in scores.values() for line in score.samples],
                parents=parents + unnamed + manifest.parents_of_sources(raw.path for raw in raw_files),
                sources=described,
                speed=speed,
                of_run=of_run,
            )
            files.remove_folder(place)
    processes.end(accelerator)


def tell(book: Any, num_before: int, num_batches: int, others: Sequence[Path]) -> None:
    """What an earlier start has left."""
    if book.num_damaged:
        print(f"note     {book.num_damaged} damaged lines in {book.folder}: their batches are scored again")
    if num_before:
        print(f"go on    {num_before} of {num_batches} batches were scored before")
    for path in others:
        print(f"note     {path} is of an unfinished evaluation with other settings; remove it if it is not wanted")


def of_losses(score: Any, config: EvaluateConfig, *, raw_files: bool) -> dict[str, Any]:
    """The report of documents. Raises UserError if their loss is no number."""
    values = score.metrics
    if not values["num_target_tokens"]:
        raise UserError(config.problem("file" if raw_files else "split", "holds no target token, so there is no loss."))
    if not math.isfinite(values["perplexity"]):
        what = f"the loss is {values['loss']} nats a token, which is no result. Look at the model's training."
        raise UserError(config.problem("checkpoint", what))
    return {"metrics": values, "intervals": score.intervals, "counts": score.counts, "facts": score.facts}


def compression(config: EvaluateConfig, documents: Any, tokenizer: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """What general compressors need for the same text. Raises UserError if they would see other bytes."""
    from codex_accel.compression import compressed_bits_per_byte

    texts = [tokenizer.decode(document.input_ids) for document in documents]
    num_bytes = sum(len(text.encode()) for text in texts)
    if num_bytes != values["num_bytes"]:
        what = (
            f"the decoded documents have {num_bytes:,} bytes, the scored text {values['num_bytes']:,}: with "
            "prompts, or a tokenizer that changes the text, the compressors would see other bytes. "
            "Say compression=false."
        )
        raise UserError(config.problem("compression", what))
    return compressed_bits_per_byte(texts)


def score_predictions(config: EvaluateConfig, final: Path) -> None:
    """Score a file of predictions, without a model."""
    from codex_accel import metrics, predictions, records, tasks

    named = config.metrics or DEFAULTS["predictions"]
    asked = metrics.load("generate", named, config=config, key="metrics")
    raw = predictions.file_of(config)
    files.require_apart(final, [raw.path])
    samples, bad = predictions.read(raw)
    tasks.require_good(bad, on_bad_sample=config.on_bad_sample)
    document, lines = predictions.score(samples, bad, asked, config)
    described = records.describe(raw)
    settings = {"metrics": named, "safety": redaction.facts()}
    document |= {"settings": settings, "digests": {"predictions": described["sha256"]}}
    write(final, config, document, lines, parents=[], sources=[described], speed={}, of_run=None)


def bounds(intervals: Mapping[str, Any]) -> dict[str, dict[str, float] | None]:
    """Intervals by name, as the report has them."""
    return {
        name: None if pair is None else dict(zip(("low", "high"), pair, strict=True))
        for name, pair in intervals.items()
    }


def write(
    final: Path,
    config: EvaluateConfig,
    document: dict[str, Any],
    samples: list[dict[str, Any]],
    *,
    parents: list[dict[str, Any]],
    sources: list[dict[str, Any]],
    speed: dict[str, Any],
    of_run: Any,
) -> None:
    """Write the report folder and print the numbers."""
    from codex_accel import manifest, report

    document["settings"]["bootstrap"] = config.bootstrap
    found = document["intervals"]
    document["intervals"] = {name: bounds(each) for name, each in found.items()} if config.tasks else bounds(found)
    with files.staged_folder(final, overwrite=config.overwrite) as staged:
        report.write(staged, report=document, samples=samples, curves=of_run)
        digest = manifest.seal(
            staged,
            kind="evaluation",
            final=final,
            payload=report.PAYLOAD,
            config=config,
            parents=parents,
            sources=sources,
            facts={"metrics": document["metrics"], **speed},
        )
    for task, name, value, low, high in report.rows(document):
        unknown = "not known, a part was scored" if name == "bits_per_byte" else "not known"
        shown = unknown if value is None else f"{value:.6g}"
        interval = "" if low is None else f"  [{low:.6g}, {high:.6g}]"
        print(f"{f'{task} {name}'.strip():<32} {shown}{interval}")
    print(f"report   {final}\nmanifest {digest}")


if __name__ == "__main__":
    cli.run(main)
