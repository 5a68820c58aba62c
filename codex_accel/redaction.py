"""The filter between a stage and all that it writes: files, logs, trackers, the console, tracebacks.

Rule: one policy holds for a process from its first line to its last. What is written goes through `text` or `value`,
what a model writes through `text_stream`, and what libraries print through `watch_console`. A bypass needs a reason,
which is printed, logged and recorded in every manifest. Names of files and digests stay: they lead to what they name.
"""

import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codex_accel.config import Safety
from codex_accel.errors import UserError

if TYPE_CHECKING:  # --help needs neither the families nor RE2
    from codex_accel.policy import Policy

BYPASS = "DISABLE_SECRET_FILTER"
MOST_BEGUN = 1 << 16  # characters of a line that wait for its end
_in_force: dict[str, Any] = {"rules": None, "reason": None}  # of a policy file, and of a bypass


# --- what holds ------------------------------------------------------------------------------------------------------


def enforce(safety: Safety) -> None:
    """Let this configuration hold for the process, in place of the built-in policy that holds before.

    Raises: UserError for a policy file that cannot be used, and for a bypass that is asked for without a reason.
    """
    reason = bypass_reason(safety.bypass_reason)
    rules = None
    if safety.policy is not None:
        from codex_accel import policy

        if not (path := Path(safety.policy)).is_file():
            raise UserError(f"safety.policy = '{path}': is no file. Give a YAML file of rules, see docs/safety.md.")
        rules = policy.load(path)
        if not rules.has_secrets and reason is None:
            what = "says secrets: false, and masking is off for a stated reason only"
            raise UserError(f"safety.policy = '{path}': {what}. Remove that line, or give safety.bypass_reason.")
    _in_force.update(rules=rules, reason=reason)


def bypass_reason(reason: str | None, *, environment: Mapping[str, str] = os.environ) -> str | None:
    """Why secrets are not masked in this run, or None if they are; `reason` is the configuration's, if it gives one.

    Raises: UserError if the environment asks for a bypass without a reason, or in words that are not known.
    """
    asked = environment.get(BYPASS, "")
    if asked not in ("", "0", "1"):
        raise UserError(f"environment: {BYPASS}={asked[:20]!r}: is neither 0 nor 1. Unset it, or give 1 and a reason.")
    given = (reason or "").strip()
    if reason is not None and not given:
        raise UserError("safety.bypass_reason: is empty. Say in a few words why secrets may be seen, or remove it.")
    if asked == "1" and not given:
        what = "asks for a bypass of the masking of secrets, which needs a reason"
        raise UserError(f"environment: {BYPASS}=1: {what}. Give safety.bypass_reason=..., or unset it.")
    return given or None


def is_bypassed() -> bool:
    """Whether nothing is masked in this process."""
    return _in_force["reason"] is not None


def reason() -> str | None:
    """Why nothing is masked in this process; None if everything is. A secret in the reason itself is masked."""
    from codex_accel import safety

    return safety.mask(_in_force["reason"]).text if is_bypassed() else None


def policy() -> "Policy | None":
    """The policy that holds; None under a bypass."""
    from codex_accel.policy import default_policy

    return None if is_bypassed() else _in_force["rules"] or default_policy()


def facts() -> dict[str, Any]:
    """For manifests and reports: {"policy": its version, "sha256": of its file, "bypass_reason": text or None}."""
    rules = policy()
    version, digest = (text(rules.version), rules.digest) if rules else (None, None)
    return {"policy": version, "sha256": digest, "bypass_reason": reason()}


# --- what is written -------------------------------------------------------------------------------------------------


def text(written: str) -> str:
    """`written` with its secrets masked."""
    from codex_accel import safety

    rules = policy()
    return written if rules is None else safety.mask(written, policy=rules).text


def words(told: object, most: int = 300) -> str:
    """A library's error, or a value, on one line of at most so many characters.

    It is masked before it is cut, since a piece of a secret is not known as one.
    """
    return " ".join(text(str(told)).split())[:most]


def value(written: Any) -> Any:
    """Nested mappings, lists and texts with their secrets masked, in keys too; see `safety.mask_json`."""
    from codex_accel import safety

    rules = policy()
    return written if rules is None else safety.mask_json(written, policy=rules)


class _Console:
    """A text stream whose lines are masked as they are written; part of a line waits for its end or for a flush."""

    def __init__(self, stream: Any):
        self.unfiltered = stream
        self._begun: list[str] = []
        self._num_begun = 0
        self._unlock()
        os.register_at_fork(after_in_child=self._unlock)  # whoever held the lock is not in the child

    def _unlock(self) -> None:
        self._lock = threading.RLock()

    def write(self, written: str) -> int:
        with self._lock:
            end = max(written.rfind("\n"), written.rfind("\r")) + 1
            self._begun.append(written[:end] or written)
            self._num_begun += len(self._begun[-1])
            if end or self._num_begun > MOST_BEGUN:
                self._pass_on()
            if 0 < end < len(written):
                self._begun, self._num_begun = [written[end:]], len(written) - end
        return len(written)

    def _pass_on(self) -> None:
        begun, self._begun, self._num_begun = "".join(self._begun), [], 0
        if begun:
            self.unfiltered.write(text(begun))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._lock:
            self._pass_on()
            self.unfiltered.flush()

    def __enter__(self) -> "_Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unfiltered, name)


def watch_console() -> None:
    """Mask what Python code of this process prints from here on, tracebacks and warnings too.

    What C code writes to descriptors 1 and 2 does not come by here.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Console):  # None: closed by whoever started the process
            setattr(sys, name, _Console(stream))


def unfiltered(stream: Any) -> Any:
    """The stream itself, for texts of ours that hold nothing of the user's, such as --help."""
    return stream.unfiltered if isinstance(stream, _Console) else stream
