"""Score a model on held-out documents: loss, perplexity, bits per byte, token accuracy.

examples:
  python scripts/evaluate.py --checkpoint runs/quickstart/train/final --output-dir runs/quickstart/test
  python scripts/evaluate.py --checkpoint DIR file.path=book.txt file.unit=file --output-dir runs/book
  accelerate launch scripts/evaluate.py --checkpoint DIR --output-dir runs/test

The checkpoint may be any local `from_pretrained` folder, or an adapter, which is merged into its base first. A folder
without a manifest is hashed and named as unverified.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from codex_accel import cli, files, offline, progress
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import EvaluateConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    config = cli.parse(EvaluateConfig, argv, doc=__doc__, stage="evaluate")
    offline.enforce(allow_network=config.allow_network)

    # --- inputs, all checked before the model loads ----------------------------------------------------------------
    from codex_accel import manifest, records, sources

    final = Path(config.output_dir)
    if cli.is_main_process():
        files.require_free(final, overwrite=config.overwrite)
    folder = manifest.find_model(Path(config.checkpoint), verify=config.verify, key="checkpoint")
    raw_files, dataset_dir = [], None
    if config.file is not None:
        raw_files = sources.resolve([config.file], config_problem=config.problem, key="file")
    elif config.dataset is not None:
        dataset_dir = Path(config.dataset)
    else:
        dataset_dir = manifest.parent_path(folder, kind="dataset", hint="Give dataset=DIR or file.path=FILE.")
    if dataset_dir is not None:
        manifest.require(dataset_dir, kinds=["dataset"], verify=config.verify, key="dataset")
    files.require_apart(final, [path for path in (folder, dataset_dir) if path is not None])

    import torch
    from accelerate import Accelerator

    from codex_accel import bases, evaluation, metrics, processes, report, run
    from codex_accel import documents as documents_
    from codex_accel import model as models
    from codex_accel import tokenizer as tokenizers
    from codex_accel.tokens import TokenStore

    # --- documents and model ---------------------------------------------------------------------------------------
    use_cpu = config.device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=use_cpu, mixed_precision="no")
    processes.require_engine(accelerator)
    if config.device == "cuda" and accelerator.device.type != "cuda":
        raise UserError(config.problem("device", "cuda: no CUDA device is to be had here. Use device=cpu."))
    tokenizer_dir = bases.tokenizer_beside(folder)
    tokenizer = tokenizers.load(tokenizer_dir, key="checkpoint")
    if dataset_dir is not None:
        run.require_same_tokenizer(tokenizer_dir, dataset_dir, key="dataset")
        documents = TokenStore(dataset_dir, config.split)
        lengths = documents.lengths
    else:
        options = {"add_bos": config.add_bos, "add_eos": config.add_eos}
        documents = list(documents_.from_files(raw_files, tokenizer, **options))
        lengths = [len(document.input_ids) for document in documents]
    model = models.load(folder, verify=config.verify).to(accelerator.device)
    longest = getattr(model.config, "max_position_embeddings", None)
    context_length = config.context_length or longest or 1024
    if longest is not None and context_length > longest:
        what = f"{context_length} is more than the model's max_position_embeddings = {longest}."
        raise UserError(config.problem("context_length", what))
    windows = evaluation.plan_windows(lengths, context_length=context_length, stride=config.stride)
    chosen = evaluation.choose(windows, config.max_windows)
    if not chosen:
        raise UserError(config.problem("file" if raw_files else "split", "no document has two tokens to score."))

    # --- scores, summed over processes -----------------------------------------------------------------------------
    started = time.monotonic()
    with progress.bar("evaluate", total=-(-len(chosen) // config.batch_size), unit="batches") as show:
        scores = evaluation.score(
            model,
            documents,
            chosen,
            batch_size=config.batch_size,
            device=accelerator.device,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            between_batches=lambda done, total: show(done * accelerator.num_processes, ""),
        )
    scores = processes.sum_over_processes(accelerator, scores)
    seconds = time.monotonic() - started
    if not scores.num_targets.sum():
        raise UserError(config.problem("file" if raw_files else "split", "holds no target token, so there is no loss."))

    # --- the report ------------------------------------------------------------------------------------------------
    if accelerator.is_main_process:
        whole = len(chosen) == len(windows)
        values = evaluation.summarize(scores, num_bytes=evaluation.total_bytes(documents) if whole else None)
        if not math.isfinite(values["perplexity"]):
            what = f"the loss is {values['loss']} nats a token, which is no result. Look at the model's training."
            raise UserError(config.problem("checkpoint", what))
        if config.compression:
            texts = [tokenizer.decode(document.input_ids) for document in documents]
            num_bytes = sum(len(text.encode()) for text in texts)
            if num_bytes != values["num_bytes"]:
                what = (
                    f"the decoded documents have {num_bytes:,} bytes, the scored text {values['num_bytes']:,}: with "
                    "prompts, or a tokenizer that changes the text, the compressors would see other bytes. "
                    "Say compression=false."
                )
                raise UserError(config.problem("compression", what))
            values["compression"] = metrics.compressed_bits_per_byte(texts)
        parents = [manifest.as_parent(path) for path in (folder, dataset_dir) if path is not None]
        unnamed = [manifest.as_parent(path) for path in bases.unnamed_bases(folder)]
        document = {
            "metrics": values,
            "counts": {
                "num_documents": len(lengths),
                "num_windows": len(windows),
                "num_windows_scored": len(chosen),
                "num_unknown_tokens": sum(int((d.input_ids == tokenizer.unk_id).sum()) for d in documents),
            },
            "settings": {
                "split": None if raw_files else config.split,
                "context_length": context_length,
                "stride": evaluation.stride_of(context_length, config.stride),
                "dtype": "float32",
            },
            "digests": {parent["kind"]: parent["content_digest"] for parent in parents}
            | {"tokenizer": tokenizers.digest(tokenizer_dir)},
        }
        with files.staged_folder(final, overwrite=config.overwrite) as staged:
            report.write(staged, report=document, samples=_samples(documents, scores))
            speed = {"evaluation_s": seconds, "tokens_per_s": values["num_target_tokens"] / seconds}
            digest = manifest.seal(
                staged,
                kind="evaluation",
                final=final,
                payload=report.PAYLOAD,
                config=config,
                parents=parents + unnamed + manifest.parents_of_sources(raw.path for raw in raw_files),
                sources=[records.describe(raw) for raw in raw_files],
                facts={"metrics": values, **speed},
            )
        for name, value in report.flatten(values):
            print(f"{name:<32} {'not known, a part was scored' if value is None else f'{value:.6g}'}")
        print(f"report   {final}\nmanifest {digest}")
    processes.end(accelerator)
    return 0


def _samples(documents, scores):
    """One record a document, in order; documents without a scored target say so by their count."""
    for document, nll, targets, correct in zip(
        documents, scores.nll, scores.num_targets, scores.num_correct, strict=True
    ):
        loss = float(nll / targets) if targets else None
        yield {
            "record_id": document.record_id,
            "num_tokens": len(document.input_ids),
            "num_target_tokens": int(targets),
            "num_bytes": document.num_bytes,
            "nll": float(nll),
            "loss": loss,
            "perplexity": math.exp(loss) if loss is not None and loss < 700 else None,
            "num_correct": int(correct),
        }


if __name__ == "__main__":
    cli.run(main)
