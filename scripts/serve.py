"""Serve a trained model over HTTP: its own /infer, and OpenAI's completions and chat completions.

examples:
  python scripts/serve.py --checkpoint runs/quickstart/train/final
  python scripts/serve.py --checkpoint DIR --port 0 --limits.max_running 16
  CODEX_ACCEL_TOKEN=$(openssl rand -hex 32) python scripts/serve.py --checkpoint DIR --host 0.0.0.0

  curl http://127.0.0.1:8000/infer -H 'Content-Type: application/json' -d '{"prompt": "def main("}'

Listens on this machine alone unless there is a token. SIGTERM and Ctrl-C let what is under way come to its end.
"""

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from codex_accel import cli, offline
from codex_accel.errors import UserError
from codex_accel.serve_schema import ServeConfig

PACKAGES = ("fastapi", "uvicorn")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until it is told to end; returns the exit code."""
    config = cli.parse(ServeConfig, argv, doc=__doc__, stage="serve")
    offline.enforce(allow_network=config.allow_network)

    # --- what can fail at once -------------------------------------------------------------------------------------
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        what = "not installed. Run `pip install -r requirements-serve.txt`."
        raise UserError(f"serving needs {' and '.join(PACKAGES)}: {' and '.join(missing)}: {what}")
    from codex_accel import connections, redaction, server

    token = connections.token()
    sockets = connections.listen(config, token=token)

    # --- until a signal --------------------------------------------------------------------------------------------
    server.run(config, sockets, token=token, load=lambda on_news: _load(config, redaction.policy(), on_news))
    return 0


def _load(config: ServeConfig, rules: Any, on_news: Callable[[Any], None]) -> Any:
    """The model, verified and ready. `rules` are None where nothing is masked."""
    from codex_accel import api, bases, manifest, server
    from codex_accel import tokenizer as tokenizers

    folder = manifest.find_model(Path(config.checkpoint), verify=config.verify, key="checkpoint")
    tokenizer = tokenizers.load(bases.tokenizer_beside(folder), key="checkpoint")

    import torch

    from codex_accel import admission, generation, service
    from codex_accel import model as models
    from codex_accel.prompts import encode_chat

    if config.chat_template is not None:
        try:
            encode_chat(tokenizer, [{"role": "user", "content": "?"}], template_file=config.chat_template)
        except ValueError as error:
            what = f"'{config.chat_template}' refuses a user's message ({error}). Mend it."
            raise UserError(config.problem("chat_template", what)) from error
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise UserError(config.problem("device", "cuda: no CUDA device is to be had here. Use device=cpu."))
    model = models.load(folder, verify=config.verify).to("cuda" if cuda and config.device != "cpu" else "cpu").eval()
    if why := generation.why_alone(model):
        print(f"note: one text at a time, because {why}", file=sys.stderr)
    record = manifest.as_parent(folder)
    identity = api.Identity(
        name=config.name or (folder.parent.resolve() if folder.name == "final" else folder.resolve()).name,
        kind=record["kind"],
        content_digest=record["content_digest"],
        manifest_digest=record["manifest_digest"],
        created=int(time.time()),
    )
    admits = admission.Admission(
        config,
        tokenizer,
        num_embeddings=model.get_input_embeddings().weight.shape[0],
        num_positions=getattr(model.config, "max_position_embeddings", None),
        policy=rules,
    )
    loop = service.Service(model, tokenizer, limits=config.limits, policy=rules, on_news=on_news)
    return server.Loaded(loop, admits, identity)


if __name__ == "__main__":
    cli.run(main)
