"""Hostile files, and a run that is watched for anything that they might set off.

Rule: a payload is live: loaded by the unsafe function of its kind it makes a file of its own in the folder of canaries.
`main` is the script that `fork_server` starts: it watches the interpreter, then calls the real script's main.
"""

import importlib.util
import io
import json
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codex_accel import files, manifest

PACKAGE = str(Path(manifest.__file__).parent)
# Nothing of this has a place in a run: the one process of ours is provenance asking git about this checkout.
ALWAYS_FORBIDDEN = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn", "webbrowser.open", "urllib.Request",
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
}  # fmt: skip
OUR_PICKLES = {("pathlib", "PosixPath")}  # which the main process broadcasts to the others
HARMLESS_WRITES = ("/dev/", "/proc/self/")


# --- payloads -----------------------------------------------------------------------------------------------------


def code(canary: Path) -> str:
    """One line of Python that makes the file `canary`."""
    return f"open({str(canary)!r}, 'w').close()"


class Attack:
    """An object whose pickle runs `code`."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return exec, (code(self.canary),)


def pickled(canary: Path) -> bytes:
    """A plain pickle, as *.pkl files are."""
    return pickle.dumps(Attack(canary))


def torch_file(canary: Path, *, zipped: bool = True) -> bytes:
    """What `torch.save` writes, as a zip archive or in the older form."""
    import torch

    stream = io.BytesIO()
    value = {"state": {0: Attack(canary)}, "param_groups": [], "weight": torch.zeros(2)}
    torch.save(value, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def numbers(value: Any) -> Callable[[Path], bytes]:
    """Makes a file that `torch.load` takes, and that holds something else than the state of an optimizer."""

    def make(canary: Path) -> bytes:
        import torch

        stream = io.BytesIO()
        torch.save(value, stream)
        return stream.getvalue()

    return make


ADAPTER = {  # transformers loads it without a word, from wherever it says; PEFT imports what `megatron_core` names
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "/etc/evil",
    "r": 2,
    "target_modules": ["c_attn"],
    "megatron_config": {"a": 1},
    "megatron_core": "megatron.core.evil",
}


def _stream(table: Any) -> bytes:
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def arrow_of_other_columns(canary: Path) -> bytes:
    """A shard with a column of another type."""
    import pyarrow as pa

    return _stream(pa.table({"input_ids": ["text"], "target_spans": [1]}))


def arrow_of_a_pickled_extension(canary: Path) -> bytes:
    """A shard whose columns claim to be of a Python type, its pickle in the metadata, as pyarrow once unpickled."""
    import pyarrow as pa

    pickled_type = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickled(canary)}
    document = pa.table(
        [pa.array([[1, 2]], pa.list_(pa.uint16()))],
        schema=pa.schema([pa.field("input_ids", pa.list_(pa.uint16()), metadata=pickled_type)]),
    )
    return _stream(document)


def arrow_with_offsets_outside(canary: Path) -> bytes:
    """A shard of the right columns whose lists begin and end far outside of their values."""
    import numpy as np
    import pyarrow as pa

    from codex_accel import tokens

    schema = tokens.schema_for(512)
    columns = [[[1] * 5, [1] * 3], [[], []], [1, 1], [b"x" * 16] * 2]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
    data = _stream(pa.Table.from_arrays(arrays, schema=schema))
    right, wrong = (np.array(offsets, np.int32).tobytes() for offsets in ([0, 5, 8], [0, 1 << 30, (1 << 30) + 8]))
    assert data.count(right) == 1
    return data.replace(right, wrong)


# --- controls -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Control:
    """Loads a payload by the function that must never be used on it."""

    load: Callable[[Path, Path], Any]  # (a checkpoint folder to work in, canary)
    fires_as: str  # a word of the event that the watch notes


def _model(folder: Path, canary: Path, **changes: Any) -> None:
    """`folder` as a model with code beside it."""
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    (folder / "evil.py").write_text(f"{code(canary)}\nclass C: pass\n")


def _remote_config(folder: Path, canary: Path) -> None:
    from transformers import AutoConfig

    _model(folder, canary, model_type="evil", auto_map={"AutoConfig": "evil.C"})
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
    except (AttributeError, ValueError, TypeError):  # C is no configuration; what counts has run
        print("loaded no configuration")


def _custom_generate(folder: Path, canary: Path) -> None:
    from transformers import AutoModelForCausalLM

    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(f"{code(canary)}\ndef generate(model): pass\n")
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def _torch_load(folder: Path, canary: Path, *, zipped: bool) -> None:
    import torch

    (folder / "optimizer.bin").write_bytes(torch_file(canary, zipped=zipped))
    torch.load(folder / "optimizer.bin", weights_only=False)


def _custom_state(folder: Path, canary: Path) -> None:
    from accelerate import PartialState
    from accelerate.checkpointing import load_custom_state

    PartialState(cpu=True)

    class Anything:
        def load_state_dict(self, state: Any) -> None:
            print(state)

    import torch

    torch.save(Attack(canary), folder / "custom_checkpoint_0.pkl")
    load_custom_state(Anything(), str(folder), 0)


def _extension(folder: Path, canary: Path) -> None:
    import pyarrow as pa

    field = pa.ipc.open_stream(arrow_of_a_pickled_extension(canary)).schema.field("input_ids")
    pickle.loads(field.metadata[b"ARROW:extension:metadata"])


def _yaml(folder: Path, canary: Path) -> None:
    import yaml

    yaml.unsafe_load(f"!!python/object/apply:os.system ['touch {canary}']")


CONTROLS = {
    "pickle": Control(lambda folder, canary: pickle.loads(pickled(canary)), "pickle.find_class"),
    "torch file": Control(lambda folder, canary: _torch_load(folder, canary, zipped=True), "pickle.find_class"),
    "older torch file": Control(lambda folder, canary: _torch_load(folder, canary, zipped=False), "pickle.find_class"),
    "custom_checkpoint": Control(_custom_state, "pickle.find_class"),
    "auto_map": Control(_remote_config, "open"),
    "custom_generate": Control(_custom_generate, "open"),
    "pickled extension": Control(_extension, "pickle.find_class"),
    "YAML": Control(_yaml, "os.system"),
}


# --- forging ------------------------------------------------------------------------------------------------------


def forge(folder: Path, **changes: Any) -> None:
    """Make the manifest anew, so that every digest agrees with what lies in the folder now."""
    document = json.loads((folder / manifest.MANIFEST).read_bytes())
    was_payload = {each["name"] for each in document["resources"] if each["payload"]}
    names = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (manifest.MANIFEST, manifest.SUMS)
    ]
    document["resources"] = [
        {
            "name": name,
            "algorithm": "sha256",
            "digest": files.sha256_file(folder / name),
            "size": (folder / name).stat().st_size,
            "payload": name in was_payload,
        }
        for name in names
    ]
    document["content_digest"] = manifest.content_digest(document["resources"])
    document |= changes
    document["self_digest"] = manifest.self_digest(document)
    data = json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"
    (folder / manifest.MANIFEST).write_bytes(data)
    digests = {each["name"]: each["digest"] for each in document["resources"]}
    digests[manifest.MANIFEST] = files.sha256_bytes(data)
    (folder / manifest.SUMS).write_text("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)))


# --- the watched run ----------------------------------------------------------------------------------------------


def watch(log: Path, artefacts: Path, outputs: list[Path]) -> None:
    """Append to `log` a line for each event that has no place in a run on the hostile folder `artefacts`.

    What happens in the hook is kept small: an audit hook runs inside of every import, open and exec.
    """
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    below, writable = f"{artefacts}/", tuple(f"{path}" for path in outputs) + HARMLESS_WRITES

    def forbidden(event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "pickle.find_class":
            return arguments not in OUR_PICKLES
        if event == "exec":
            return str(getattr(arguments[0], "co_filename", "")).startswith(below)
        if event == "compile":
            return str(arguments[1]).startswith(below)
        if event == "import":
            return str(arguments[1]).startswith(below) or str(arguments[0]).startswith("megatron")
        if event in ("ctypes.dlopen", "sys.path_hook"):
            return str(arguments[0]).startswith(below)
        if event == "subprocess.Popen":
            return list(arguments[1][:3]) != ["git", "-C", PACKAGE]
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, str | bytes | os.PathLike) or not flags & (os.O_WRONLY | os.O_RDWR):
                return False
            absolute = os.path.abspath(os.fsdecode(path))
            return not absolute.startswith(writable) and "__pycache__" not in absolute
        return event in ALWAYS_FORBIDDEN

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if forbidden(event, arguments):
            os.write(descriptor, f"{event} {arguments!r:.300}\n".encode())

    sys.addaudithook(hook)


def main(argv: list[str]) -> int:
    """Run a script under watch: argv is a JSON object {script, log, artefacts, outputs}, then the script's own."""
    job = json.loads(argv[0])
    if job["control"]:
        watch(Path(job["log"]), Path(job["artefacts"]), [])
        CONTROLS[job["control"]].load(next(Path(job["artefacts"]).glob("run/checkpoints/step-*")), Path(job["canary"]))
        return 0
    spec = importlib.util.spec_from_file_location("watched", job["script"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    watch(Path(job["log"]), Path(job["artefacts"]), [Path(path) for path in job["outputs"]])
    return module.main(argv[1:])
