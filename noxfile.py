"""Sessions: `nox -s tests lint types coverage tests_gpu`, each in an environment made from the pinned requirements."""

import ctypes.util
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True


def install(session: nox.Session) -> None:
    session.install("--requirement", "requirements-dev.txt")


@nox.session
def tests(session: nox.Session) -> None:
    """The suite, or the tests named after `--`."""
    install(session)
    session.run("pytest", "-m", "not slow", "--numprocesses", "2", "--dist", "loadfile", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style: the linter and the formatter."""
    install(session)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Static types of the package."""
    install(session)
    session.run("mypy", "codex_accel")


@nox.session
def coverage(session: nox.Session) -> None:
    """The suite under coverage, subprocesses included; fails below the gate in setup.cfg."""
    install(session)
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", "-m", "not slow", *session.posargs)
    # a process that a test has killed may leave half a data file, which combine names and leaves out
    session.run("coverage", "combine", "--quiet", success_codes=[0, 1])
    session.run("coverage", "report")


@nox.session
def tests_gpu(session: nox.Session) -> None:
    """What only a GPU shows (tests/test_gpu.py); skipped where there is none."""
    if ctypes.util.find_library("cuda") is None and not Path("/dev/nvidia0").exists():  # before gigabytes are installed
        session.skip("no CUDA device: neither the driver's libcuda nor /dev/nvidia0 is here")
    session.install("--requirement", "requirements-cuda.txt", "--requirement", "requirements-dev.txt")
    session.run("python", "-c", "import torch; assert torch.cuda.is_available(), 'torch finds no CUDA device'")
    session.run("pytest", "-m", "cuda", "tests/test_gpu.py", *session.posargs)
