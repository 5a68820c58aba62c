"""No network unless the config asks for it.

Rule: every script calls `enforce` right after its config is read and before anything that could reach the network is
imported, because huggingface_hub, transformers and datasets read these variables once, when they are imported.
"""

import os

OFFLINE_VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "offline",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # it heeds DO_NOT_TRACK only if that is "true"
}


def enforce(*, allow_network: bool) -> None:
    """Set every offline switch of the libraries below us, or leave the environment alone if `allow_network`.

    Variables are overwritten, not defaulted: a shell that says `HF_HUB_OFFLINE=0` does not open the network, only the
    config does. `TOKENIZERS_PARALLELISM` is set because forking after a parallel encode prints a warning otherwise.
    """
    if not allow_network:
        os.environ.update(OFFLINE_VARIABLES)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
