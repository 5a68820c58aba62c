"""All problems of a configuration at once, each with where it was written."""

import itertools
import json
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codex_accel import config as configuration
from codex_accel import evaluate_schema, schema, serve_schema, train_schema
from codex_accel.config import RENAMED, StageConfig, keys_of, load, to_yaml, to_yaml_value
from codex_accel.errors import UserError
from codex_accel.yaml_reader import Reader

KEYS = vars(schema) | vars(train_schema) | vars(evaluate_schema) | vars(serve_schema)
ROOTS = [root for root in KEYS.values() if isinstance(root, type) and StageConfig in root.__bases__]

# What each root needs at least, with every section that a key can stand in.
SOURCES: list[Any] = [{"path": "a.txt"}]
MINIMAL: dict[str, dict[str, Any]] = {
    "CorpusConfig": {"output_dir": "out"},
    "TokenizerConfig": {"output_dir": "out", "sources": SOURCES, "special_tokens": {}},
    "InspectConfig": {"action": "validate", "tokenizer": "tok", "file": {"path": "a.txt"}},
    "PrepareConfig": {"output_dir": "out", "tokenizer": "tok", "sources": SOURCES, "split": {}},
    "TrainConfig": {
        "output_dir": "out",
        "model": {"path": "base"},
        "data": {"dataset": "data", "block_size": 16},
        "training": {"max_steps": 3},
        "optimizer": {},
        "schedule": {},
        "evaluation": {},
        "checkpoint": {},
        "tracking": {},
        "log": {},
    },
    "EvaluateConfig": {
        "checkpoint": "run",
        "output_dir": "out",
        "tasks": {"t": {"file": {"path": "a"}, "prompt": "p", "target": "t", "few_shot": {}, "sampling": {}}},
    },
    "GenerateConfig": {"checkpoint": "run"},
    "CompareConfig": {"a": "run", "b": "run"},
    "ExportConfig": {"checkpoint": "run", "output_dir": "out"},
    "CheckpointsConfig": {"run": "run"},
    "ReplayConfig": {"checkpoint": "run"},
    "VerifyConfig": {"path": "out"},
    "TableConfig": {"root": "runs"},
    "ServeConfig": {"checkpoint": "run", "sampling": {}, "limits": {}},
}
MINIMAL = {name: {"safety": {}, **values} for name, values in MINIMAL.items()}
every_root = pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)


def write(path: Path, values: dict[str, Any]) -> dict[str, int]:
    """Write `values` as YAML, one key a line; returns the line of each dotted key."""
    lines: list[str] = []
    places: dict[str, int] = {}

    def put(node: dict[str, Any], prefix: str, indent: str) -> None:
        for key, value in node.items():
            lines.append(f"{indent}{key}:")
            places[prefix + key] = len(lines)
            if isinstance(value, dict) and value:
                put(value, f"{prefix}{key}.", indent + "  ")
            elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
                for number, item in enumerate(value):
                    lines.append(f"{indent}  -")
                    put(item, f"{prefix}{key}.{number}.", indent + "    ")
            else:
                lines[-1] += f" {json.dumps(value)}"

    put(values, "", "")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return places


def placed(root: type[StageConfig], key: str, name: str, value: Any) -> tuple[dict[str, Any], str]:
    """The minimal values of `root` with `value` under `name` in the section of `key`; also its dotted place."""
    values = json.loads(json.dumps(MINIMAL[root.__name__]))
    section = key.replace("[]", ".0").replace("<name>", "t").split(".")[:-1]
    section_at(values, section)[name] = value
    return values, ".".join([*section, name])


def section_at(values: dict[str, Any], section: list[str]) -> dict[str, Any]:
    """The section that stands there; a raw file, which may be left out, is put there."""
    node: Any = values
    for part in section:
        if part == "file" and not isinstance(node.get(part), dict):
            node[part] = {"path": "a.txt"}
        node = node[int(part)] if part.isdigit() else node[part]
    return node


def refused(root: type[StageConfig], path: Path | None, *overrides: tuple[str, str]) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(root, path=path, overrides=overrides)
    assert not any("\n" in problem for problem in caught.value.problems)
    return caught.value.problems


@pytest.fixture
def path(tmp_path):
    return tmp_path / "c.yaml"


# --- every key of every stage -------------------------------------------------------------------------------------


def test_every_root_of_the_schema_is_tested_here():
    assert {root.__name__ for root in ROOTS} == set(MINIMAL)


@every_root
def test_minimal_file_is_enough(root, path):
    write(path, MINIMAL[root.__name__])
    config = load(root, path=path)
    assert config.schema_version == 1
    assert (config.allow_network, config.verify) == (False, True)


@every_root
def test_every_key_has_a_meaning(root):
    assert [key.key for key in keys_of(root) if not key.meaning.strip()] == []
    names = [key.key for key in keys_of(root)]
    assert len(names) == len(set(names))


def typos(name: str) -> set[str]:
    """`name` with its middle letter dropped, and with it doubled."""
    middle = len(name) // 2
    return {name[:middle] + name[middle + 1 :], name[:middle] + name[middle] + name[middle:]}


@every_root
def test_typo_in_any_key_is_one_line_with_place_name_and_suggestion(root, path):
    """All typos stand in one file, so this also shows that every problem is told."""
    values = json.loads(json.dumps(MINIMAL[root.__name__]))
    wrong: dict[str, str] = {}
    for key in keys_of(root):
        section, _, name = key.key.replace("[]", ".0").replace("<name>", "t").rpartition(".")
        node = section_at(values, section.split(".") if section else [])
        for typo in typos(name) - {""} - {k.key.rpartition(".")[2] for k in keys_of(root)}:
            node[typo] = 1
            wrong[f"{section}.{typo}".lstrip(".")] = name
    places = write(path, values)
    problems = refused(root, path)
    assert len(problems) == len(wrong)
    by_start = {problem.partition(": unknown key")[0]: problem for problem in problems}
    for dotted, name in wrong.items():
        problem = by_start[f"{path}:{places[dotted]}: {dotted}"]
        if len(name) > 4:  # of short names, such as bos and eos, a typo may be nearer to another
            assert problem.endswith(f"Did you mean '{name}'?"), problem
        else:
            assert "Did you mean '" in problem, problem


@every_root
def test_typo_on_the_command_line_says_so(root):
    key = next(iter(keys_of(root))).key
    problems = refused(root, None, (f"{key}x", "1"))
    assert f"command line: {key}x: unknown key. Did you mean '{key}'?" in problems


def wrong_value(key_type: str) -> Any:
    """A value of a type that no key of `key_type` takes."""
    return 3 if key_type.startswith(("text", "list", "dict", "section")) else "wrong"


@every_root
def test_wrong_type_of_any_key_is_one_line_with_place_and_value(root, path):
    """Each key alone: a section with a wrong value inside hides its neighbours' cross-checks, not their types."""
    for key in keys_of(root):
        wrong = wrong_value(key.type)
        name = key.key.rpartition(".")[2]
        values, dotted = placed(root, key.key, name, wrong)
        places = write(path, values)
        start = f"{path}:{places[dotted]}: {dotted} = {wrong!r}: "
        assert [problem[: len(start)] for problem in refused(root, path)] == [start]


@every_root
def test_null_is_refused_by_every_key_that_does_not_say_so(root, path):
    for key in keys_of(root):
        values, dotted = placed(root, key.key, key.key.rpartition(".")[2], None)
        if not key.type.endswith("null"):
            write(path, values)
            assert f": {dotted} = None: " in refused(root, path)[0]


@every_root
def test_every_missing_required_key_is_told_with_its_meaning(root, path):
    path.write_text("schema_version: 1\n")
    required = [name for name, field in root.model_fields.items() if field.is_required()]
    if not required:
        assert load(root, path=path).schema_version == 1
        return
    problems = refused(root, path)
    assert [problem.partition(": required and not given")[0] for problem in problems] == [
        f"{path}:1: {name}" for name in required
    ]
    for name, problem in zip(required, problems, strict=True):
        assert (root.model_fields[name].description or "") in problem
        assert problem.endswith(f"Add it to the file or give {name}=...")


# --- problems -----------------------------------------------------------------------------------------------------


def test_problems_of_every_sort_are_told_at_once(path):
    path.write_text(
        "output_dir: out\noutput_dir: again\nmodel: {path: base}\ndata:\n  dataset: 3\n  blok_size: 16\n"
        "training:\n  max_steps: ten\noptimizer:\n  learning_rate: .nan\nschedule: {name: cosin}\n"
    )
    problems = refused(
        train_schema.TrainConfig, path, ("seed", "x"), ("log.every_steps", "0"), ("evaluation.nothing", "1")
    )
    expected = [
        f"{path}:2: output_dir: duplicate key, first given at {path}:1.",
        f"{path}:10: optimizer.learning_rate = .nan: must be a finite number.",
        "command line: seed = 'x': should be a valid integer, not str.",
        f"{path}:5: data.dataset = 3: should be a valid string, not int.",
        f"{path}:4: data.block_size: required and not given",
        f"{path}:6: data.blok_size: unknown key. Did you mean 'block_size'?",
        f"{path}:8: training.max_steps = 'ten': should be a valid integer, not str.",
        f"{path}:11: schedule.name = 'cosin': is not a choice. Did you mean 'cosine'?",
        "command line: evaluation.nothing: unknown key. Choose from: every_steps, batch_size, max_windows,",
        "command line: log.every_steps = 0: should be greater than 0.",
    ]
    for start in expected:
        assert [problem for problem in problems if problem.startswith(start)], start
    assert len(problems) == len(expected) + 1  # nan is not above 0 either


@pytest.mark.parametrize("old", sorted(RENAMED))
def test_renamed_key_names_its_new_name(path, old):
    values, dotted = placed(train_schema.TrainConfig, "optimizer.name", old, 1)
    places = write(path, values)
    assert refused(train_schema.TrainConfig, path) == [
        f"{path}:{places[dotted]}: {dotted}: unknown key; here it is called {RENAMED[old]}."
    ]


def test_renamed_keys_lead_to_keys_that_exist():
    every = {key.key.rpartition(".")[2] for root in ROOTS for key in keys_of(root)}
    assert {new.split(" (")[0] for new in RENAMED.values()} <= every
    assert not every & set(RENAMED)


def test_key_of_another_section_names_that_section(path):
    values, _ = placed(train_schema.TrainConfig, "seed", "weight_decay", 0.0)
    write(path, values)
    (problem,) = refused(train_schema.TrainConfig, path)
    assert problem.endswith("weight_decay: unknown key here. Did you mean 'optimizer.weight_decay'?")


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("optimizer.learning_rate", "0.0", "should be greater than 0"),
        ("optimizer.betas", "[0.9]", "must be two numbers"),
        ("optimizer.betas", "[0.9, 1.0]", "must be two numbers"),
        ("schedule.final_lr_scale", "1.5", "less than or equal to 1"),
        ("schedule.warmup", "-1", "must be whole steps"),
        ("schedule.warmup", "1.5", "must be whole steps"),
        ("schedule.warmup", "true", "must be whole steps"),
        ("schedule.warmup", "two epochs", "must be whole steps"),
        ("schedule.warmup", "² epochs", "must be whole steps"),
        ("schedule.warmup", "1e2 epochs", "must be whole steps"),
        ("data.block_size", "1", "greater than or equal to 2"),
        ("training.max_steps", "3.0", "valid integer"),
        ("training.max_steps", "true", "valid integer"),
        ("verify", "1", "valid boolean"),
        ("verify", "no", "valid boolean"),
        ("training.mixed_precision", "fp8", "is not a choice. Choose from: no, bf16, fp16."),
        ("schema_version", "2", "is not a choice. Choose from: 1"),
        ("training.mixed_precision", "fp61", "is not a choice. Did you mean 'fp16'?"),
        ("output_dir", "", "at least 1 character"),
        ("model", "{}", "exactly one of model.config"),
        ("model", "{path: a, config: {model_type: llama}}", "exactly one of model.config"),
        ("model", "{config: {hidden_size: 3}}", "needs model_type"),
        ("training", "{micro_batch_size: 1}", "at least one of training.max_steps"),
        ("training.stop_at_step", "0", "greater than 0"),
        ("checkpoint.keep_last", "0", "greater than 0"),
        ("checkpoint.keep_best", "-1", "greater than or equal to 0"),
        ("checkpoint.best_metric", "los", "is not a choice. Did you mean 'loss'?"),
        ("checkpoint.on_failed_save", "ignore", "is not a choice. Choose from: stop, go_on."),
    ],
)
def test_value_out_of_range_is_refused(path, key, value, what):
    write(path, MINIMAL["TrainConfig"])
    (problem,) = refused(train_schema.TrainConfig, path, (key, value))
    assert problem.startswith(f"command line: {key} = ")
    assert what in problem


def test_accumulation_that_is_not_whole_is_refused_with_a_number_that_fits(path):
    write(path, MINIMAL["TrainConfig"])
    batches = [("training.micro_batch_size", "3"), ("training.global_batch_size", "8")]
    (problem,) = refused(train_schema.TrainConfig, path, *batches)
    assert "training.global_batch_size = 8 is not a multiple of training.micro_batch_size = 3" in problem
    assert problem.endswith("Try global_batch_size = 9.")


@pytest.mark.parametrize(
    ("saved", "evaluated"), [("null", "4"), ("4", "null"), ("4", "6"), ("8", "4"), ("null", "null")]
)
def test_best_checkpoints_that_are_never_evaluated_are_refused(path, saved, evaluated):
    write(path, MINIMAL["TrainConfig"])
    steps = [("checkpoint.every_steps", saved), ("evaluation.every_steps", evaluated)]
    (problem,) = refused(train_schema.TrainConfig, path, ("checkpoint.keep_best", "2"), *steps)
    assert "checkpoint.keep_best = 2 needs a checkpoint of each step that is evaluated" in problem
    assert "is not a multiple of checkpoint.every_steps" in problem
    configuration.load(train_schema.TrainConfig, path=path, overrides=steps)  # without keep_best any two go together


@pytest.mark.parametrize(("saved", "evaluated"), [("4", "4"), ("4", "12"), ("1", "7")])
def test_best_checkpoints_that_are_evaluated_may_be_kept(path, saved, evaluated):
    write(path, MINIMAL["TrainConfig"])
    steps = [("checkpoint.every_steps", saved), ("evaluation.every_steps", evaluated)]
    found = configuration.load(train_schema.TrainConfig, path=path, overrides=[("checkpoint.keep_best", "2"), *steps])
    assert found.checkpoint.keep_best == 2


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("sources.0.prompt", "p", "prompt and completion belong together"),
        ("split.ratios", "{train: 0.5}", "add up to 1"),
        ("split.ratios", "{train: 1.5, test: -0.5}", "above 0"),
        ("split.ratios", "{}", "above 0"),
        ("sources", "[]", "at least 1"),
    ],
)
def test_sources_and_splits_are_checked(path, key, value, what):
    write(path, MINIMAL["PrepareConfig"])
    (problem,) = refused(schema.PrepareConfig, path, (key, value))
    assert what in problem


def test_split_key_without_hash_is_refused(path):
    write(path, {**MINIMAL["PrepareConfig"], "split": {"key": "id", "method": "exact"}})
    (problem,) = refused(schema.PrepareConfig, path)
    assert "works with method: hash only" in problem


def test_two_special_tokens_of_one_name_are_refused(path):
    write(path, {**MINIMAL["TokenizerConfig"], "special_tokens": {"additional": ["[EOS]"]}})
    (problem,) = refused(schema.TokenizerConfig, path)
    assert problem.endswith("special_tokens: two have one name, '[EOS]'. Give each its own.")


def test_a_base_may_get_a_token_that_a_trained_tokenizer_has_by_itself():
    pairs = [("output_dir", "out"), ("base", "b"), ("special_tokens.additional", "['[PAD]']")]
    assert load(schema.TokenizerConfig, path=None, overrides=pairs).special_tokens.additional == ["[PAD]"]


def test_long_value_is_shortened():
    (problem,) = refused(schema.VerifyConfig, None, ("path", "a"), ("recursive", "x" * 1000))
    assert len(problem) < 200


# --- files --------------------------------------------------------------------------------------------------------


def test_missing_file_names_its_near_neighbour(tmp_path):
    (tmp_path / "train.yaml").touch()
    (problem,) = refused(train_schema.TrainConfig, tmp_path / "trian.yaml")
    assert problem.endswith(f"no such file. Did you mean '{tmp_path / 'train.yaml'}'?")


def test_float_and_text_are_read_as_they_look(path):
    write(path, MINIMAL["TrainConfig"])
    path.write_text(path.read_text() + "  every_steps: 5\n")
    text = path.read_text().replace("optimizer: {}", "optimizer: {learning_rate: 3e-4}")
    path.write_text(text.replace("max_steps: 3", "max_steps: 3\n  mixed_precision: no").replace("log: {}", "log:"))
    config = load(train_schema.TrainConfig, path=path)
    assert config.optimizer.learning_rate == 0.0003
    assert config.training.mixed_precision == "no"
    assert config.log.every_steps == 5


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e999"])
def test_non_finite_number_is_refused_with_the_value_that_was_written(path, number):
    path.write_text(f"checkpoint: a\ntemperature: {number}\n")
    problems = refused(evaluate_schema.GenerateConfig, path)
    assert problems[0].startswith(f"{path}:2: temperature = {number}: ")
    assert all("temperature = 0.0" not in problem for problem in problems)


@pytest.mark.security
def test_tag_and_duplicate_key_are_refused_even_in_free_form_values(path):
    write(path, {**MINIMAL["TrainConfig"], "model": {"config": {"model_type": "llama"}}})
    path.write_text(path.read_text().replace('model_type: "llama"', "model_type: llama\n    a: !!int 3\n    a: 4"))
    problems = refused(train_schema.TrainConfig, path)
    assert [problem.partition(". ")[0] for problem in problems] == [
        f"{path}:6: tag tag:yaml.org,2002:int is not allowed",
        f"{path}:7: model.config.a: duplicate key, first given at {path}:6",
    ]


# --- the command line's values ------------------------------------------------------------------------------------


def test_command_line_wins_over_the_file(path):
    write(path, {**MINIMAL["TrainConfig"], "seed": 1})
    config = load(train_schema.TrainConfig, path=path, overrides=[("seed", "2"), ("optimizer.betas", "[0.8, 0.9]")])
    assert (config.seed, config.optimizer.betas) == (2, [0.8, 0.9])


def test_last_value_on_the_command_line_wins():
    config = load(evaluate_schema.GenerateConfig, path=None, overrides=[("checkpoint", "a"), ("checkpoint", "b")])
    assert config.checkpoint == "b"


def test_override_says_command_line_and_the_file_says_its_line(path):
    write(path, {"checkpoint": "a", "seed": "x"})
    assert refused(evaluate_schema.GenerateConfig, path, ("top_k", "0")) == [
        "command line: top_k = 0: should be greater than 0.",
        f"{path}:2: seed = 'x': should be a valid integer, not str.",
    ]


@pytest.mark.parametrize(
    "text", ["a: [b", "3", "true", "1e5", "no", "", " two  words ", "{x}", "*a", "# no", "é\n", "'q'"]
)
def test_text_key_on_the_command_line_is_literal(text):
    config = load(evaluate_schema.GenerateConfig, path=None, overrides=[("checkpoint", "a"), ("prompt", text)])
    assert config.prompt == text


def test_text_key_of_a_source_is_literal(path):
    write(path, MINIMAL["TokenizerConfig"])
    config = load(schema.TokenizerConfig, path=path, overrides=[("sources.0.path", "a: [b"), ("sources.0.text", "7")])
    assert (config.sources[0].path, config.sources[0].text) == ("a: [b", "7")


def test_null_unsets_a_text_key(path):
    write(path, {"path": "a", "digest": "b"})
    assert load(schema.VerifyConfig, path=path, overrides=[("digest", "null")]).digest is None
    given = {"tokenizer": "t", "output_dir": "o", "sources": "[{path: p}]", "sources.0.completion": "null"}
    config = load(schema.PrepareConfig, path=None, overrides=list(given.items()))
    assert config.sources[0].completion is None


def test_source_is_appended_but_not_beyond_the_end(path):
    write(path, MINIMAL["TokenizerConfig"])
    config = load(schema.TokenizerConfig, path=path, overrides=[("sources.1", "{path: b.txt, format: text}")])
    assert [source.path for source in config.sources] == ["a.txt", "b.txt"]
    (problem,) = refused(schema.TokenizerConfig, path, ("sources.2", "{path: c.txt}"))
    assert problem.startswith("command line: sources.2: no such place in the configuration.")


@pytest.mark.parametrize("key", ["sources.path", "sources.x.path", "sources.5.path"])
def test_override_of_a_place_that_does_not_exist_is_refused(path, key):
    write(path, MINIMAL["TokenizerConfig"])
    assert refused(schema.TokenizerConfig, path, (key, "b")) == [
        f"command line: {key}: no such place in the configuration. Give the whole list instead."
    ]


@pytest.mark.parametrize("key", ["", ".", "a..b", "²", "²=3", "9" * 5000, "sources.²", "seed.x", "model.path.0"])
def test_odd_key_is_a_problem_and_not_a_crash(key):
    assert refused(train_schema.TrainConfig, None, (key, "1"))


def test_value_that_is_not_yaml_is_shown_with_its_key():
    problems = refused(schema.VerifyConfig, None, ("path", "a"), ("recursive", "[1"))
    assert problems[0].startswith("command line: is not valid YAML")
    assert problems[0].endswith("(in recursive=[1)")


def test_problem_inside_a_replaced_list_says_command_line(path):
    """The file's own lines for what was replaced are forgotten."""
    write(path, MINIMAL["TokenizerConfig"])
    (missing, unknown) = refused(schema.TokenizerConfig, path, ("sources", "[{pth: b.txt}]"))
    assert missing.startswith("command line: sources.0.path: required and not given")
    assert unknown.startswith("command line: sources.0.pth: unknown key. Did you mean 'path'?")


def test_problem_of_a_later_check_knows_where_the_value_stands(path):
    places = write(path, MINIMAL["TokenizerConfig"])
    config = load(schema.TokenizerConfig, path=path, overrides=[("output_dir", "x")])
    line = places["sources.0.path"]
    assert config.problem("sources.0.path", "is not there.") == f"{path}:{line}: sources.0.path: is not there."
    assert config.problem("output_dir", "exists.") == "command line: output_dir: exists."
    assert config.problem("vocab_size", "is too large.") == f"{path}:1: vocab_size: is too large."


# --- printing -----------------------------------------------------------------------------------------------------


@every_root
def test_to_yaml_is_a_file_that_gives_the_same_config(root, path):
    write(path, MINIMAL[root.__name__])
    config = load(root, path=path)
    path.write_text(to_yaml(config.model_dump(mode="json")), encoding="utf-8")
    assert load(root, path=path).model_dump() == config.model_dump()


TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.from_regex(r"[-+]?[0-9_.]{1,4}([eE][-+]?[0-9]{1,2})?", fullmatch=True),
    st.sampled_from(
        ["no", "1:30", "08", "1e5", "1.5e3", "null", "~", ".inf", "<<", "=", "\x85", "a\u2028 b", "\ufeff", "\r\n"]
    ),
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompt=TEXTS,
    temperature=st.floats(1e-4, allow_infinity=False),
    seed=st.integers(-(10**38), 10**38),
    top_k=st.none() | st.integers(1, 10**9),
)
def test_any_values_survive_to_yaml(path, prompt, temperature, seed, top_k):
    config = evaluate_schema.GenerateConfig(
        checkpoint="a", prompt=prompt, temperature=temperature, seed=seed, top_k=top_k
    )
    path.write_text(to_yaml(config.model_dump(mode="json")), encoding="utf-8")
    assert load(evaluate_schema.GenerateConfig, path=path).model_dump() == config.model_dump()


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(TEXTS, JSON_VALUES, max_size=3))
def test_any_model_configuration_survives_to_yaml(path, values):
    section = train_schema.Model(config={**values, "model_type": "llama"})
    path.write_text(to_yaml(section.model_dump(mode="json")), encoding="utf-8")
    reader = Reader("-", with_lines=True)
    assert reader.read(path.read_text(encoding="utf-8")) == section.model_dump()
    assert reader.problems == []


@settings(max_examples=50)
@given(value=JSON_VALUES)
def test_any_value_on_one_line_is_read_back(value):
    text = to_yaml_value(value)
    reader = Reader("-", with_lines=False)
    assert reader.read(text) == value
    assert reader.problems == []


@every_root
def test_default_of_every_key_reads_back_as_itself(root):
    for key in keys_of(root):
        if key.default is not None:
            assert "\n" not in key.default
            assert yaml.safe_load(key.default) == Reader("-", with_lines=False).read(key.default)


def test_keys_unfold_sections_and_lists():
    names = [key.key for key in keys_of(schema.TokenizerConfig)]
    assert names[:4] == ["schema_version", "allow_network", "verify", "safety.policy"]
    assert {"sources", "sources[].path", "special_tokens.pad"} <= set(names)
    assert "special_tokens" not in names
    assert "file.path" in [key.key for key in keys_of(evaluate_schema.EvaluateConfig)]


def test_type_and_default_are_told_in_words():
    keys = {key.key: (key.type, key.default) for key in keys_of(train_schema.TrainConfig)}
    assert keys["output_dir"] == ("text", None)
    assert keys["training.max_steps"] == ("int|null", "null")
    assert keys["training.mixed_precision"] == ("no|bf16|fp16|null", "null")
    assert keys["schedule.warmup"] == ("int|float|text", "0")
    assert keys["optimizer.betas"] == ("list[float]", "[0.9, 0.95]")


def test_did_you_mean_lists_the_choices_when_nothing_is_near():
    assert configuration.did_you_mean("cosin", ["cosine", "linear"]) == "Did you mean 'cosine'?"
    assert configuration.did_you_mean("zzz", ["cosine", "linear"]) == "Choose from: cosine, linear."


def test_config_cannot_be_changed_afterwards():
    config = schema.VerifyConfig(path="a")
    with pytest.raises(ValueError, match="frozen"):
        typing.cast(Any, config).path = "b"


def test_user_error_needs_a_problem():
    with pytest.raises(ValueError, match="at least one problem"):
        UserError()
    assert str(UserError("a", "b")) == "a\nb"


def test_typos_are_one_letter_away():
    assert typos("seed") == {"sed", "seeed"}
    assert all(abs(len(t) - len(n)) == 1 for n, t in itertools.product(["pad"], typos("pad")))
