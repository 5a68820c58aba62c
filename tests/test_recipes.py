"""Every YAML file that ships: it parses, it tells typos, and it runs."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from codex_accel import cli, config, evaluate_schema, schema, serve_schema, train_schema
from codex_accel.errors import UserError

MODELS = {
    "quickstart_corpus": schema.CorpusConfig,
    "train_tokenizer": schema.TokenizerConfig,
    "inspect_tokenizer": schema.InspectConfig,
    "prepare_data": schema.PrepareConfig,
    "prepare_functions": schema.PrepareConfig,
    "train": train_schema.TrainConfig,
    "train_llama": train_schema.TrainConfig,
    "evaluate": evaluate_schema.EvaluateConfig,
    "generate": evaluate_schema.GenerateConfig,
    "compare_reports": evaluate_schema.CompareConfig,
    "export_model": schema.ExportConfig,
    "verify": schema.VerifyConfig,
    "checkpoints": schema.CheckpointsConfig,
    "replay": schema.ReplayConfig,
    "quickstart_table": schema.TableConfig,
    "serve": serve_schema.ServeConfig,
}
NO_STAGE = ("base", "safety")  # what the schema says; policies of masking
RECIPES = sorted(
    p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name not in ("base", "safety")
)  # a policy is no stage
BASES = sorted((ROOT / "configs" / "base").glob("*.yaml"))


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_is_valid(path):
    config.load(MODELS[path.stem], path=path)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_comment_stands_only_where_a_value_is_not_the_default(path):
    lines = path.read_text().splitlines()
    defaults = {key.key.rpartition(".")[2]: key.default for key in config.keys_of(MODELS[path.stem])}
    for line in lines:
        if match := re.match(r" *(?:- )?(\w+): (.+?) +# ", line):
            assert match.group(2) != defaults.get(match.group(1)), line


def sections_of(path: Path) -> list[tuple[str, int, str]]:
    """(section, line number, key) of the first key of each section of a YAML file, the root included."""
    found, parents = {}, [(-1, "")]
    for number, line in enumerate(path.read_text().splitlines(), 1):
        match = re.match(r"( *)(- )?([a-z_]+):", line)
        if not match:
            continue
        indent = len(match.group(1)) + len(match.group(2) or "")
        while parents[-1][0] >= indent:
            parents.pop()
        section = ".".join(name for _, name in parents if name)
        found.setdefault(section, (section, number, match.group(3)))
        parents.append((indent, match.group(3)))
    return list(found.values())


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_typo_in_any_section_is_told_with_its_line(path, tmp_path):
    for section, number, key in sections_of(path):
        if section in ("model.config", "peft"):
            continue  # keys of transformers and peft: tests/scripts/test_train.py, tests/test_adapters.py
        lines = path.read_text().splitlines()
        lines[number - 1] = lines[number - 1].replace(key, f"{key}x", 1)
        broken = tmp_path / path.name
        broken.write_text("\n".join(lines))
        with pytest.raises(UserError) as caught:
            config.load(MODELS[path.stem], path=broken)
        told = [problem for problem in caught.value.problems if f"'{key}'" in problem and "Did you mean" in problem]
        assert told, caught.value.problems
        assert told[0].startswith(f"{broken}:{number}: ")


@pytest.mark.parametrize("path", BASES, ids=name_of)
def test_the_base_file_is_what_the_schema_says(path):
    """`make configs` writes them."""
    doc = re.match(r'"""(.*)', (ROOT / "scripts" / f"{path.stem}.py").read_text()).group(1)
    assert path.read_text() == cli.base_yaml(MODELS[path.stem], doc), "run `make configs`"


def test_every_stage_has_a_base_file():
    assert {path.stem for path in BASES} == {path.stem for path in (ROOT / "scripts").glob("*.py")}


@pytest.mark.parametrize("train", ["train", "train_llama"])
def test_the_shakespeare_recipe_runs(fork_server, shared, tmp_path, train):
    for name in ("configs", "scripts"):
        (tmp_path / "repository" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "repository" / name).symlink_to(ROOT / name)
    (tmp_path / "shared").symlink_to(shared.parent)
    cwd = tmp_path / "repository"
    for stage, config_name, extra in (
        ("train_tokenizer", "train_tokenizer", []),
        ("prepare_data", "prepare_data", []),
        ("train", train, ["training.max_steps=3", "evaluation={every_steps: null, max_windows: 8}"]),
    ):
        argv = ["--config", f"configs/shakespeare_char/{config_name}.yaml", *extra]
        job = fork_server.run(stage, argv, cwd=cwd)
        assert job.codes == [0], job.output


@pytest.mark.slow
@pytest.mark.parametrize(("train", "bar"), [("train", 1.92), ("train_llama", 1.73)])
def test_shakespeare_reaches_the_published_loss(fork_server, shared, tmp_path, train, bar):
    """nanoGPT's README reports 1.88 for these settings; over the whole validation part, the same number of tokens."""
    import json

    for stage, name in (("train_tokenizer", "train_tokenizer"), ("prepare_data", "prepare_data"), ("train", train)):
        output = f"output_dir={tmp_path}/{stage}"
        more = {
            "train_tokenizer": [],
            "prepare_data": [f"tokenizer={tmp_path}/train_tokenizer"],
            "train": [f"data.dataset={tmp_path}/prepare_data"],
        }[stage]
        job = fork_server.run(
            stage, ["--config", f"configs/shakespeare_char/{name}.yaml", output, *more], timeout_s=600
        )
        assert job.codes == [0], job.output
    last = json.loads((tmp_path / "train" / "metrics.ndjson").read_text().splitlines()[-1])
    assert last["split"] == "validation"
    assert last["num_target_tokens"] == 111_538
    assert last["loss"] <= bar
