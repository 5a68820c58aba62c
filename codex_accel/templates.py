"""Jinja templates and expressions over a record's fields.

Rule: what they make is a function of the record, text of a record never becomes template code, and a reason why one
fails repeats no data.
"""

import datetime
import decimal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from codex_accel import reasons
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import EvaluateConfig, Task

PRINTABLE = (str, int, float, decimal.Decimal, datetime.date, datetime.time, datetime.timedelta)


@dataclass(frozen=True)
class Template:
    """A template or expression of a task."""

    name: str
    fields: frozenset[str]
    make: Callable[[Mapping[str, Any]], Any]

    def __call__(self, record: Mapping[str, Any]) -> Any:
        """What it makes of a record. Raises ValueError, with a reason without data."""
        from jinja2 import StrictUndefined, TemplateError
        from jinja2.exceptions import UndefinedError

        try:
            value = self.make(record)
            if isinstance(value, StrictUndefined):
                raise UndefinedError
        except UndefinedError:
            missing = sorted(self.fields - set(record))
            names = f"no field {missing[0]!r}" if missing else f"a part of a field that {self.name} names is missing"
            raise ValueError(f"{names}: there are {reasons.names(list(record))}") from None
        except _Unprintable as error:
            raise ValueError(f"the template of {self.name} prints {error}") from None
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError,
                MemoryError) as error:  # fmt: skip
            raise ValueError(f"the template of {self.name} fails: {type(error).__name__}") from None
        return value


def of_task(task: Task, *, config: EvaluateConfig, key: str) -> dict[str, Template]:
    """Those of a task, by name; `key` is where it stands. Raises UserError with all that are none."""
    from jinja2 import TemplateSyntaxError, meta

    environment = _environment()
    found: dict[str, Template] = {}
    problems: list[str] = []
    for name in ("prompt", "target", "references", "weight", "choices"):
        if (source := getattr(task, name)) is None:
            continue
        is_text = name in ("prompt", "target")
        try:
            fields = meta.find_undeclared_variables(environment.parse(source if is_text else f"{{{{ {source} }}}}"))
            if is_text:
                make = environment.from_string(source).render
            else:
                make = environment.compile_expression(source, undefined_to_none=False)
            found[name] = Template(name, frozenset(fields), make)
        except TemplateSyntaxError as error:
            what = f"is no Jinja {'template' if is_text else 'expression'}: {str(error.message).rstrip('.')}. Mend it."
            problems.append(config.problem(f"{key}.{name}", what))
    if problems:
        raise UserError(*problems)
    return found


class _Unprintable(Exception):
    """A value that is no text, in the place of one."""


def _printed(value: Any) -> Any:
    """`value`, if it is text or a number: what Python writes for a null, a list or a function is meant by nobody."""
    from jinja2 import Undefined

    if isinstance(value, (*PRINTABLE, Undefined)):
        return value
    raise _Unprintable("a null" if value is None else f"a {type(value).__name__}, which is no text")


def _environment() -> Any:
    """Where templates are made: a sandbox, in which the same record gives the same text."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=_printed)
    del made.filters["random"], made.globals["lipsum"]
    return made
