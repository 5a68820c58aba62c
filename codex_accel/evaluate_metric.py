"""An `evaluate.Metric` of a local file.

Rule: it is read from where it lies, with the modules beside it; nothing is fetched, and nothing is copied elsewhere.
The library is imported only when a configuration asks for it.
"""

import hashlib
import importlib
import numbers
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from codex_accel.scoring import Metric, Text


def evaluate_metric(
    *,
    path: Annotated[str, Field(min_length=1)],
    config_name: str | None = None,
    compute: dict[str, Any] | None = None,
    references: Literal["one", "all"] = "one",
) -> Metric:
    """What `compute(predictions=, references=, **compute)` of the metric in a Python file gives, as `evaluate_<name>`.

    `path` is the file, or a folder with a file of its name (`wer/wer.py`). references = one hands over a text for each
    sample, all a list of texts. What is no number in the answer is left out and named in the facts. Its code runs in
    this process, as that of a plug-in does. Units are those of the metric.
    """
    file = Path(path).absolute()
    if file.is_dir():
        file = file / f"{file.name}.py"
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; metrics are not looked up on the Hub")
    import evaluate  # type: ignore[import-untyped]

    made = _class_in(file)(config_name=config_name, keep_in_memory=True, cache_dir=tempfile.gettempdir())
    _require_texts(made)
    dropped: set[str] = set()

    def whole(samples: Sequence[Text]) -> dict[str, float]:
        found = made.compute(
            predictions=[sample.prediction for sample in samples],
            references=[_references_of(sample, references) for sample in samples],
            **(compute or {}),
        )
        values = {f"evaluate_{name}": value for name, value in found.items() if isinstance(value, numbers.Real)}
        dropped.update(name for name in found if f"evaluate_{name}" not in values)
        if not values:
            raise TypeError(f"it gives no number, only {', '.join(map(repr, found)) or 'nothing'}")
        return {name: float(value) for name, value in values.items()}

    facts = {
        "evaluate": evaluate.__version__,
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    return Metric(whole=whole, facts=facts, facts_of=lambda *_: {"left_out": sorted(dropped)})


def _references_of(sample: Text, wanted: Literal["one", "all"]) -> str | list[str]:
    if wanted == "all":
        return list(sample.references)
    if len(sample.references) > 1:
        raise ValueError(f"a sample has {len(sample.references)} references and it is given one: say references = all")
    return sample.references[0]


def _class_in(file: Path) -> Any:
    """The one evaluate.Metric (or other EvaluationModule) that a file defines; the file may import its neighbours."""
    import evaluate

    name = "codex_evaluate_" + hashlib.sha256(str(file).encode() + file.read_bytes()).hexdigest()[:16]
    package = types.ModuleType(name)
    package.__path__ = [str(file.parent)]
    sys.modules[name] = package
    module = importlib.import_module(f"{name}.{file.stem}")
    found: list[Any] = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, evaluate.EvaluationModule)
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{file} defines {len(found)} evaluate.Metric classes, not one")
    if found[0]._download_and_prepare is not evaluate.EvaluationModule._download_and_prepare:
        raise TypeError(f"{found[0].__name__} wants to download files (_download_and_prepare), which is not supported")
    return found[0]


def _require_texts(made: Any) -> None:
    """Raises TypeError if its predictions are numbers or token lists."""
    features = made.features if isinstance(made.features, list) else [made.features]
    kinds = [getattr(each["predictions"], "dtype", "list") for each in features]
    if "string" not in kinds:
        raise TypeError(f"its predictions are {' or '.join(kinds)}, and ours are texts")
