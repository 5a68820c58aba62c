"""Turn raw files into a tokenized dataset with splits.

examples:
  python scripts/prepare_data.py --config configs/quickstart/prepare_data.yaml
  python scripts/prepare_data.py --config my.yaml split.method=exact split.seed=1
  accelerate launch --config_file accelerate_configs/cpu_2proc.yaml scripts/prepare_data.py --config my.yaml
  python scripts/prepare_data.py --config my.yaml --list

Nothing is dropped in silence: what cannot be used stands in `quarantine.jsonl` with file, line and reason. A
preparation that is killed goes on where it was, whole shards at a time; any number of processes writes the same bytes.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from codex_accel import cli, files, offline
from codex_accel.errors import UserError
from codex_accel.schema import PrepareConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    config = cli.parse(PrepareConfig, argv, doc=__doc__, stage="prepare_data")
    offline.enforce(allow_network=config.allow_network)
    from codex_accel import catalog, dataset, manifest, plan, shards, sources, survey, tokenizer, workers

    final = Path(config.output_dir)

    # --- about the datasets that stand there -------------------------------------------------------------------------
    if config.list:
        return catalog.print_all(final.parent)
    if config.list_split is not None:
        return catalog.print_split(final, config.list_split, verify=config.verify)
    if config.gc:
        return catalog.collect_garbage(final.parent, dry_run=config.dry_run)

    # --- inputs, all checked before any work -------------------------------------------------------------------------
    catalog.require_place(final)
    raw_files = sources.resolve(config.sources, config_problem=config.problem)
    dataset.require_splits(config, raw_files)
    tokenizer_path = Path(config.tokenizer)
    if tokenizer_path.is_file():
        raise UserError(
            config.problem("tokenizer", f"'{tokenizer_path}' is a file. Give the folder that tokenizer.model lies in.")
        )
    if (tokenizer_path / manifest.MANIFEST).exists():
        kinds = ("tokenizer", "model", "checkpoint")
        manifest.require(tokenizer_path, kinds=kinds, verify=config.verify, key="tokenizer")
    loaded = tokenizer.load(tokenizer_path)
    renders = plan.renders(raw_files, loaded)
    parents = [manifest.as_parent(tokenizer_path), *manifest.parents_of_sources(raw.path for raw in raw_files)]
    if config.dry_run:
        for raw in raw_files:
            print(f"{raw.path.stat().st_size:>15,} bytes  {raw.format:<7} {raw.path}")
        print(f"{len(raw_files)} files, {loaded.vocab_size} ids, split by {config.split.method}; nothing was written")
        return 0

    # --- the plan: digests and units of the input, and whether this was done before ----------------------------------
    crew = workers.join(num_threads=config.num_threads)
    work = final.with_name(f"{plan.WORK_PREFIX}{final.name}")
    lock = plan.lock(work) if crew.is_main else None  # noqa: F841  held until this process ends
    crew.wait()
    inventory = plan.take_inventory(raw_files, work, crew, unit_bytes=config.unit_bytes)
    todo = plan.Plan(
        config=config,
        work=work,
        inventory=inventory,
        names=dataset.split_names(config),
        renders=renders,
        input_digest=plan.digest_input(config, inventory, loaded),
    )
    if crew.is_main:
        known = catalog.find_prepared(final, todo.input_digest)
        files.write_durable(work / "known.json", json.dumps(known and str(known)).encode())
    crew.wait()
    known = json.loads((work / "known.json").read_bytes())
    crew.wait()
    if final.exists() and known != str(final) and not config.overwrite:
        if crew.is_main and not (work / "plan.json").exists():
            files.remove_folder(work)
        raise UserError(catalog.why_not(final, todo.input_digest))
    if known is not None:
        if crew.is_main:
            catalog.take(Path(known), todo, final, parents=parents)
        crew.leave()
        return 0
    if crew.is_main and (num_done := plan.start_or_go_on(todo)):
        print(f"goes on: {num_done} of {len(todo.units)} units were done before")
    crew.wait()

    # --- splits and removal that need to see every record first ------------------------------------------------------
    if survey.needs_survey(config):
        survey.survey(todo, crew)
        crew.wait()
        if crew.is_main:
            survey.decide(todo)
        crew.wait()

    # --- read, check, tokenize, write --------------------------------------------------------------------------------
    loaded.check_on(plan.first_texts(todo))
    if loaded.engine_reason and crew.is_main:
        print(f"tokenizes with {loaded.engine}: {loaded.engine_reason}")
    shards.write_units(todo, crew, loaded, survey.assignment(todo))
    crew.wait()

    # --- the whole: counts, report, manifest -------------------------------------------------------------------------
    if crew.is_main:
        facts, read = dataset.finish(todo, loaded, name=final.name, tokenizer_digest=parents[0]["content_digest"])
        digest = dataset.seal(todo, work / "dataset", final, parents=parents, sources=read, facts=facts)
        dataset.print_summary(final, facts)
        print(f"dataset  {final}\nmanifest {digest}")
    crew.leave()
    return 0


if __name__ == "__main__":
    cli.run(main)
