"""Every command that the README and the docs pages print, run as it stands there but for fewer steps and modules."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BY_MAKE = {"make quickstart", "make test", "make install"}  # what they run is in this suite, or is this suite
SHORTER = {
    "quickstart_corpus": ["max_modules=24"],
    "evaluate": ["stride=256", "batch_size=64"],
    "train": ["training.max_steps=3", "evaluation.max_windows=8", "log.every_steps=1"],
}


def commands_of(page: Path) -> list[str]:
    """Lines of the fenced `sh` blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


def parsed(command: str) -> tuple[str, int, list[str]]:
    """(stage, number of processes, arguments)."""
    match = re.fullmatch(r"(python|accelerate launch(?: --config_file (\S+))?) scripts/(\w+)\.py ?(.*)", command)
    assert match, f"not a command of ours: {command}"
    num_processes = 2 if "2proc" in (match.group(2) or "") else 1
    return match.group(3), num_processes, shlex.split(match.group(4))


def quickstart_commands() -> list[str]:
    lines = (ROOT / "scripts" / "quickstart.sh").read_text().splitlines()
    return [line.removeprefix("run ") for line in lines if line.startswith("run ")]


def test_the_quickstart_is_what_the_readme_shows():
    shown = [command for command in commands_of(ROOT / "README.md") if command not in BY_MAKE]
    assert shown[: len(quickstart_commands())] == quickstart_commands()


@pytest.mark.distributed
def test_every_command_of_the_pages_runs(fork_server, tmp_path):
    for name in ("configs", "scripts", "accelerate_configs", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    done: dict[tuple, str] = {}
    for page in PAGES:
        for command in commands_of(page):
            if command in BY_MAKE:
                continue
            stage, num_processes, argv = parsed(command)
            if (stage, *argv) in done:
                continue
            more = SHORTER.get(stage, []) if "--schema" not in argv else []
            job = fork_server.run(stage, [*argv, *more], num_processes=num_processes, cwd=tmp_path)
            assert set(job.codes) == {0}, f"{page.name}: {command}\n{job.output}"
            done[(stage, *argv)] = job.output
    assert len(done) >= 15
    [table] = [output for (stage, *_), output in done.items() if stage == "quickstart_table"]
    for words in ("test modules", "zlib -9", "lzma", "all together", "have not seen the training text", "tokens/s"):
        assert words in table
    assert any(stage == "verify" and "all ticks" in output for (stage, *_), output in done.items())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
