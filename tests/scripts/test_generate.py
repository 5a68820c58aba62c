"""scripts/generate.py against a reference, and its options."""

import json

from conftest import ROOT


def generate(fork_server, *argv: object) -> str:
    job = fork_server.run("generate", list(map(str, argv)))
    assert job.codes == [0], job.output
    return job.output


def test_greedy_text_is_the_reference(fork_server, shared):
    """reference.json: greedy text of stories260K from BOS, by llama2.c's documentation."""
    model = shared / "models" / "stories260K"
    text = json.loads((model / "reference.json").read_text())["llama2c_doc_greedy_text"]
    assert generate(fork_server, f"checkpoint={model}", "max_new_tokens=256").rstrip("\n") == text


def test_a_seed_decides_the_draws(fork_server, shared):
    options = [f"checkpoint={shared}/models/stories260K", "temperature=1.0", "top_k=50", "max_new_tokens=40"]
    first, again, other = (generate(fork_server, *options, f"seed={seed}") for seed in (1, 1, 2))
    assert first == again != other


def test_a_prompt_may_hold_colons_and_brackets(fork_server, chain):
    out = generate(fork_server, f"checkpoint={chain}/run", "prompt=def f(x: [", "max_new_tokens=4")
    assert out.startswith("def f(x: [")


def test_too_many_tokens_are_refused(fork_server, chain):
    job = fork_server.run("generate", [f"checkpoint={chain}/run", "max_new_tokens=33"], cwd=ROOT)
    assert job.codes == [2]
    assert "Take 31 at most" in job.output
