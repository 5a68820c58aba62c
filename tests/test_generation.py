"""A prompt is continued as its settings say, and as the reference does."""

import json
import shutil

import pytest
import torch
from transformers import GenerationConfig

from codex_accel import generation, tokenizer
from codex_accel import model as models
from codex_accel.errors import UserError
from codex_accel.evaluate_schema import GenerateConfig


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "models" / "stories260K"


@pytest.fixture(scope="module")
def generate(folder):
    """Continue a prompt with stories260K."""
    model, loaded = models.load(folder), tokenizer.load(folder)

    def run(prompt: str = "", *, model=model, loaded=loaded, **options) -> dict:
        options = {"max_new_tokens": 24, **options}
        return generation.generate(model, loaded, GenerateConfig(checkpoint="c", prompt=prompt, **options))

    return run


def test_greedy_ids_are_those_of_the_reference(generate, folder):
    """reference.json beside the model: 256 ids from BOS, and the text that llama2.c documents for it."""
    reference = json.loads((folder / "reference.json").read_text())
    found = generate(max_new_tokens=255)
    assert found["prompt_ids"] + found["ids"] == reference["greedy_ids_from_bos"]
    assert found["text"].startswith(reference["llama2c_doc_greedy_text"][:400])


def test_prompt_and_text_join_as_one_greedy_text(generate):
    """The continuation of "Once" begins with a space, which a decoder of it alone would drop."""
    whole = generate(max_new_tokens=40)["text"]
    assert whole.startswith("Once upon a time, there was")
    for prompt in ("Once", "Once upon", "Once upon a time,"):
        found = generate(prompt, max_new_tokens=40)
        assert (prompt + found["text"]).startswith(whole[:60])


def test_same_seed_gives_the_same_text(generate):
    texts = [generate(temperature=1.0, seed=seed)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_draws_do_not_depend_on_draws_before(generate):
    first = generate(temperature=1.0, seed=1)
    torch.rand(5)
    assert generate(temperature=1.0, seed=1) == first


def test_one_candidate_is_greedy(generate):
    greedy = generate()["ids"]
    assert generate(temperature=5.0, top_k=1)["ids"] == greedy
    assert generate(temperature=5.0, top_p=1e-6)["ids"] == greedy
    assert generate(temperature=1e-4)["ids"] == greedy
    assert generate(temperature=5.0)["ids"] != greedy


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}])
def test_draws_stay_within_the_likeliest_tokens(generate, folder, options):
    """Each drawn token against the model's own distribution at its place."""
    found = generate("Lily", temperature=2.0, seed=3, **options)
    ids = found["prompt_ids"] + found["ids"]
    with torch.no_grad():
        logits = models.load(folder)(torch.tensor([ids])).logits[0] / 2.0
    for place in range(len(found["prompt_ids"]), len(ids)):
        probabilities = logits[place - 1].softmax(-1)
        above = probabilities > probabilities[ids[place]]
        assert above.sum() < 3 if "top_k" in options else probabilities[above].sum() < 0.5 + 1e-5


def test_settings_in_the_model_folder_do_not_change_the_text(generate, folder, tmp_path):
    """`generation_config.json` may hold penalties and a length that the user has not asked for."""
    other = shutil.copytree(folder, tmp_path / "model")
    settings = GenerationConfig(repetition_penalty=5.0, do_sample=True, top_k=3, min_new_tokens=3, max_length=8)
    settings.save_pretrained(other)
    assert generate(model=models.load(other)) == generate()


def test_end_token_ends_the_text(generate, folder):
    """The token that comes fourth in the greedy text, taken for the end."""
    plain, loaded = generate(), tokenizer.load(folder)
    ended = tokenizer.Tokenizer(folder, loaded.backend, 1, plain["ids"][3], None, 0)
    found = generate(loaded=ended)
    assert found["ids"] == plain["ids"][:4]
    assert (plain["finish_reason"], found["finish_reason"]) == ("length", "eos")


def test_length_is_what_was_asked_for(generate):
    assert len(generate(max_new_tokens=7)["ids"]) == 7


def test_more_than_the_context_is_an_error(generate):
    """stories260K has 512 positions; BOS takes one."""
    with pytest.raises(UserError, match=r"max_new_tokens: 512 after 1 prompt tokens goes beyond .* 512 positions"):
        generate(max_new_tokens=512)


def test_nothing_to_start_from_is_an_error(generate, folder):
    without = tokenizer.Tokenizer(folder, tokenizer.load(folder).backend, None, None, None, None)
    with pytest.raises(UserError, match="prompt: is empty and the tokenizer has no BOS"):
        generate(loaded=without)


@pytest.mark.security
def test_special_token_in_the_prompt_is_text(generate):
    assert 2 not in generate("a</s>b")["prompt_ids"]
