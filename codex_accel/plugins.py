"""Functions that installed packages add to a registry, by entry points.

Rule: a name means one function. Two plug-ins of one name, or one named as a built-in, are an error that names them with
distribution and version; so is one that cannot be imported. Only what a configuration asks for is imported.
"""

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import pydantic

import codex_accel
from codex_accel import redaction
from codex_accel.config import StageConfig, did_you_mean
from codex_accel.errors import UserError
from codex_accel.preemption import Preempted
from codex_accel.train_schema import TrainConfig

CALLBACKS, OPTIMIZERS = "codex_accel.callbacks", "codex_accel.optimizers"  # groups of entry points
METRICS = "codex_accel.metrics"
KIND = {CALLBACKS: "callback", OPTIMIZERS: "optimizer", METRICS: "metric"}


def find(
    group: str, builtin: Mapping[str, Callable[..., Any]], name: str, *, config: StageConfig, key: str
) -> Callable[..., Any]:
    """The function called `name`, out of `builtin` or of the plug-ins of `group`; `key` is where the name was written.

    Raises: UserError for an unknown name, for any name that means two functions, and for a plug-in that fails.
    """
    plugins = _installed(group, builtin, config=config, key=key)
    if name in builtin:
        return builtin[name]
    if name not in plugins:
        what = f"no such {KIND[group]}: '{name}'. {did_you_mean(name, [*builtin, *sorted(plugins)])}"
        raise UserError(config.problem(key, what))
    with blaming(group, name, f"cannot be imported from {plugins[name].value}", config=config, key=key):
        function = plugins[name].load()
        if not callable(function):
            raise TypeError(f"it is {type(function).__name__}, not a function")
    return function


def _installed(
    group: str, builtin: Mapping[str, Callable[..., Any]], *, config: StageConfig, key: str
) -> dict[str, EntryPoint]:
    """The plug-ins by name. Raises UserError with all names that are taken twice."""
    found: dict[str, EntryPoint] = {}
    problems = []
    for plugin in entry_points(group=group):
        what = ""
        if plugin.name in builtin:
            what = f"the plug-in {_title(plugin)} has the name of a built-in {KIND[group]}."
        elif plugin.name in found:
            what = f"two plug-ins have one name: {_title(found[plugin.name])} and {_title(plugin)}."
        if what:
            problems.append(config.problem(key, f"{what} Run: pip uninstall {_distribution(plugin)[0]}"))
        found[plugin.name] = plugin
    if problems:
        raise UserError(*problems)
    return found


def used(config: TrainConfig) -> list[dict[str, str]]:
    """The plug-ins that a run asks for, for its record: group, name, distribution and version of each."""
    asked = {OPTIMIZERS: [config.optimizer.name], CALLBACKS: list(config.callbacks)}
    return [
        {"group": group, "name": plugin.name} | described(group, plugin.name)
        for group, names in asked.items()
        for plugin in entry_points(group=group)
        if plugin.name in names
    ]


def described(group: str, name: str) -> dict[str, str]:
    """Distribution and version of the plug-in called `name`; nothing for a built-in."""
    return next(
        (
            dict(zip(("distribution", "version"), _distribution(plugin), strict=True))
            for plugin in entry_points(group=group, name=name)
        ),
        {},
    )


def _distribution(plugin: EntryPoint) -> tuple[str, str]:
    """(name, version) of the package that brought it; a broken install may lack either."""
    found = plugin.dist
    return (found.metadata["Name"] or "unknown", found.metadata["Version"] or "unknown") if found else ("unknown",) * 2


def _title(plugin: EntryPoint) -> str:
    return f"'{plugin.name}' of {' '.join(_distribution(plugin))}"


# --- what a plug-in does wrong --------------------------------------------------------------------------------------


@contextlib.contextmanager
def blaming(group: str, name: str, failed: str, *, config: StageConfig, key: str) -> Iterator[None]:
    """Turn what the block raises into a UserError that names the function, its distribution, the error and its place.

    A UserError is a line for the user already; it and `Preempted` pass.
    """
    try:
        yield
    except (UserError, Preempted):
        raise
    except (Exception, SystemExit) as error:
        title = next(
            map(_title, entry_points(group=group, name=name)), f"'{name}' of codex-accel {codex_accel.__version__}"
        )
        words = redaction.words(error)
        what = f"the {KIND[group]} {title} {failed}: {type(error).__name__}: {words}{_place(error)}."
        what += " Mend it, or take it out of the configuration."
        raise UserError(config.problem(key, what)) from error


def _place(error: BaseException) -> str:
    """File and line of the innermost call outside of this package and of Python's import machinery, in brackets."""
    places = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    ours = Path(__file__).parent
    others = [(p, n) for p, n in places if p.parent != ours and "importlib" not in str(p)]
    return f" ({others[-1][0].name}, line {others[-1][1]})" if others else ""


def settings(
    function: Callable[..., Any], given: Mapping[str, Any], *, config: StageConfig, key: str
) -> dict[str, Any]:
    """`given`, checked against the keyword-only arguments of `function`: their names, annotations and defaults.

    Types are strict, as in the configuration; `Annotated[int, pydantic.Field(ge=1)]` gives a range.

    Raises: UserError with all unknown keys, missing ones and wrong values, below the dotted `key`.
    """
    arguments = inspect.signature(function).parameters.values()
    known = {argument.name: argument for argument in arguments if argument.kind is argument.KEYWORD_ONLY}
    takes_any = any(argument.kind is argument.VAR_KEYWORD for argument in arguments)
    checked, problems = {}, []
    for name, value in given.items():
        if name not in known and not takes_any:
            hint = did_you_mean(name, known) if known else "It takes no settings."
            problems.append(config.problem(f"{key}.{name}", f"unknown key. {hint}"))
            continue
        wanted = known[name].annotation if name in known else Any
        if isinstance(wanted, str):  # of `from __future__ import annotations`
            wanted = eval(wanted, getattr(inspect.unwrap(function), "__globals__", {}))
        try:
            wanted = Any if wanted is inspect.Parameter.empty else wanted
            checked[name] = pydantic.TypeAdapter(wanted).validate_python(value, strict=True)
        except pydantic.ValidationError as error:
            reason = error.errors(include_url=False)[0]["msg"].removeprefix("Input ")
            problems.append(config.problem(f"{key}.{name}", f"{redaction.words(repr(value), 80)}: {reason}."))
    for name, argument in known.items():
        if name not in given and argument.default is argument.empty:
            problems.append(config.problem(f"{key}.{name}", "required and not given. Add it."))
    if problems:
        raise UserError(*problems)
    return checked
