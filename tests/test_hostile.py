"""No code runs from a checkpoint, a tokenizer, a configuration or a dataset, whatever was put into it.

Each case makes one folder of a real chain hostile, starts a real script on it in a watched child, and asks three
things: no canary fired, no forbidden event, and the right exit code with a line that names the place. The controls load
the same payloads by the unsafe function of their kind and see them fire, so that a canary that cannot sing is found.

Not shown here, because it cannot be: that nothing changes a file between its check and its use. Who can write into a
folder while a script reads it is not held back by a digest.
"""

import dataclasses
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import hostile
import pytest
from conftest import ROOT, train_argv

from codex_accel import files, manifest

pytestmark = pytest.mark.security
Change = Callable[[Path, Path], None]  # what is done to a folder; the second is the canary to set off
STEP_3 = "run/checkpoints/step-000000003"
tried: list[str] = []  # cases that held


@dataclass(frozen=True)
class Case:
    """One hostile folder and what the script must say."""

    name: str
    stage: str  # key of STAGES
    change: Change
    says: str  # regular expression
    code: int = 2
    folder: str = STEP_3  # of the chain
    sealed: str = "anew"  # the manifest: anew (digests agree), kept, gone
    num_processes: int = 1
    slow: bool = False  # a variant of another one, for `make test-slow`


def slow(cases: Iterable[Case]) -> list[Case]:
    return [dataclasses.replace(case, slow=True) for case in cases]


@pytest.fixture(scope="module")
def calm(chain, tmp_path_factory) -> Path:
    """A chain whose run stands at step 3 of 4, with chat messages to prepare; copied for each case."""
    tree = tmp_path_factory.mktemp("calm") / "tree"
    shutil.copytree(chain, tree, symlinks=True, ignore=shutil.ignore_patterns("corpus", "final", "step-000000004"))
    (tree / "run" / "checkpoints" / "latest").unlink()
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    text = "".join(json.dumps({"messages": messages, "text": f"text {number}"}) + "\n" for number in range(4))
    (tree / "chat.jsonl").write_text(text)
    return tree


def _train(tree: Path, out: Path, *overrides: str) -> tuple[str, list[str]]:
    return "train", train_argv(tree, out, "evaluation.every_steps=null", *overrides)


def _start(tree: Path, out: Path) -> tuple[str, list[str]]:
    return _train(tree, out, "training.max_steps=1", "model.config=null", f"model.path={tree / STEP_3}")


def _prepare(tree: Path, out: Path, *, messages: bool = False) -> tuple[str, list[str]]:
    source = f"sources=[{{path: {tree}/chat.jsonl{', messages: messages' if messages else ''}}}]"
    split = "split={method: exact, ratios: {train: 1.0}}"
    return "prepare_data", [f"output_dir={out}", f"tokenizer={tree}/tokenizer", source, split]


# How each script is started on the chain in `tree`, to write to `out`.
STAGES: dict[str, Callable[[Path, Path], tuple[str, list[str]]]] = {
    "resume": lambda tree, out: _train(tree, tree / "run", "training.max_steps=4"),
    "resume unverified": lambda tree, out: _train(
        tree, tree / "run", "training.max_steps=4", f"resume={tree / STEP_3}", "verify=false"
    ),
    "branch": lambda tree, out: _train(tree, out, "training.max_steps=4", f"resume={tree / STEP_3}"),
    "start": _start,
    "train unverified": lambda tree, out: _train(tree, out, "training.max_steps=1", "verify=false"),
    "evaluate": lambda tree, out: (
        "evaluate",
        [f"checkpoint={tree / STEP_3}", f"dataset={tree}/dataset", f"output_dir={out}", "max_windows=4"],
    ),
    "generate": lambda tree, out: ("generate", [f"checkpoint={tree / STEP_3}", "prompt=def", "max_new_tokens=2"]),
    "prepare": _prepare,
    "prepare chat": lambda tree, out: _prepare(tree, out, messages=True),
    "encode": lambda tree, out: ("inspect_tokenizer", ["encode", "--tokenizer", f"{tree}/tokenizer", "--text", "x"]),
    "validate": lambda tree, out: (
        "inspect_tokenizer",
        ["validate", "--tokenizer", f"{tree}/tokenizer", f"file={{path: {tree}/chat.jsonl}}"],
    ),
    "vocabulary": lambda tree, out: (
        "train_tokenizer",
        [f"output_dir={out}", f"sources=[{{path: {tree}/chat.jsonl}}]", "vocab_size=300"],
    ),
    "verify": lambda tree, out: ("verify", [f"{tree / STEP_3}"]),
    "verify all": lambda tree, out: ("verify", [f"{tree / STEP_3}", "--recursive"]),
    "verify dataset": lambda tree, out: ("verify", [f"{tree}/dataset"]),
    "list datasets": lambda tree, out: (
        "prepare_data",
        [f"output_dir={tree}/x", "list=true", *_prepare(tree, out)[1][1:]],
    ),
    "configured": lambda tree, out: ("train", ["--config", f"{tree}/train.yaml"]),
}


def watched(fork_server, script: str, argv: list[str], root: Path, *, num_processes: int = 1, control: str = ""):
    """Run a script on the hostile folders below `root`/tree; returns the job and the forbidden events."""
    log = root / "events.log"
    job = {
        "script": str(ROOT / "scripts" / f"{script}.py"),
        "control": control,
        "canary": str(root / "canary"),
        "log": str(log),
        "artefacts": str(root / "tree"),
        "outputs": [str(root / "out"), str(root / ".tmp-"), str(root / ".partial-"), str(root / "tree" / "run")],
    }
    done = fork_server.run(Path(hostile.__file__), [json.dumps(job), *argv], num_processes=num_processes, timeout_s=30)
    return done, log.read_text() if log.exists() else ""


# --- changes ------------------------------------------------------------------------------------------------------


def put(name: str, make: Callable[[Path], bytes], *, instead_of: str | None = None) -> Change:
    def change(folder: Path, canary: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(make(canary))
        if instead_of:
            (folder / instead_of).unlink()

    return change


def text(name: str, content: str | bytes) -> Change:
    data = content if isinstance(content, bytes) else content.encode()
    return put(name, lambda canary: data)


def merged(name: str, **keys) -> Change:
    """A JSON file with these keys over its own."""

    def change(folder: Path, canary: Path) -> None:
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_bytes()), **keys}))

    return change


def together(*changes: Change) -> Change:
    def change(folder: Path, canary: Path) -> None:
        for each in changes:
            each(folder, canary)

    return change


def removed(name: str) -> Change:
    return lambda folder, canary: (folder / name).unlink()


def replaced(name: str, make: Callable[[Path], None]) -> Change:
    """Something that is no plain file in the place of `name`."""

    def change(folder: Path, canary: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        before = os.getcwd()
        os.chdir(path.parent)  # the name of a socket is short
        server.bind(path.name)
        os.chdir(before)


def a_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("device nodes cannot be made here")


def manifested(**changes) -> Change:
    """A manifest that says something else, with digests that agree."""

    def change(folder: Path, canary: Path) -> None:
        document = json.loads((folder / manifest.MANIFEST).read_bytes())
        values = {key: value(document) if callable(value) else value for key, value in changes.items()}
        hostile.forge(folder, **values)

    return change


def named(name: str) -> Change:
    """A manifest that vouches for a file of this name."""
    digest = files.sha256_bytes(b"")
    entry = {"name": name, "algorithm": "sha256", "digest": digest, "size": 0, "payload": True}
    return manifested(resources=lambda document: [*document["resources"], entry])


def with_parent(**record) -> Change:
    base = {"kind": "dataset", "manifest_digest": "0" * 64, "content_digest": "0" * 64}
    return manifested(parents=[{**base, **record}])


REMOTE = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": "evil.T"}}


def as_code(canary: Path) -> bytes:
    return hostile.code(canary).encode()


evil_py = put("evil.py", as_code)
LOADABLE = ["scaler.pt", "scheduler.bin", "sampler.bin", "dl_state_dict.bin", "pytorch_model.bin", "weights.pth"]
DEEP = "[" * 100_000 + "]" * 100_000


def trainer_state(**keys) -> Change:
    return merged("trainer_state.json", **keys)


def chat_template(source: str) -> Change:
    """A template that renders messages as ChatML does, with this before."""
    chatml = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    return put("chat_template.jinja", lambda canary: (source.replace("CANARY", str(canary)) + chatml).encode())


def configuration(text_: str) -> Change:
    return put("train.yaml", lambda canary: text_.replace("CANARY", str(canary)).encode())


# --- cases --------------------------------------------------------------------------------------------------------

CHECKPOINT = [
    Case("optimizer.bin is evil", "resume", put("optimizer.bin", hostile.torch_file), "optimizer.bin"),
    Case(
        "optimizer.bin is evil, nothing verified",
        "resume unverified",
        put("optimizer.bin", hostile.torch_file),
        "optimizer.bin",
        sealed="kept",
    ),
    Case(
        "optimizer.bin is evil on two processes",
        "resume",
        put("optimizer.bin", hostile.torch_file),
        "optimizer.bin",
        num_processes=2,
    ),
    Case(
        "weights are pytorch_model.bin",
        "resume",
        put("pytorch_model.bin", hostile.torch_file, instead_of="model.safetensors"),
        "model.safetensors",
    ),
    Case(
        "custom_checkpoint_0.pkl, nothing verified",
        "resume unverified",
        put("custom_checkpoint_0.pkl", hostile.pickled),
        "custom_checkpoint_0.pkl: is a pickle",
        sealed="kept",
    ),
    Case(
        "files of states that the run has not, on two processes",
        "resume",
        together(*(put(name, hostile.torch_file) for name in LOADABLE)),
        "done     4 steps",
        code=0,
        num_processes=2,
    ),
    *slow(
        [
            *(
                Case(f"{name}, listed", "resume", put(name, hostile.pickled), rf"{name}: is a pickle")
                for name in ("random_states_0.pkl", "custom_checkpoint_0.pkl", "custom_checkpoint_9.pkl")
            ),
            *(
                Case(f"optimizer.bin {name}", "resume", put("optimizer.bin", make), "optimizer.bin")
                for name, make in {
                    "is a pickle": hostile.pickled,
                    "is an evil older file": lambda canary: hostile.torch_file(canary, zipped=False),
                    "is empty": lambda canary: b"",
                    "holds a list": hostile.numbers([1, 2, 3]),
                    "holds nothing": hostile.numbers({"state": None, "param_groups": None}),
                }.items()
            ),
            Case("no optimizer.bin", "resume", removed("optimizer.bin"), "optimizer.bin"),
            Case("optimizer.bin of another run", "branch", put("optimizer.bin", hostile.torch_file), "optimizer.bin"),
            Case("weights are a pickle", "resume", put("model.safetensors", hostile.pickled), "model.safetensors"),
            Case(
                "files of states that the run has not",
                "resume",
                together(*(put(name, hostile.torch_file) for name in LOADABLE)),
                "done     4 steps",
                code=0,
            ),
            Case(
                "random_states of two processes",
                "resume",
                together(put("random_states_0.pkl", hostile.pickled), put("random_states_1.pkl", hostile.pickled)),
                "random_states_0.pkl: is a pickle",
                num_processes=2,
            ),
            Case("code beside", "resume", together(evil_py, put("sub/evil.py", as_code)), "done", 0),
        ]
    ),
]

UNLISTED = [
    Case(f"unlisted {name!r}", "verify", put(name, hostile.pickled), "is not listed|name", code=1, sealed="kept")
    for name in [
        *LOADABLE,
        "model.safetensors.index.json",
        "adapter_config.json",
        "custom_generate/generate.py",
        "evil.py",
        "evil.so",
        "pytorch_model_fsdp_0/.metadata",
        ".metadata",
        ".hidden/evil.py",
        "Optimizer.bin",
        "optimizer.b\u0456n",  # a Cyrillic letter
        "OPTIMIZER.BIN",
        "model.safetensors\n",
        "model.safetensors ",
        "x\ny.bin",
        os.fsdecode(b"\xff.bin"),
    ]
] + [
    Case(
        "unlisted at resume",
        "resume",
        put("scaler.pt", hostile.torch_file),
        r"scaler.pt: is not listed",
        2,
        sealed="kept",
    ),
    Case(
        "name not in UTF-8 at resume",
        "resume",
        put(os.fsdecode(b"\xff.bin"), hostile.torch_file),
        r"udcff\.bin': is no name in UTF-8",
        sealed="kept",
    ),
]

STATES = [
    Case(f"trainer_state.json: {name}", "resume", change, r"trainer_state\.json")
    for name, change in {
        "huge step": trainer_state(step=10**30),
        "negative step": trainer_state(step=-1),
        "step is NaN": trainer_state(step=float("nan")),
        "step is text": trainer_state(step="3"),
        "elapsed is null": trainer_state(elapsed_s=None),
        "negative metrics_bytes": trainer_state(metrics_bytes=-1),
        "a class": trainer_state(**{"__class__": "os.system", "__init__": {"__globals__": 1}}),
        "unknown key": trainer_state(evil=1),
        "deep": text("trainer_state.json", DEEP),
        "a list": text("trainer_state.json", "[]"),
        "5,000 digits": text("trainer_state.json", '{"step": ' + "9" * 5000 + "}"),
        "not UTF-8": text("trainer_state.json", b"\xff\xfe"),
        "no identity": text("trainer_state.json", '{"step": 3}'),
        "identity is a list": trainer_state(identity=[]),
    }.items()
] + [
    Case("no trainer_state.json", "resume", removed("trainer_state.json"), r"trainer_state\.json"),
    Case("facts without a step", "resume", manifested(facts={}), "done", 0, sealed="kept"),
    Case("facts without a step, of another run", "branch", manifested(facts={}), r"manifest\.json", sealed="kept"),
]

CONFIGS = {
    "auto_map beside a known model": (merged("config.json", **REMOTE), "", 0),
    "auto_map of an unknown model": (merged("config.json", model_type="evil", **REMOTE), "cannot be loaded", 2),
    "auto_map of a repository": (
        merged("config.json", model_type="evil", auto_map={"AutoConfig": "evil/repo--evil.C"}),
        "cannot be loaded",
        2,
    ),
    "_name_or_path elsewhere": (merged("config.json", _name_or_path="/etc/evil"), "", 0),
    "config.json: attention from a kernel": (
        merged("config.json", _attn_implementation="evil/kernel"),
        r"config\.json': _attn_implementation",
        2,
    ),
    "config.json: kernel in a part": (
        merged("config.json", text_config={"parts": [{"_experts_implementation": {"a": "evil/kernel"}}]}),
        r"config\.json': _experts_implementation",
        2,
    ),
    "config.json: deep": (text("config.json", DEEP), r"config\.json': is not JSON", 2),
    "config.json: a list": (text("config.json", "[]"), "cannot be loaded", 2),
    "config.json: not UTF-8": (text("config.json", b"\xff"), r"config\.json': is not JSON", 2),
    "config.json: wrong types": (merged("config.json", n_layer="2", n_embd=None), "cannot be loaded", 2),
    "config.json: no heads": (merged("config.json", n_head=0), "cannot be loaded", 2),
    "config.json: model_type is a list": (merged("config.json", model_type=["gpt2"]), "cannot be loaded", 2),
    "config.json: quantized": (
        merged("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "cannot be loaded",
        2,
    ),
    "config.json: huge": (merged("config.json", n_embd=2**40), "cannot be loaded|do not fit", 2),
    "generation_config.json: odd keys": (
        text(
            "generation_config.json", json.dumps({"custom_generate": "evil.py", "trust_remote_code": True, "evil": 1})
        ),
        "",
        0,
    ),
    "generation_config.json: a class": (
        text("generation_config.json", json.dumps({"__class__": 1})),
        "cannot be loaded",
        2,
    ),
    "custom_generate": (put("custom_generate/generate.py", as_code), "", 0),
    "weights by an index outside": (
        together(
            lambda folder, canary: (folder / "model.safetensors").rename(folder.parent / "outside.safetensors"),
            put("other.safetensors", hostile.pickled),
            text(
                "model.safetensors.index.json",
                json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": "../outside.safetensors"}}),
            ),
        ),
        "outside.safetensors",
        2,
    ),
    "weights by an index to a pickle": (
        together(
            removed("model.safetensors"),
            put("evil.bin", hostile.torch_file),
            put("other.safetensors", hostile.pickled),
            text(
                "model.safetensors.index.json",
                json.dumps({"metadata": {}, "weight_map": {"transformer.wte.weight": "evil.bin"}}),
            ),
        ),
        "evil.bin",
        2,
    ),
    "an adapter": (
        put("adapter_config.json", lambda c: json.dumps(hostile.ADAPTER).encode()),
        "adapter_config.json",
        2,
    ),
}
MODELS = (
    [
        Case(f"{name}, {stage}", stage, together(change, evil_py), says, code, sealed=sealed)
        for name, (change, says, code) in CONFIGS.items()
        for stage, sealed in (("generate", "gone"),)
    ]
    + [
        Case(
            f"auto_map, {stage}",
            stage,
            together(CONFIGS["auto_map of an unknown model"][0], evil_py),
            "cannot be loaded",
        )
        for stage in ("start", "evaluate")
    ]
    + [
        Case(f"an adapter, {stage}", stage, CONFIGS["an adapter"][0], "adapter_config.json")
        for stage in ("start", "evaluate")
    ]
    + [
        Case("weights are a pickle", "generate", put("model.safetensors", hostile.pickled), "cannot be loaded"),
        Case(
            "weights are pytorch_model.bin, generate",
            "generate",
            put("pytorch_model.bin", hostile.torch_file, instead_of="model.safetensors"),
            "Pickled weights are not loaded",
            sealed="gone",
        ),
    ]
)

ESCAPES = {
    "globals": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "subclasses": "{% for c in ''.__class__.__mro__[1].__subclasses__() %}{% if c.__name__ == 'Popen' %}"
    "{{ c(['touch', 'CANARY']).wait() }}{% endif %}{% endfor %}",
    "self": "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w').close() }}",
    "attr": "{{ (cycler|attr('__init__')|attr('__globals__'))['os'].system('touch CANARY') }}",
    "map": "{{ ([cycler]|map(attribute='__init__.__globals__.os')|first).system('touch CANARY') }}",
    "namespace": "{{ namespace.__init__.__globals__.__builtins__.open('CANARY', 'w').close() }}",
}
TOKENIZER = (
    [
        Case(
            "tokenizer_config.json with code",
            stage,
            together(
                merged(
                    "tokenizer_config.json",
                    tokenizer_class="EvilTokenizer",
                    auto_map={"AutoTokenizer": ["evil.T", None]},
                ),
                evil_py,
            ),
            "",
            0,
            folder="tokenizer",
        )
        for stage in ("encode", "prepare")
    ]
    + [
        Case(f"{name}, {stage}", stage, change, says, folder="tokenizer", sealed="gone")
        for stage, name, change, says in [
            ("encode", "tokenizer.json: deep", text("tokenizer.json", DEEP), "tokenizer.json"),
            ("encode", "tokenizer.json: a pickle", put("tokenizer.json", hostile.pickled), "tokenizer.json"),
            ("encode", "tokenizer.json: a list", text("tokenizer.json", "[]"), "tokenizer.json"),
            ("validate", "tokenizer.json: null", text("tokenizer.json", "null"), "tokenizer.json"),
            (
                "encode",
                "tokenizer.json: bad pattern",
                merged(
                    "tokenizer.json",
                    pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
                ),
                "tokenizer.json",
            ),
            ("encode", "tokenizer_config.json: deep", text("tokenizer_config.json", DEEP), "tokenizer_config.json"),
            ("encode", "tokenizer_config.json: a number", text("tokenizer_config.json", "3"), "tokenizer_config.json"),
            (
                "encode",
                "tokenizer_config.json: not UTF-8",
                text("tokenizer_config.json", b"\xff"),
                "tokenizer_config.json",
            ),
            (
                "encode",
                "tokenizer.model: a pickle",
                put("tokenizer.model", hostile.pickled, instead_of="tokenizer.json"),
                "tokenizer.model",
            ),
        ]
    ]
    + [
        Case(f"chat template: {name}", "prepare chat", chat_template(source), "chat template", folder="tokenizer")
        for name, source in {
            **ESCAPES,
            "memory": "{{ ('x' * 10**14)|length }}",
            "long range": "{% for i in range(10**12) %}{% endfor %}",
            "endless": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        }.items()
    ]
)

FORBIDDEN_NAMES = ["../evil", "/etc/passwd", "a/../../evil", "a\\b", "a\nb", "", ".", "./optimizer.bin"]
DATASET = [
    *(
        Case(
            f"listed name {name!r}",
            "verify dataset",
            named(name),
            "unsafe name|SHA256SUMS",
            1,
            "dataset",
            sealed="kept",
        )
        for name in FORBIDDEN_NAMES
    ),
    Case(
        "listed name '../evil' in training",
        "resume",
        named("../evil"),
        "unsafe name|SHA256SUMS",
        folder="dataset",
        sealed="kept",
    ),
    *(
        Case(f"{kind} named {name}", stage, replaced(name, make), re.escape(name), code, "dataset", sealed="kept")
        for name, kind, make, stage, code in [
            ("train-00000.arrow", "pipe", os.mkfifo, "verify dataset", 1),
            ("train-00000.arrow", "pipe", os.mkfifo, "resume", 2),
            ("train-00000.arrow", "pipe", os.mkfifo, "train unverified", 2),
            ("train-00000.arrow", "device", a_device, "verify dataset", 1),
            ("train-00000.arrow", "socket", a_socket, "verify dataset", 1),
            ("manifest.json", "pipe", os.mkfifo, "verify dataset", 2),
            ("manifest.json", "pipe", os.mkfifo, "resume", 2),
            ("SHA256SUMS", "pipe", os.mkfifo, "verify dataset", 1),
            ("notes.md", "pipe", os.mkfifo, "verify dataset", 1),
            ("train-00000.arrow", "link", lambda path: path.symlink_to("/etc/passwd"), "verify dataset", 1),
            ("train-00000.arrow", "link", lambda path: path.symlink_to("/etc/passwd"), "train unverified", 2),
            ("sub", "linked folder", lambda path: path.symlink_to("/etc"), "verify dataset", 1),
            ("train-00000.arrow", "loop", lambda path: path.symlink_to(path.name), "verify dataset", 1),
        ]
    ),
    Case(
        "pipe named manifest.json beside",
        "list datasets",
        replaced("manifest.json", os.mkfifo),
        "no prepared",
        0,
        "dataset",
        sealed="kept",
    ),
    *(
        Case(f"shard: {name}", "resume", put("train-00000.arrow", make), r"train-00000\.arrow", folder="dataset")
        for name, make in {
            "a pickle": hostile.pickled,
            "empty": lambda canary: b"",
            "other columns": hostile.arrow_of_other_columns,
            "pickled extension": hostile.arrow_of_a_pickled_extension,
            "offsets outside": hostile.arrow_with_offsets_outside,
        }.items()
    ),
    Case("dataset_info.json", "resume", put("dataset_info.json", hostile.pickled), "done", 0, "dataset"),
    Case("a loading script", "resume", put("dataset.py", as_code), "done", 0, "dataset"),
    *(
        Case(f"parents: {name}", "resume", change, "manifest.json|dataset", folder="dataset", sealed="kept")
        for name, change in {
            "none": manifested(parents=[]),
            "a number": manifested(parents=3),
            "of numbers": manifested(parents=[3]),
            "without a path": manifested(parents=[{"kind": "tokenizer"}]),
            "path to /etc": with_parent(kind="unverified", path="../../../../../../../../etc"),
            "path to the root": with_parent(kind="tokenizer", path="/"),
            "path to itself": with_parent(kind="dataset", path="."),
            "path with a zero byte": with_parent(path="a\0b"),
        }.items()
    ),
    *(
        Case(f"verify, parents: {name}", "verify all", change, "problem", 1, sealed="kept")
        for name, change in {
            "path to /etc": with_parent(kind="unverified", path="../../../../../../../../etc"),
            "path to the root": with_parent(kind="unverified", path="/"),
            "path to itself": with_parent(path="."),
            "path with a zero byte": with_parent(path="a\0b"),
            "source is a device": manifested(sources=[{"path": "/dev/zero", "sha256": "0" * 64, "size": 1}]),
            "source is endless": manifested(sources=[{"path": "/proc/kcore", "sha256": "0" * 64, "size": 1}]),
        }.items()
    ),
]

CONFIGURED = [
    Case(f"config: {name}", "configured", configuration(text_), r"train\.yaml", folder=".", sealed="kept")
    for name, text_ in {
        "apply": "output_dir: !!python/object/apply:os.system ['touch CANARY']\n",
        "new": "seed: !!python/object/new:subprocess.Popen [['touch', 'CANARY']]\n",
        "name": "seed: !!python/name:os.system\n",
        "module": "seed: !!python/module:antigravity\n",
        "own tag": "seed: !evil x\n",
        "deep": "seed: " + "[" * 5_000 + "\n",
        "bomb": "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    }.items()
]

QUICK = (  # of the groups whose cases differ little, those that are tried in the suite
    r"json: (huge step|a class|deep|5,000 digits)$|, of another run$|auto_map (of an|beside)|kernel$|quantized|"
    r"custom_gen|by an index|an adapter, generate|globals|subclasses|memory|pipe|link|listed name|offsets|extension|"
    r"parents: (none|path to /etc)"
)
OFTEN = [
    case
    if re.search(QUICK, case.name)
    or not case.stage.startswith(("resume", "start", "evaluate", "generate", "prepare", "branch", "train"))
    else dataclasses.replace(case, slow=True)
    for case in [*STATES, *MODELS, *TOKENIZER, *DATASET]
]
CASES = [*CHECKPOINT, *UNLISTED, *OFTEN, *CONFIGURED]


def _id(case: Case) -> str:
    return re.sub(r"[^A-Za-z0-9_.,:'-]+", " ", ascii(f"{case.stage}: {case.name}"))


def _param(case: Case):
    marks = [pytest.mark.slow] * case.slow + [pytest.mark.distributed] * (case.num_processes > 1)
    return pytest.param(case, id=_id(case), marks=marks)


@pytest.mark.parametrize("case", [_param(case) for case in CASES])
def test_nothing_runs_and_the_place_is_told(case, calm, fork_server, tmp_path):
    shutil.copytree(calm, tmp_path / "tree", symlinks=True)
    folder = tmp_path / "tree" / case.folder
    case.change(folder, tmp_path / "canary")
    if case.sealed == "anew":
        hostile.forge(folder)
    elif case.sealed == "gone":
        (folder / manifest.MANIFEST).unlink()
    script, argv = STAGES[case.stage](tmp_path / "tree", tmp_path / "out")
    job, events = watched(fork_server, script, argv, tmp_path, num_processes=case.num_processes)
    assert not (tmp_path / "canary").exists(), f"the canary fired\n{job.output}"
    assert not events, f"forbidden:\n{events}\n{job.output}"
    assert "Traceback" not in job.output, job.output
    assert job.codes == [case.code] * case.num_processes, job.output
    assert re.search(case.says, job.output), job.output
    tried.append(_id(case))


@pytest.mark.parametrize("kind", hostile.CONTROLS)
def test_canary_fires_where_a_file_is_loaded_carelessly(kind, calm, fork_server, tmp_path):
    """The control: the same payload by the unsafe function, in a child; the watch notes it too."""
    shutil.copytree(calm, tmp_path / "tree", symlinks=True)
    job, events = watched(fork_server, "verify", [], tmp_path, control=kind)
    assert job.codes == [0], job.output
    assert hostile.CONTROLS[kind].fires_as in events, f"the watch saw: {events}\n{job.output}"
    assert (tmp_path / "canary").exists(), job.output


@pytest.mark.parametrize("name", ESCAPES)
def test_escape_of_a_template_works_outside_of_the_sandbox(name, tmp_path):
    import jinja2

    source = ESCAPES[name].replace("CANARY", str(tmp_path / "canary"))
    jinja2.Environment().from_string(source).render()
    assert (tmp_path / "canary").exists()


def test_number_of_canaries_is_told():
    """For docs/reliability.md: `pytest tests/test_hostile.py -s`, with and without `-m "not slow"`."""
    if not tried:
        pytest.skip("none of the cases was asked for")
    print(f"\n0 of {len(tried)} fired; {len(hostile.CONTROLS) + len(ESCAPES)} controls did")
    assert len(tried) == len(set(tried)) <= len(CASES)
