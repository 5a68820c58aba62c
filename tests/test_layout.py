"""The shape of the repository, read from its sources."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
MODULES = sorted((REPOSITORY / "codex_accel").glob("*.py"))
SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.py"))
NAMES = {path.stem for path in MODULES}
HEAVY = {"torch", "transformers", "accelerate", "datasets", "peft", "evaluate"}
# What --help, a config error, verify and the checks of raw data need.
TORCH_FREE = (
    "errors", "offline", "yaml_reader", "config", "cli", "schema", "files", "provenance", "manifest", "seeds", "order",
    "schedule", "events", "sources", "lines", "reasons", "json_values", "tables", "parquet", "formats", "records",
    "splits", "packing_cost", "packing_plan", "dataset_page", "run_folder", "retention", "identity", "preemption",
    "train_schema", "evaluate_schema", "starts", "plugins", "callbacks", "optim", "tracking", "telemetry", "model_card",
    "compiler", "journal", "scoring", "answers", "ngrams", "uncertainty", "metrics", "compression", "evaluate_metric",
    "tasks", "predictions", "curves", "samples", "page", "charts", "report_page", "report", "comparison",
    "run_comparison", "visible", "templates", "safety", "policy", "patterns", "plausibility", "secret_families",
    "prompts", "text_stream", "serve_schema", "api", "connections", "server", "redaction", "screening", "visible",
)  # fmt: skip
MAX_TRAIN_LINES = 350
FORBIDDEN_NAMES = {"utils", "util", "core", "manager", "helpers", "helper", "common", "misc"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def names_in(node: ast.AST) -> set[str]:
    """The dotted names that one import statement brings in; `from a import b` may mean the module a.b."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        package = "codex_accel" if node.level else ""
        base = ".".join(part for part in (package, node.module or "") if part)
        return {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return set()


def imports(path: Path, *, at_start_only: bool) -> set[str]:
    """Dotted names imported by a file: all of them, or those that run as soon as it is imported itself."""
    found: set[str] = set()
    waiting: list[ast.AST] = [parsed(path)]
    while waiting:
        node = waiting.pop()
        if at_start_only and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_type_checkers(node)):
            continue
        found |= names_in(node)
        waiting += ast.iter_child_nodes(node)
    return found


def our_modules(names: set[str]) -> set[str]:
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "codex_accel" and len(part) > 1 and part[1] in NAMES}


AT_START = {path.stem: imports(path, at_start_only=True) for path in MODULES}


def reached(module: str) -> set[str]:
    """`module` and every module of ours that its import brings in."""
    seen, waiting = set(), [module]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += our_modules(AT_START[current])
    return seen


def test_there_is_something_to_read():
    assert len(MODULES) > 10
    assert "__init__" in NAMES
    assert SCRIPTS


def test_imports_are_read_from_every_form(tmp_path):
    """This reader must not be blind: each form of an import, one after the other."""
    path = tmp_path / "a.py"
    path.write_text(
        "import torch.nn as nn\nfrom codex_accel import files, seeds as s\nfrom codex_accel.config import load\n"
        "from . import order\nfrom .cli import run\ntry:\n    import peft\nexcept ImportError:\n    pass\n"
        "class A:\n    import datasets\n\ndef f():\n    import evaluate\n"
        "if TYPE_CHECKING:\n    import transformers\n"
    )
    found = imports(path, at_start_only=True)
    assert our_modules(found) == {"files", "seeds", "config", "order", "cli"}
    assert {name.partition(".")[0] for name in found} & HEAVY == {"torch", "peft", "datasets"}
    assert {"evaluate", "transformers"} <= imports(path, at_start_only=False)


def test_no_import_cycle():
    """Imports inside of functions count too: a cycle that is put off is still a cycle."""
    edges = {path.stem: our_modules(imports(path, at_start_only=False)) - {"__init__"} for path in MODULES}
    remaining = dict(edges)
    while leaves := [name for name, targets in remaining.items() if not targets & set(remaining)]:
        for name in leaves:
            del remaining[name]
    assert remaining == {}, "these modules import each other in a circle"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_light_module_imports_nothing_heavy(module):
    assert module in NAMES, f"codex_accel/{module}.py is missing"
    for name in sorted(reached(module)):
        heavy = {imported.partition(".")[0] for imported in AT_START[name]} & HEAVY
        assert not heavy, f"{module} imports {heavy} through {name}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_imports_no_script(script):
    stems = {path.stem for path in SCRIPTS} | {"scripts"}
    assert not {name.partition(".")[0] for name in imports(script, at_start_only=False)} & stems


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_script_imports_nothing_heavy_before_its_config_is_read(script):
    """So that --help and a mistake in the config answer at once, and `offline.enforce` comes first."""
    names = imports(script, at_start_only=True)
    direct = {name.partition(".")[0] for name in names} & HEAVY
    through = {
        name for module in our_modules(names) for name in reached(module)
        if {imported.partition(".")[0] for imported in AT_START[name]} & HEAVY
    }  # fmt: skip
    assert not direct | through


def test_no_module_imports_a_script():
    names = {path.stem: {name.partition(".")[0] for name in imports(path, at_start_only=False)} for path in MODULES}
    assert [module for module, imported in names.items() if "scripts" in imported] == []


def test_train_script_stays_short():
    path = REPOSITORY / "scripts" / "train.py"
    assert path.exists()
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_TRAIN_LINES


def test_every_file_says_what_it_is_for():
    assert [path for path in [*MODULES, *SCRIPTS] if not (ast.get_docstring(parsed(path)) or "").strip()] == []


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=lambda path: path.stem)
def test_a_file_of_the_repository_that_is_named_is_there(path):
    """In a command of a docstring, or where it sends the reader; a user's own, such as my.yaml, lies elsewhere."""
    named = re.findall(r"(?<![\w./{-])(?:accelerate_configs|configs|docs|scripts)/[\w./-]*\w", path.read_text("utf-8"))
    assert [name for name in named if not (REPOSITORY / name).exists()] == []
    assert named or path.parent.name != "scripts", "nothing is found, though each script shows its command"


def test_every_file_is_on_the_map_in_the_readme():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    names = [path.name for path in [*MODULES, *SCRIPTS] if path.stem != "__init__"]
    assert [name for name in names if not re.search(rf"(?<!\w){re.escape(name)}\b", text)] == []


def test_package_is_flat_and_named_by_nouns():
    assert not NAMES & FORBIDDEN_NAMES
    assert not {path.stem for path in SCRIPTS} & FORBIDDEN_NAMES
    assert [path for path in (REPOSITORY / "codex_accel").rglob("*.py") if path not in MODULES] == []


def test_scripts_have_a_main_and_do_nothing_when_imported():
    for path in SCRIPTS:
        tree = parsed(path)
        assert "main" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, path.name
        assert "__name__ == '__main__'" in ast.unparse(tree.body[-1]), path.name
