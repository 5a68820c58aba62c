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
from typing import Any

from codex_accel import cli, files, manifest, offline
from codex_accel.errors import UserError
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

    from codex_accel import bases, checkpoint, model_card
    from codex_accel import model as models
    from codex_accel import tokenizer as tokenizers

    base = None
    if config.base is not None:
        base = manifest.find_model(Path(config.base), verify=config.verify, key="base")
    folders = bases.chain(folder, verify=False, key="checkpoint", base=base)
    if base is not None and len(folders) == 1:
        raise UserError(config.problem("base", f"'{folder}' is no adapter, so it has no base. Remove it."))
    files.require_apart(final, folders)
    tokenizer_dir = bases.tokenizer_beside(folder, base=base)
    tokenizer = tokenizers.load(tokenizer_dir) if tokenizers.defining_files(tokenizer_dir) else None

    # --- the model ---------------------------------------------------------------------------------------------------
    dtype = getattr(torch, config.dtype)
    model = models.load(folder, key="checkpoint", verify=config.verify, base=base, dtype=dtype)
    model.config.use_cache = True  # which training has switched off
    if bad := [name for name, weights in model.named_parameters() if not weights.isfinite().all()]:
        way_out = "Take bfloat16." if config.dtype == "float16" else "Look at the model's training."
        what = f"{bad[0]} holds values that are not finite in {config.dtype}. {way_out}"
        raise UserError(config.problem("dtype", what))
    note = _set_generation(model, tokenizer)
    counts = models.count_parameters(model)

    # --- the folder --------------------------------------------------------------------------------------------------
    with files.staged_folder(final, overwrite=config.overwrite) as staged:
        model.save_pretrained(staged)
        model.generation_config.save_pretrained(staged)
        checkpoint.let_others_read(staged)
        if tokenizer is not None:
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
        unnamed = bases.unnamed_bases(folder, base=base)
        named = dict.fromkeys([folder, *(folders[1:2] if base else []), *unnamed])
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
    if tokenizer is None:
        print("note     there is no tokenizer beside the model")
    if note:
        print(f"note     {note}")
    print(f"export   {final}, {counts['num_parameters']:,} parameters in {config.dtype}\nmanifest {digest}")
    return 0


def _set_generation(model: Any, tokenizer: Any) -> str:
    """Give the generation configuration the tokenizer's special ids; returns what was left out of it, in words.

    A list of ids that holds the tokenizer's stays. What transformers would not write is left out: a base may have it.
    """
    from transformers import GenerationConfig

    names = [f"{name}_token_id" for name in ("bos", "eos", "pad")]
    for name in names if tokenizer is not None else []:
        known, token = getattr(model.generation_config, name), getattr(tokenizer, name.replace("_token", ""))
        if token is not None and not (isinstance(known, list) and token in known):
            setattr(model.generation_config, name, token)
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split()).removeprefix("GenerationConfig is invalid: ")[:160]
        ids = {name: getattr(model.generation_config, name) for name in names}
        model.generation_config = GenerationConfig(**ids)
        return f"generation_config.json holds special ids alone, because transformers refuses the rest: {reason}"
    return ""


if __name__ == "__main__":
    cli.run(main)
