"""Write an embedded corpus of real text: the source of the standard library of the Python that runs this.

examples:
  python scripts/quickstart_corpus.py --config configs/quickstart/quickstart_corpus.yaml

`modules.jsonl` holds one `text` record a module; `functions.jsonl` holds `prompt` (signature and docstring) and
`completion` (body) records of functions. Both name the module's `path`, so that splits can keep a module together.
Generated tables (encodings/, pydoc_data/) are left out: their near-copies would make held-out text look easy. So are
tests, and packages that pip installed.
"""

import ast
import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from codex_accel import cli, files, offline
from codex_accel.errors import UserError
from codex_accel.schema import CorpusConfig

LEFT_OUT = {
    "encodings",
    "pydoc_data",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "ensurepip",
}
MIN_BYTES = 1_000  # shorter modules are stubs that import another


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; returns the exit code."""
    config = cli.parse(CorpusConfig, argv, doc=__doc__, stage="quickstart_corpus")
    offline.enforce(allow_network=config.allow_network)
    from codex_accel import manifest

    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(root.rglob("*.py"))
    final = Path(config.output_dir)
    num_modules = num_functions = num_bytes = num_unreadable = 0
    with files.staged_folder(final, overwrite=config.overwrite) as folder:
        with (
            open(folder / "modules.jsonl", "w", encoding="utf-8") as modules,
            open(folder / "functions.jsonl", "w", encoding="utf-8") as functions,
        ):
            for path in paths:
                name = path.relative_to(root)
                if LEFT_OUT & set(name.parts) or path.stat().st_size < MIN_BYTES:
                    continue
                if config.max_modules is not None and num_modules >= config.max_modules:
                    break
                try:
                    text = path.read_text(encoding="utf-8")
                    tree = ast.parse(text)
                except (UnicodeDecodeError, SyntaxError):  # a few hold old encodings or broken code on purpose
                    num_unreadable += 1
                    continue
                modules.write(json.dumps({"path": name.as_posix(), "text": text}) + "\n")
                num_modules, num_bytes = num_modules + 1, num_bytes + len(text.encode())
                for prompt, completion in pairs(text, tree):
                    record = {"path": name.as_posix(), "prompt": prompt, "completion": completion}
                    functions.write(json.dumps(record) + "\n")
                    num_functions += 1
        if not num_functions:
            raise UserError(f"{root}: holds no Python source to learn from. Use a Python with its standard library.")
        facts = {
            "num_modules": num_modules,
            "num_functions": num_functions,
            "num_bytes": num_bytes,
            "num_unreadable": num_unreadable,
        }
        names = ["modules.jsonl", "functions.jsonl"]
        digest = manifest.seal(folder, kind="corpus", final=final, payload=names, config=config, facts=facts)
    print(f"corpus   {final}  {num_modules} modules, {num_functions} functions, {num_bytes / 1e6:.1f} MB")
    print(f"manifest {digest}")
    return 0


def pairs(text: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(signature and docstring, body) of every documented function, as they stand in the source."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        if ast.get_docstring(node) is None or node.body[1].lineno <= (node.body[0].end_lineno or 0):
            continue
        edge = node.body[0].end_lineno or 0
        prompt, completion = "".join(lines[node.lineno - 1 : edge]), "".join(lines[edge : node.end_lineno])
        if completion.strip():
            yield prompt, completion


if __name__ == "__main__":
    cli.run(main)
