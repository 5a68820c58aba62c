"""Turn raw files into a tokenized dataset with splits.

examples:
  python scripts/prepare_data.py --config configs/quickstart/prepare_data.yaml
  python scripts/prepare_data.py --config my.yaml split.method=exact split.seed=1

Nothing is dropped in silence: what cannot be used stands in `quarantine.jsonl` with file, line and reason.
"""

from collections.abc import Sequence
from pathlib import Path

from codex_accel import cli, files, offline
from codex_accel.schema import PrepareConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    config = cli.parse(PrepareConfig, argv, doc=__doc__, stage="prepare_data")
    offline.enforce(allow_network=config.allow_network)

    # --- inputs, all checked before any work -----------------------------------------------------------------------
    from codex_accel import dataset, manifest, records, tokenizer

    final = Path(config.output_dir)
    files.require_free(final, overwrite=config.overwrite)
    raw_files = records.resolve(config.sources, config_problem=config.problem)
    parents = manifest.parents_of_sources(raw.path for raw in raw_files)
    dataset.require_splits(config, raw_files)
    tokenizer_folder = Path(config.tokenizer)
    if (tokenizer_folder / manifest.MANIFEST).exists():
        kinds = ("tokenizer", "model", "checkpoint")
        manifest.require(tokenizer_folder, kinds=kinds, verify=config.verify, key="tokenizer")
    loaded = tokenizer.load(tokenizer_folder)

    if config.dry_run:
        for raw in raw_files:
            print(f"{raw.path.stat().st_size:>15,} bytes  {raw.format:<6} {raw.path}")
        print(f"{len(raw_files)} files, {loaded.vocab_size} ids, split by {config.split.method}; nothing was written")
        return 0

    # --- splits: exact and position need to see every record first ---------------------------------------------------
    assign = dataset.plan_splits(config, raw_files)

    # --- read, check, tokenize, write --------------------------------------------------------------------------------
    with files.staged_folder(final, overwrite=config.overwrite) as folder:
        result = dataset.write(config, raw_files, loaded, assign, folder)

        # --- what the numbers must satisfy ---------------------------------------------------------------------------
        dataset.check(config, result)
        digest = manifest.seal(
            folder,
            kind="dataset",
            final=final,
            payload=[path.name for path in folder.glob("*.arrow")],
            config=config,
            parents=[manifest.as_parent(tokenizer_folder), *parents],
            sources=result.sources,
            facts=result.facts,
        )

    # --- what came out -----------------------------------------------------------------------------------------------
    for name, split in result.facts["splits"].items():
        print(
            f"{name:<12} {split['num_records']:>9,} records  {split['num_tokens']:>12,} tokens  "
            f"{split['bytes_per_token']:.2f} bytes a token  {split['num_duplicates']} duplicates  "
            f"{split['num_shared']} also in another split"
        )
    if result.facts["num_bad"]:
        print(f"quarantine   {result.facts['num_bad']:>9,} records in {final / dataset.QUARANTINE}, by reason:")
        for reason, count in result.facts["bad_by_reason"].items():
            print(f"{count:>22,} x {reason}")
    print(f"dataset  {final}\nmanifest {digest}")
    return 0


if __name__ == "__main__":
    cli.run(main)
