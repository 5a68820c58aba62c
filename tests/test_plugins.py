"""A name means one function; a plug-in that is in the way or fails is told by name, distribution and version."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Annotated

import pytest
import torch
from conftest import ROOT, train_argv
from pydantic import Field
from test_run import config

from codex_accel import callbacks, optim, plugins
from codex_accel import config as configuration
from codex_accel.errors import UserError
from codex_accel.train_schema import Optimizer, TrainConfig

PAGE = ROOT / "docs" / "plugins.md"
FAULTY = """
def good(config):
    return {}

def raises(config):
    def on_step(moment):
        if moment.state.step == 4:
            return {}["no such key"]
    return {"on_step": on_step}

def raises_when_made(config, *, size=3):
    return 1 / 0

def odd(config):
    return {"on_stop": print}

def nothing(config):
    return None

def half(groups, settings):
    import torch
    return torch.optim.SGD(groups[:1], lr=settings.learning_rate)

def forgets(groups, settings):
    import torch
    return torch.optim.SGD([p for group in groups for p in group["params"]], lr=settings.learning_rate)

constant = 3
"""
FAULTY_CALLBACKS = {
    name: f"faulty:{name}" for name in ("good", "raises", "raises_when_made", "odd", "nothing", "constant")
}
FAULTY_CALLBACKS |= {"missing": "faulty:missing", "broken": "faulty_broken:anything"}


def wheel(
    folder: Path, name: str, version: str, *, modules: dict[str, str], entries: dict[str, dict[str, str]]
) -> Path:
    """A wheel (PEP 427) of some modules and entry points, by group."""
    about = f"{name}-{version}.dist-info"
    files = {f"{module}.py": text for module, text in modules.items()}
    lines = [line for group, names in entries.items() for line in [f"[{group}]", *map(" = ".join, names.items())]]
    files[f"{about}/entry_points.txt"] = "\n".join(lines) + "\n"
    files[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files[f"{about}/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{about}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{about}/RECORD"])
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inner, text in files.items():
            archive.writestr(inner, text)
    return path


def pip_install(target: Path, *packages: Path) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", target, *packages]
    subprocess.run(command, check=True, timeout=120)
    return target


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder of packages: the example of docs/plugins.md, built from its blocks, and one with faulty plug-ins."""
    folder = tmp_path_factory.mktemp("plugins")
    project = folder / "codex-example"
    project.mkdir()
    text = PAGE.read_text(encoding="utf-8")
    for language, name in (("toml", "pyproject.toml"), ("python", "codex_example.py")):
        [block] = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        (project / name).write_text(block)
    faulty = wheel(
        folder,
        "faulty_plugins",
        "0.3",
        modules={"faulty": FAULTY, "faulty_broken": "import json\n\nraise RuntimeError('no licence')\n"},
        entries={
            plugins.CALLBACKS: FAULTY_CALLBACKS,
            plugins.OPTIMIZERS: {"half": "faulty:half", "forgets": "faulty:forgets"},
        },
    )
    return pip_install(folder / "site", project, faulty)


@pytest.fixture
def here(installed, monkeypatch):
    """The packages are installed for this process."""
    monkeypatch.syspath_prepend(installed)
    for name in ("faulty", "faulty_broken", "codex_example"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return installed


@pytest.fixture
def train_script(installed, tmp_path) -> Path:
    """scripts/train.py in an environment that has the packages, for the fork server."""
    path = tmp_path / "train_with_plugins.py"
    path.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(installed)!r})\n"
        f"main = runpy.run_path({str(ROOT / 'scripts' / 'train.py')!r})['main']\n"
    )
    return path


def with_callbacks(**chosen):
    return config().model_copy(update={"callbacks": chosen})


def problems_of(**chosen) -> list[str]:
    with pytest.raises(UserError) as caught:
        callbacks.load(with_callbacks(**chosen))
    return caught.value.problems


# --- names ----------------------------------------------------------------------------------------------------------


def test_only_the_plugin_that_is_asked_for_is_imported(here):
    assert callbacks.load(with_callbacks(good={})) == {"good": {}}
    assert "faulty" in sys.modules
    assert not {"faulty_broken", "codex_example"} & set(sys.modules)


def test_an_unknown_name_is_told_with_built_in_and_installed_names(here):
    [problem] = problems_of(spike_gard={})
    assert problem.endswith("callbacks.spike_gard: no such callback: 'spike_gard'. Did you mean 'spike_guard'?")
    [problem] = problems_of(x={})
    assert "Choose from: early_stopping, sample_texts, history, broken, constant," in problem
    with pytest.raises(UserError, match=r"optimizer\.name: no such optimizer: 'nadm'\. Did you mean 'nadam'\?"):
        optim.require(config(optimizer=Optimizer(name="nadm")))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "broken",
            "cannot be imported from faulty_broken:anything: RuntimeError: no licence (faulty_broken.py, line 3).",
        ),
        (
            "missing",
            "cannot be imported from faulty:missing: AttributeError: module 'faulty' has no attribute 'missing'.",
        ),
        ("constant", "cannot be imported from faulty:constant: TypeError: it is int, not a function."),
        ("raises_when_made", "cannot be made: ZeroDivisionError: division by zero (faulty.py, line 12)."),
        ("odd", "cannot be made: ValueError: no such moment: 'on_stop'. Did you mean 'on_step'?"),
        (
            "nothing",
            "cannot be made: TypeError: it gives None, not functions by moment (on_step, on_evaluate, on_save,",
        ),
    ],
)
def test_a_plugin_that_fails_is_named_with_its_distribution(here, name, words):
    [problem] = problems_of(**{name: {}})
    assert f"callbacks.{name}: the callback '{name}' of faulty_plugins 0.3 {words}" in problem


@pytest.fixture
def twins(tmp_path, monkeypatch):
    """Two distributions with a callback of one name, of which one also has a built-in's name."""
    made = [
        wheel(
            tmp_path, name, "1.2", modules={name: "raise SystemExit('imported')\n"}, entries={plugins.CALLBACKS: names}
        )
        for name, names in {
            "first_twin": {"notes": "first_twin:f", "history": "first_twin:f"},
            "second_twin": {"notes": "second_twin:f"},
        }.items()
    ]
    monkeypatch.syspath_prepend(pip_install(tmp_path / "site", *made))


def test_names_that_mean_two_functions_are_told_whatever_is_asked_for(twins):
    """Nothing is imported for it; groups that are not asked for are left alone."""
    problems = problems_of(early_stopping={})
    assert len(problems) == 2
    assert (
        sum("the plug-in 'history' of first_twin 1.2 has the name of a built-in callback." in p for p in problems) == 1
    )
    [both] = [problem for problem in problems if "two plug-ins have one name" in problem]
    assert "'notes' of first_twin 1.2" in both
    assert "'notes' of second_twin 1.2" in both
    assert optim.require(config())


def test_a_mistake_in_the_names_is_told_before_torch_is_imported(installed, tiny, tmp_path):
    """As a user has it: a true process, the packages on its path."""
    argv = [*train_argv(tiny, tmp_path / "run"), "callbacks.spike_guard.facto=2.0", "optimizer.name=nadam"]
    command = [sys.executable, "-X", "importtime", "scripts/train.py", *argv]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert told == ["error: command line: callbacks.spike_guard.facto: unknown key. Did you mean 'factor'?"]
    assert re.search(r"\| +pydantic$", done.stderr, re.MULTILINE)
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_the_settings_of_the_page_are_right(tmp_path):
    """Each yaml block, as the end of a configuration file."""
    head = "output_dir: o\nmodel: {path: m}\ndata: {dataset: d, block_size: 8}\ntraining: {max_steps: 9}\n"
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names = set()
    for block in blocks:
        (tmp_path / "train.yaml").write_text(f"{head}evaluation: {{every_steps: 3}}\n{block}")
        found = configuration.load(TrainConfig, path=tmp_path / "train.yaml")
        names |= set(callbacks.load(found)) | {
            name for name in found.optimizer.model_fields_set if optim.require(found)
        }
    assert names == {*callbacks.CALLBACKS, "learning_rate", "rate_scales"}


# --- settings -------------------------------------------------------------------------------------------------------


def made_with(config, *, size: Annotated[int, Field(ge=1)], names: "list[str]" = (), anything=None):
    """A function with a required setting, an annotation in quotes and a setting without one."""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "at.size: required and not given."),
        ({"size": 0}, "at.size: 0: should be greater than or equal to 1."),
        ({"size": "3"}, "at.size: '3': should be a valid integer."),
        ({"size": True}, "at.size: True: should be a valid integer."),
        ({"size": 1, "names": [1]}, "at.names: [1]: should be a valid string."),
        ({"size": 1, "nams": []}, "at.nams: unknown key. Did you mean 'names'?"),
        ({"size": 1, "config": 2}, "at.config: unknown key."),
    ],
)
def test_a_wrong_setting_is_told_with_its_key(given, words):
    with pytest.raises(UserError) as caught:
        plugins.settings(made_with, given, config=config(), key="at")
    assert len(caught.value.problems) == 1
    assert words in str(caught.value)


def test_right_settings_pass_as_they_are():
    given = {"size": 2, "names": ["a"], "anything": {"b": [1.5]}}
    assert plugins.settings(made_with, given, config=config(), key="at") == given
    assert plugins.settings(lambda groups, **more: None, {"any": 1}, config=config(), key="at") == {"any": 1}


def test_settings_where_there_are_none_are_told(here):
    [problem] = problems_of(good={"size": 1})
    assert problem.endswith("callbacks.good.size: unknown key. It takes no settings.")


def test_options_of_a_plugin_optimizer_are_checked(here):
    wrong = Optimizer(name="nadam", options={"momentum_decay": "much", "momentum_decai": 0.1})
    with pytest.raises(UserError) as caught:
        optim.require(config(optimizer=wrong))
    assert [problem.partition("optimizer.options.")[2] for problem in caught.value.problems] == [
        "momentum_decay: 'much': should be a valid number.",
        "momentum_decai: unknown key. Did you mean 'momentum_decay'?",
    ]


# --- in a run -------------------------------------------------------------------------------------------------------


def test_the_example_of_the_page_runs_and_is_recorded(train_script, fork_server, tiny, tmp_path):
    overrides = ["optimizer.name=nadam", "optimizer.options.momentum_decay=1e-3", "training.max_steps=8"]
    guard = "callbacks.spike_guard={factor: 1.0001, patience: 1}"
    job = fork_server.run(train_script, train_argv(tiny, tmp_path / "run", *overrides, guard))
    assert job.codes == [0], job.output
    described = {"distribution": "codex-example", "version": "1.0"}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["plugins"] == [
        {"group": plugins.OPTIMIZERS, "name": "nadam", **described},
        {"group": plugins.CALLBACKS, "name": "spike_guard", **described},
    ]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.ndjson").read_text().splitlines()]
    norms = [line["grad_norm"] for line in lines if line["split"] == "train"]
    mean, above = norms[0], []
    for norm in norms:
        above.append(norm > 1.0001 * mean)
        mean = 0.99 * mean + 0.01 * norm
    assert above.index(True) == len(above) - 1, "the run ends at the first norm above"
    [end] = [line for line in (tmp_path / "run" / "events.ndjson").read_text().splitlines() if '"kind": "end"' in line]
    assert json.loads(end)["reason"].startswith("spike_guard: gradient norm ")


def test_an_option_that_is_let_drift_has_its_effect(train_script, fork_server, tiny, tmp_path):
    """torch's load_state_dict brings back the options of the parameter groups along with the moments."""
    argv = train_argv(tiny, tmp_path / "run", "optimizer.name=nadam", "training.max_steps=3")
    assert fork_server.run(train_script, [*argv, "training.stop_at_step=1"]).codes == [75]
    more = ["optimizer.options.momentum_decay=0.5", "allow_drift=[optimizer.options]"]
    job = fork_server.run(train_script, [*argv, *more])
    assert job.codes == [0], job.output
    [path] = (tmp_path / "run" / "checkpoints").glob("step-*3/optimizer.bin")
    groups = torch.load(path, weights_only=True)["param_groups"]
    assert [group["momentum_decay"] for group in groups] == [0.5, 0.5]


def test_a_callback_that_raises_ends_the_run_and_the_checkpoint_stands(train_script, fork_server, tiny, tmp_path):
    argv = train_argv(tiny, tmp_path / "run", "training.max_steps=6", "callbacks.raises={}")
    job = fork_server.run(train_script, argv)
    assert job.codes == [2]
    assert job.output.splitlines()[-1] == (
        "error: command line: callbacks.raises: the callback 'raises' of faulty_plugins 0.3 failed at on_step of step "
        "4: KeyError: 'no such key' (faulty.py, line 8). Mend it, or take it out of the configuration."
    )
    assert "Traceback" not in job.output
    job = fork_server.run("train", argv[:-1])
    assert job.codes == [0], job.output
    assert "step-000000003, step 3" in job.output


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("half", r"'half' of faulty_plugins 0\.3 failed: ValueError: it updates 1 parameters, not the 2 of its groups"),
        ("forgets", r"'forgets' of faulty_plugins 0\.3 failed: ValueError: it drops the key 'rate_scale'"),
    ],
)
def test_an_optimizer_that_breaks_the_contract_is_named(here, name, words):
    with pytest.raises(UserError, match=words):
        optim.build(config(optimizer=Optimizer(name=name)), torch.nn.Linear(2, 2))
