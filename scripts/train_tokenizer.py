"""Train a tokenizer on raw files.

examples:
  python scripts/train_tokenizer.py --config configs/quickstart/train_tokenizer.yaml
  python scripts/train_tokenizer.py --config configs/shakespeare_char/train_tokenizer.yaml vocab_size=64

The folder that it writes loads with `AutoTokenizer.from_pretrained`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from codex_accel import cli, files, offline
from codex_accel.errors import UserError
from codex_accel.schema import TokenizerConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    config = cli.parse(TokenizerConfig, argv, doc=__doc__, stage="train_tokenizer")
    offline.enforce(allow_network=config.allow_network)

    # --- inputs, all checked before any work ---------------------------------------------------------------------
    from codex_accel import manifest, records, tokenizer

    final = Path(config.output_dir)
    files.require_free(final, overwrite=config.overwrite)
    raw_files = records.resolve(config.sources, config_problem=config.problem)
    parents = manifest.parents_of_sources(raw.path for raw in raw_files)
    sources: list[dict] = []

    # --- training: texts stream through, a bad record stops the run ------------------------------------------------
    def texts() -> Iterator[str]:
        for raw in raw_files:
            reader = records.Reader(raw, max_record_bytes=1 << 30)
            num_records = 0
            for record in reader:
                if isinstance(record, records.BadRecord):
                    raise UserError(f"{record.file}:{record.line}: {record.reason}. Mend it or leave the file out.")
                num_records += 1
                yield "".join(text for text, _ in record.parts)
            sources.append(
                {
                    "path": str(raw.path),
                    "format": raw.format,
                    "size": reader.num_bytes,
                    "sha256": reader.sha256,
                    "num_records": num_records,
                }
            )

    trained = tokenizer.train(config, texts())
    if not any(source["num_records"] for source in sources):
        raise UserError(config.problem("sources", "hold no record, only blank lines. Check the files."))

    # --- the folder -------------------------------------------------------------------------------------------------
    with files.staged_folder(final, overwrite=config.overwrite) as folder:
        tokenizer.save(trained, folder, config.special_tokens, has_unk=config.type == "char")
        num_bytes = sum(source["size"] for source in sources)
        digest = manifest.seal(
            folder,
            kind="tokenizer",
            final=final,
            payload=tokenizer.PAYLOAD,
            config=config,
            parents=parents,
            sources=sources,
            facts={"type": config.type, "vocab_size": trained.get_vocab_size(), "trained_on_bytes": num_bytes},
        )
    print(f"tokenizer  {final}  {trained.get_vocab_size()} ids from {num_bytes / 1e6:.1f} MB")
    print(f"manifest   {digest}")
    return 0


if __name__ == "__main__":
    cli.run(main)
