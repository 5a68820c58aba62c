"""Requests are continued as their settings say, as the reference does, and whoever shares the batch."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from codex_accel import generation, tokenizer
from codex_accel import model as models
from codex_accel.generation import Batch, Request
from codex_accel.prompts import encode_prompt

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 128}
SHAPES = {
    "llama": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "mistral": {**LLAMA, "sliding_window": 8},  # shorter than the texts
    "gpt2": {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128},
    "bloom": {"n_layer": 2, "n_head": 4, "hidden_size": 32},  # takes no positions
    "opt": {**LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "mamba": {"num_hidden_layers": 2, "hidden_size": 32, "state_size": 4},  # a state instead of keys and values
    "trocr": {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "d_model": 32},
}
ALONE = {
    "mamba": "its cache has layers of type LinearAttentionLayer",
    "trocr": "gives other logits for a row in a batch",
}


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "models" / "stories260K"


@pytest.fixture(scope="module")
def loaded(folder):
    return tokenizer.load(folder)


@pytest.fixture(scope="module")
def model(folder):
    return models.load(folder).eval()


@pytest.fixture(scope="module")
def stories(model, loaded):
    """Continue prompts with stories260K, as one batch."""

    def run(*prompts: str, model=model, loaded=loaded, on_text=None, **options) -> list[generation.Continuation]:
        options = {"max_new_tokens": 24, **options}
        asked = [Request(encode_prompt(loaded, prompt), **options) for prompt in prompts]
        return generation.generate(model, loaded, asked, on_text=on_text)

    return run


@pytest.fixture(scope="module", params=SHAPES)
def tiny_model(request):
    """Random weights, large enough that no two logits are near each other."""
    config = AutoConfig.for_model(
        request.param, vocab_size=97, bos_token_id=1, eos_token_id=2, pad_token_id=0, **SHAPES[request.param]
    )
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return made


def ids_of(length: int, seed: int) -> tuple[int, ...]:
    return tuple((7 * step + 3 * seed) % 90 + 3 for step in range(length))


RAGGED = [Request(ids_of(length, seed), 6 + 5 * seed) for seed, length in enumerate((3, 11, 1, 7, 20))]


def by_transformers(model, request: Request, eos_id: int | None = 2) -> tuple[int, ...]:
    """Greedy ids by transformers' own `generate`, which is given this request alone."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    input_ids = torch.tensor([request.input_ids])
    settings = {"max_new_tokens": request.max_new_tokens, "do_sample": False, "eos_token_id": eos_id, "pad_token_id": 0}
    found = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), **settings)
    model.generation_config = kept
    return tuple(found[0, input_ids.shape[1] :].tolist())


# --- greedy texts -----------------------------------------------------------------------------------------------------


def test_greedy_ids_are_those_of_the_reference(stories, folder):
    """reference.json beside the model: 256 ids from BOS, and the text that llama2.c documents for it."""
    reference = json.loads((folder / "reference.json").read_text())
    [found] = stories("", max_new_tokens=255)
    assert [1, *found.ids] == reference["greedy_ids_from_bos"]
    assert found.text.startswith(reference["llama2c_doc_greedy_text"][:400])


def test_rows_of_any_length_have_the_ids_of_generate_alone(tiny_model, loaded):
    found = generation.generate(tiny_model, loaded, RAGGED)
    assert [each.ids for each in found] == [by_transformers(tiny_model, request) for request in RAGGED]
    assert {each.num_near_ties for each in found} == {0}


def test_rows_that_join_a_running_batch_have_the_ids_of_generate_alone(tiny_model, loaded):
    """Each row joins two tokens after the one before, shorter and longer ones; some have left by then."""
    batch, waiting, done = Batch(tiny_model, loaded), list(RAGGED), {}
    while batch.num_rows or waiting:
        if waiting:
            batch.add([waiting.pop(0)])
        for _ in range(2):
            done.update(batch.step())
    assert [done[n].ids for n in range(len(RAGGED))] == [by_transformers(tiny_model, request) for request in RAGGED]


def test_an_architecture_whose_rows_depend_on_each_other_does_one_at_a_time(tiny_model):
    why, name = generation.why_alone(tiny_model), tiny_model.config.model_type
    assert ALONE[name] in why if name in ALONE else why == ""


def test_prompts_of_a_real_model_have_the_ids_of_generate_alone(stories, model, loaded):
    prompts = ["Once", "One day, a big dog went to the park. He saw", "", "Lily and Tom", "Sara said"]
    for prompt, found in zip(prompts, stories(*prompts, max_new_tokens=100), strict=True):
        assert found.ids == by_transformers(model, Request(encode_prompt(loaded, prompt), 100))
        assert (found.finish_reason, found.num_near_ties) == ("length", 0)


def test_prompt_and_text_join_as_one_greedy_text(stories):
    """The continuation of "Once" begins with a space, which a decoder of it alone would drop."""
    [whole] = stories("", max_new_tokens=40)
    assert whole.text.startswith("Once upon a time, there was")
    for prompt, found in zip(("Once", "Once upon"), stories("Once", "Once upon", max_new_tokens=40), strict=True):
        assert (prompt + found.text).startswith(whole.text[:60])


def test_logits_of_a_batch_differ_from_those_alone_by_less_than_a_near_tie(model, loaded, shared):
    """What the threshold rests on: 16 stretches of Alice of 20 to 245 tokens; two logits could each move by half."""
    text = (shared / "text" / "alice_pg11_utf8.txt").read_text(encoding="utf-8")[2000:20000]
    ids = loaded.encode([text])[0]
    rows = [ids[60 * n : 60 * n + 20 + 15 * n] for n in range(16)]
    with torch.no_grad():
        together, _ = generation.prefill(model, rows)
        alone = torch.cat([model(input_ids=torch.tensor([row])).logits[:, -1] for row in rows])
    assert 0 < float((together - alone).abs().max()) < generation.sampling.NEAR / 2


# --- rows that leave --------------------------------------------------------------------------------------------------


def fed(model, run) -> list[tuple[int, int]]:
    """(rows, columns) of the input ids of each forward pass during `run`."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    run()
    hook.remove()
    return shapes


def test_a_finished_row_costs_nothing(model, loaded):
    generation.why_alone(model)
    requests = [Request((1, 403), number) for number in (1, 2, 9, 4, 4)]
    shapes = fed(model, lambda: generation.generate(model, loaded, requests))
    assert shapes == [(5, 2), (4, 1), (3, 1), (3, 1), *[(1, 1)] * 5]


def test_padding_goes_with_the_row_that_needed_it(model, loaded):
    batch = Batch(model, loaded)
    batch.add([Request((1, *range(300, 340)), 2), Request((1, 403), 9)])
    batch.step()
    assert batch._cache.num_columns == 3


def test_a_row_that_is_dropped_leaves_the_others_as_they_are(model, loaded):
    requests = [Request((1, 403), 12), Request((1, *range(300, 320)), 12), Request((1, 410), 12)]
    batch, done = Batch(model, loaded), {}
    assert batch.add(requests) == [0, 1, 2]
    batch.step()
    batch.drop(1)
    while batch.num_rows:
        done.update(batch.step())
    assert done == {n: generation.generate(model, loaded, [requests[n]])[0] for n in (0, 2)}


# --- where a text ends ------------------------------------------------------------------------------------------------


def with_eos(loaded, id_: int | None):
    return tokenizer.Tokenizer(loaded.folder, loaded.backend, 1, id_, None, 0)


def test_end_token_ends_the_text_and_is_no_part_of_it(stories, loaded):
    """The token that comes fourth in the greedy text, taken for the end."""
    [plain] = stories("")
    [found] = stories("", loaded=with_eos(loaded, plain.ids[3]))
    assert found.ids == plain.ids[:4]
    assert found.text == loaded.decode(plain.ids[:3])
    assert (plain.finish_reason, found.finish_reason) == ("length", "eos")


def test_an_end_token_at_the_last_place_is_an_end(stories, loaded):
    [plain] = stories("")
    [found] = stories("", loaded=with_eos(loaded, plain.ids[3]), max_new_tokens=4)
    assert (found.finish_reason, len(found.ids)) == ("eos", 4)


@pytest.mark.parametrize("where", ["generation_config", "request"])
def test_other_tokens_may_end_a_text_too(stories, model, folder, where):
    """Those of the model's generation configuration, and of the request: a chat model ends its turns so."""
    [plain] = stories("")
    own, options = models.load(folder).eval(), {}
    if where == "generation_config":
        own.generation_config.eos_token_id = [2, plain.ids[5]]
    else:
        options["end_ids"] = (plain.ids[5],)
    [found] = stories("", model=own, **options)
    assert (found.ids, found.finish_reason) == (plain.ids[:6], "eos")


def test_settings_in_the_model_folder_do_not_change_the_text(stories, folder, tmp_path):
    """`generation_config.json` may hold penalties and a length that the user has not asked for."""
    other = shutil.copytree(folder, tmp_path / "model")
    settings = GenerationConfig(repetition_penalty=5.0, do_sample=True, top_k=3, min_new_tokens=3, max_length=8)
    settings.save_pretrained(other)
    assert stories("", model=models.load(other).eval()) == stories("")


def test_length_is_what_was_asked_for(stories):
    assert [len(found.ids) for number in (1, 7) for found in stories("", max_new_tokens=number)] == [1, 7]


@pytest.mark.parametrize("stop", [(" time",), ("a t",), ("e, there", "zzz"), ("!", "upon a")])
def test_text_ends_before_a_stop_string(stories, loaded, stop):
    [plain] = stories("", max_new_tokens=40)
    [found] = stories("", max_new_tokens=40, stop=stop)
    place = min(plain.text.find(each) for each in stop if each in plain.text)
    assert (found.text, found.finish_reason) == (plain.text[:place], "stop")
    assert loaded.decode(found.ids).startswith(plain.text[:place])
    assert len(found.ids) < len(plain.ids)


def test_the_prompt_is_no_part_of_a_stop_string(stories):
    [found] = stories("Once upon", stop=("upon",), max_new_tokens=8)
    assert found.finish_reason == "length"


@pytest.mark.parametrize("name", ["stories", "alone"])
def test_pieces_join_to_the_text_of_each_row(stories, model, loaded, name, monkeypatch):
    if name == "alone":
        monkeypatch.setitem(generation._ALONE, model, "for this test")
    pieces: dict[int, list[str]] = {0: [], 1: [], 2: []}
    prompts = ["Once", 'Lily said, "', "The naïve 你"]
    found = stories(*prompts, on_text=lambda index, text: pieces[index].append(text), stop=("park", "qq"))
    assert ["".join(parts) for parts in pieces.values()] == [each.text for each in found]
    assert all(len(parts) > 3 for parts in pieces.values())


def test_a_row_ends_where_its_listener_wants_no_more(stories):
    pieces: dict[int, list[str]] = {0: [], 1: []}

    def listen(index: int, text: str) -> bool:
        pieces[index].append(text)
        return index == 1 or len(pieces[index]) < 3

    [first, second], [whole, _] = stories("Once", "Lily", on_text=listen), stories("Once", "Lily")
    assert (first.finish_reason, second.finish_reason) == ("stop", "length")
    assert len(pieces[0]) == 3
    assert whole.text.startswith(first.text)


# --- draws ------------------------------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_text(stories):
    texts = [stories("", temperature=1.0, seed=seed)[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_draws_depend_on_no_neighbour_and_no_draw_before(model, loaded):
    requests = [
        Request((1, 403), 20, temperature=1.0, seed=1),
        Request((1, *range(300, 330)), 30, temperature=0.7, top_k=5, seed=2),
        Request((1, 410), 9),
        Request((1, 403, 407), 25, temperature=1.5, top_p=0.9, seed=1),
    ]
    together = generation.generate(model, loaded, requests)
    torch.rand(5)
    state = torch.get_rng_state()
    alone = [generation.generate(model, loaded, [request])[0] for request in reversed(requests)][::-1]
    assert together == alone
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_by_itself_draws_as_one_in_a_batch_does(model, loaded, monkeypatch):
    requests = [Request((1, 403), 20, temperature=1.0, seed=1), Request((1, 410), 9, stop=("a ",))]
    together = generation.generate(model, loaded, requests)
    monkeypatch.setitem(generation._ALONE, model, "for this test")
    kept = model.generation_config
    assert generation.generate(model, loaded, requests) == together
    assert model.generation_config is kept


def test_one_candidate_is_greedy(stories):
    greedy = stories("")[0].ids
    assert stories("", temperature=5.0, top_k=1)[0].ids == greedy
    assert stories("", temperature=5.0, top_p=1e-6)[0].ids == greedy
    assert stories("", temperature=1e-4)[0].ids == greedy
    assert stories("", temperature=5.0)[0].ids != greedy


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}])
def test_draws_stay_within_the_likeliest_tokens(stories, model, loaded, options):
    """Each drawn token against the model's own distribution at its place."""
    [found], prompt = stories("Lily", temperature=2.0, seed=3, **options), encode_prompt(loaded, "Lily")
    ids = prompt + found.ids
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0] / 2.0
    for place in range(len(prompt), len(ids)):
        probabilities = logits[place - 1].softmax(-1)
        above = probabilities > probabilities[ids[place]]
        assert above.sum() < 3 if "top_k" in options else probabilities[above].sum() < 0.5 + 1e-5


# --- batches ----------------------------------------------------------------------------------------------------------

SIZES = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), max_size=40)


@given(sizes=SIZES, batch_tokens=st.integers(1, 400), batch_size=st.none() | st.integers(1, 6))
def test_a_plan_holds_each_request_once_and_keeps_to_its_budget(sizes, batch_tokens, batch_size):
    requests = [Request((1,) * length, new) for length, new in sizes]
    plan = generation.plan_batches(requests, batch_tokens=batch_tokens, batch_size=batch_size)
    assert sorted(index for batch in plan for index in batch) == list(range(len(requests)))
    for batch in plan:
        width = max(sizes[n][0] for n in batch) + max(sizes[n][1] for n in batch)
        assert len(batch) == 1 or len(batch) * width <= batch_tokens
        assert len(batch) <= (batch_size or len(batch))
    totals = [sum(sizes[index]) for batch in plan for index in batch]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize(
    ("length", "number", "told"),
    [
        (1, 511, ""),
        (1, 512, "512 after 1 prompt tokens goes beyond the model's 512 positions. Take 511 at most."),
        (512, 1, "1 after 512 prompt tokens goes beyond the model's 512 positions. Shorten the prompt."),
    ],
)
def test_more_than_the_context_is_told(model, length, number, told):
    """stories260K has 512 positions."""
    assert generation.lack_of_room(model, length, number) == told


def test_a_request_without_a_token_is_refused(model, loaded):
    with pytest.raises(ValueError, match="a token to go on from"):
        generation.generate(model, loaded, [Request((), 3)])
