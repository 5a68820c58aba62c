"""Continue a prompt with a trained model.

examples:
  python scripts/generate.py --checkpoint runs/quickstart/train/final --prompt "def main("
  python scripts/generate.py --checkpoint DIR --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 1

The prompt and its continuation go to standard output, and nothing else does.
"""

from collections.abc import Sequence
from pathlib import Path

from codex_accel import cli, offline
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import GenerateConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    config = cli.parse(GenerateConfig, argv, doc=__doc__, stage="generate")
    offline.enforce(allow_network=config.allow_network)
    from codex_accel import manifest

    folder = manifest.find_model(Path(config.checkpoint), verify=config.verify, key="checkpoint")

    import torch

    from codex_accel import bases, generation
    from codex_accel import model as models
    from codex_accel import tokenizer as tokenizers

    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise UserError(config.problem("device", "cuda: no CUDA device is to be had here. Use device=cpu."))
    device = "cuda" if cuda and config.device != "cpu" else "cpu"
    model = models.load(folder, verify=config.verify).to(device).eval()
    tokenizer = tokenizers.load(bases.tokenizer_beside(folder), key="checkpoint")
    result = generation.generate(model, tokenizer, config)
    print(config.prompt + result["text"])
    return 0


if __name__ == "__main__":
    cli.run(main)
