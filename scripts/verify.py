"""Check that an artefact, and with --recursive everything it was made from, is unchanged since it was written.

examples:
  python scripts/verify.py runs/quickstart/test
  python scripts/verify.py runs/quickstart/test --recursive
  python scripts/verify.py runs/quickstart/test --recursive --digest 3f9c...

Prints the tree of parents, each with a tick or with what is wrong. Exit code 0 if all is well, 1 if not. A manifest can
vouch for its parents but not for itself: keep the digest that a stage prints elsewhere, and give it as --digest.
"""

from collections.abc import Sequence
from pathlib import Path

from codex_accel import cli, files, manifest, offline
from codex_accel.errors import UserError
from codex_accel.schema import VerifyConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit code."""
    config = cli.parse(VerifyConfig, argv, doc=__doc__, stage="verify", positional=["path"])
    offline.enforce(allow_network=config.allow_network)
    folder = Path(config.path)
    if not (folder / manifest.MANIFEST).is_file():
        raise UserError(
            config.problem("path", f"no {manifest.MANIFEST} in '{folder}'. Give a folder that a stage made.")
        )
    tree = manifest.check_tree(folder, recursive=config.recursive)
    if config.digest is not None and files.sha256_file(folder / manifest.MANIFEST) != config.digest:
        tree.problems.append(f"{folder / manifest.MANIFEST}: SHA-256 is not the given --digest {config.digest}.")
    _show(tree, "", "")
    problems = tree.all_problems()
    print("all ticks" if not problems else f"{len(problems)} problem{'s' * (len(problems) > 1)}")
    return 1 if problems else 0


def _show(node: manifest.Node, lead: str, indent: str) -> None:
    print(f"{lead}{'✗' if node.problems else '✓'} {node.label}")
    for problem in node.problems:
        print(f"{indent}    {problem}")
    for place, child in enumerate(node.children):
        last = place == len(node.children) - 1
        _show(child, f"{indent}{'└─ ' if last else '├─ '}", f"{indent}{'   ' if last else '│  '}")


if __name__ == "__main__":
    cli.run(main)
