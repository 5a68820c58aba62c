"""Write a model as a plain from_pretrained folder, an adapter merged into its base.

examples:
  python scripts/export_model.py --checkpoint runs/lora --output-dir exports/lora
  python scripts/export_model.py --checkpoint runs/lora/checkpoints/step-000000100 --output-dir exports/lora-100
  python scripts/export_model.py --checkpoint runs/lora --base models/moved --output-dir exports/lora --dtype bfloat16

The folder holds safetensors weights, configuration, tokenizer, generation configuration, a model card (README.md) and a
manifest that names what it was made from. Its logits are those of the adapted model.
"""

from collections.abc import Sequence
from pathlib import Path

from codex_accel import cli, files, manifest, offline
from codex_accel.schema import ExportConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    config = cli.parse(ExportConfig, argv, doc=__doc__, stage="export_model")
    offline.enforce(allow_network=config.allow_network)

    # --- inputs, all checked before the model loads -----------------------------------------------------------------
    final = Path(config.output_dir)
    files.require_free(final, overwrite=config.overwrite)
    folder = manifest.find_model(Path(config.checkpoint), verify=config.verify, key="checkpoint")

    import torch

    from codex_accel import checkpoint, merging, model_card
    from codex_accel import model as models
    from codex_accel import tokenizer as tokenizers

    base = None
    if config.base is not None:
        base = manifest.find_model(Path(config.base), verify=config.verify, key="base")
    folders = merging.chain(folder, verify=False, key="checkpoint", base=base)
    tokenizer_dir = next((path for path in folders if tokenizers.defining_files(path)), None)

    # --- the model ---------------------------------------------------------------------------------------------------
    dtype = getattr(torch, config.dtype)
    model = models.load(folder, key="checkpoint", verify=config.verify, base=base, dtype=dtype)
    model.config.use_cache = True  # which training has switched off
    if tokenizer_dir is not None:
        tokenizer = tokenizers.load(tokenizer_dir)
        for name, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id)):
            if token is not None:
                setattr(model.generation_config, f"{name}_token_id", token)
    counts = models.count_parameters(model)

    # --- the folder --------------------------------------------------------------------------------------------------
    with files.staged_folder(final, overwrite=config.overwrite) as staged:
        model.save_pretrained(staged)
        model.generation_config.save_pretrained(staged)
        checkpoint.let_others_read(staged)
        if tokenizer_dir is not None:
            checkpoint.copy_tokenizer(tokenizer_dir, staged)
        payload = files.list_files(staged)
        card = model_card.text(
            final.name,
            folders,
            model_type=model.config.model_type,
            num_parameters=counts["num_parameters"],
            dtype=config.dtype,
        )
        (staged / "README.md").write_text(card, encoding="utf-8")
        named = [folder, *(folders[1:2] if base else merging.unnamed_bases(folder))]
        digest = manifest.seal(
            staged,
            kind="model",
            final=final,
            payload=payload,
            config=config,
            parents=[manifest.as_parent(path) for path in named],
            facts={"num_parameters": counts["num_parameters"], "dtype": config.dtype, "num_merged": len(folders) - 1},
        )
    for adapter in folders[:-1]:
        print(f"adapter  {adapter}")
    print(f"{'base' if len(folders) > 1 else 'model':<8} {folders[-1]}")
    if tokenizer_dir is None:
        print("note     there is no tokenizer beside the model")
    print(f"export   {final}, {counts['num_parameters']:,} parameters in {config.dtype}\nmanifest {digest}")
    return 0


if __name__ == "__main__":
    cli.run(main)
