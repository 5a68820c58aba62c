"""Train a tokenizer on raw files, or add special tokens to one.

examples:
  python scripts/train_tokenizer.py --config configs/quickstart/train_tokenizer.yaml
  python scripts/train_tokenizer.py --config configs/shakespeare_char/train_tokenizer.yaml vocab_size=64
  python scripts/train_tokenizer.py --config my.yaml type=sentencepiece algorithm=bpe --dry-run
  python scripts/train_tokenizer.py base=models/gpt2 special_tokens.additional='[<|im_end|>]' output_dir=runs/chat

The folder that it writes loads with `AutoTokenizer.from_pretrained`. With the same input and settings it is not trained
again.
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

    # --- inputs, all checked and hashed before any work --------------------------------------------------------------
    from codex_accel import added_tokens, manifest, progress, records, screening, sources, tokenizer, vocabulary

    final = Path(config.output_dir)
    files.require_free(final, overwrite=True)
    raw_files = sources.resolve(config.sources, config_problem=config.problem)
    base = added_tokens.base_of(config)
    template = vocabulary.chat_template(config)
    parents = manifest.parents_of_sources(raw.path for raw in raw_files)
    if base is not None:
        parents = [manifest.as_parent(base.folder)]
        files.require_apart(final, [base.folder])
    inventory = [sources.inventory(raw, unit_bytes=1 << 62) for raw in raw_files]
    num_bytes = sum(facts.size for facts in inventory)
    input_digest = vocabulary.input_digest(config, inventory)

    # --- what stands there: the same, or another ---------------------------------------------------------------------
    known = manifest.read(final) if (final / manifest.MANIFEST).exists() else None
    damage = manifest.problems_of(final) if known and config.verify else []
    if known is not None and known["facts"].get("input_digest") == input_digest and not damage:
        print(f"nothing to do: {final} was trained on this input with these settings")
        print(f"manifest   {files.sha256_file(final / manifest.MANIFEST)}")
        return 0
    why = f"holds a {known['kind']}." if known is not None and known["kind"] != "tokenizer" else " ".join(damage)
    if known is not None and not why:
        why = f"was trained on other input or settings: {'; '.join(vocabulary.changes(known, config, inventory))}."
    if config.dry_run:
        if base is not None:
            print(f"{base.folder}: {base.vocab_size} ids, {len(config.special_tokens.additional)} to add")
        for facts in inventory:
            print(f"{facts.size:>15,} bytes  {facts.raw.format:<7}  sha256 {facts.sha256[:12]}  {facts.raw.path}")
        if base is None:
            print(f"{len(inventory)} files, {num_bytes:,} bytes, type {config.type}, {config.vocab_size} ids at most")
        print(f"{final} {why or 'does not exist yet.'} Nothing was written.")
        return 0
    if known is not None and not config.overwrite:
        what = "Choose another folder, or say overwrite=true to train again and replace it."
        raise UserError(f"output_dir = '{final}': {why} {what}")
    files.require_free(final, overwrite=config.overwrite)

    # --- training: texts stream through without their secrets, a bad record stops the run ----------------------------
    num_records = [0] * len(inventory)
    found = []  # secrets of each file

    def texts() -> Iterator[str]:
        done = 0
        with progress.bar("reading", total=num_bytes, unit="bytes") as show:
            for number, facts in enumerate(inventory):
                reader = records.Reader(facts.units[0], max_record_bytes=1 << 30, render=vocabulary.contents)
                screen = screening.Screen(reader)
                for record in screen:
                    if isinstance(record, records.BadRecord):
                        raise UserError(f"{record.file}:{record.line}: {record.reason}. Mend it or leave the file out.")
                    num_records[number] += 1
                    show(done + screen.num_bytes)
                    yield "".join(part.text for part in record.parts)
                found.append(screen.counts())
                done += facts.size

    trained = vocabulary.train(config, texts()) if base is None else None
    if trained is not None and not any(num_records):
        raise UserError(config.problem("sources", "hold no record, only blank lines. Check the files."))

    secrets = screening.facts(found)

    # --- the folder --------------------------------------------------------------------------------------------------
    with files.staged_folder(final, overwrite=config.overwrite) as folder:
        if trained is not None:
            vocabulary.save(trained, folder, config)
        if base is not None:
            added_tokens.save_extended(base, folder, config)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        loaded = tokenizer.load(folder)
        digest = manifest.seal(
            folder,
            kind="tokenizer",
            final=final,
            payload=tokenizer.FILES,
            config=config,
            parents=parents,
            sources=[
                {
                    "path": str(facts.raw.path),
                    "format": facts.raw.format,
                    "size": facts.size,
                    "sha256": facts.sha256,
                    "num_records": number,
                }
                for facts, number in zip(inventory, num_records, strict=True)
            ],
            facts={
                "type": config.type if base is None else "base",
                "vocab_size": loaded.vocab_size,
                "trained_on_bytes": num_bytes,
                "input_digest": input_digest,
                "engine": loaded.engine,
                **(trained.facts | {"secrets": secrets} if trained is not None else {}),
                **vocabulary.given_besides(config),
            },
        )
    made_of = f"from {num_bytes / 1e6:.1f} MB" if base is None else f"{base.vocab_size} of them of {base.folder}"
    print(f"tokenizer  {final}  {loaded.vocab_size} ids {made_of}, encodes with {loaded.engine}")
    facts_left = trained.facts.items() if trained is not None else ()
    if left_out := {name: count for name, count in facts_left if "left_out" in name and count}:
        print("not used   " + ", ".join(f"{name} {count:,}" for name, count in left_out.items()))
    if trained is not None and (secrets["num_findings"] or secrets["bypass_reason"]):
        print(screening.summary(secrets))
    print(f"manifest   {digest}")
    return 0


if __name__ == "__main__":
    cli.run(main)
