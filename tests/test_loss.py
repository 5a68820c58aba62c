"""Losses are sums over the positions with a label, whether or not all logits are there at once."""

import json
import math
from pathlib import Path

import faults
import pytest
import torch
import torch.nn.functional as F
from conftest import metrics_of, train_argv
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from codex_accel import files, loss, probes, run_folder
from codex_accel.errors import UserError
from codex_accel.loss import sum_by_chunks, sum_of_losses, token_scores
from codex_accel.packing import IGNORE
from codex_accel.train_schema import Data, Model, TrainConfig, Training


@pytest.fixture
def batch():
    """Logits (2, 5, 7) and labels with some left out."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, 1] = labels[1, 3:] = IGNORE
    return logits, labels


def by_hand(logits, labels) -> float:
    """- log softmax(logits)[label], summed in Python floats."""
    total = 0.0
    for row, targets in zip(logits.tolist(), labels.tolist(), strict=True):
        for scores, target in zip(row, targets, strict=True):
            if target != IGNORE:
                total += math.log(sum(map(math.exp, scores))) - scores[target]
    return total


def test_sum_is_over_the_positions_with_a_label(batch):
    assert sum_of_losses(*batch).item() == pytest.approx(by_hand(*batch), rel=1e-6)


def test_equal_logits_cost_the_logarithm_of_the_vocabulary():
    loss = sum_of_losses(torch.zeros(2, 3, 50), torch.zeros(2, 3, dtype=torch.long))
    assert loss.item() == pytest.approx(6 * math.log(50))


def test_no_target_costs_nothing_and_has_no_gradient(batch):
    logits = batch[0].requires_grad_()
    loss = sum_of_losses(logits, torch.full((2, 5), IGNORE))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().sum() == 0


def test_half_precision_logits_are_summed_in_float32(batch):
    logits, labels = batch
    half = logits.bfloat16()
    assert sum_of_losses(half, labels).dtype == torch.float32
    assert sum_of_losses(half, labels).item() == pytest.approx(by_hand(half.float(), labels), rel=1e-6)


def test_scores_of_tokens_add_up_to_the_sum(batch):
    nll, correct = token_scores(*batch)
    assert nll.sum().item() == pytest.approx(sum_of_losses(*batch).item(), rel=1e-6)
    assert (nll.dtype, correct.dtype, correct.shape) == (torch.float32, torch.bool, (2, 5))


def test_position_without_a_label_scores_nothing(batch):
    logits, labels = batch
    nll, correct = token_scores(logits, labels)
    assert (nll[labels == IGNORE] == 0).all()
    assert not correct[labels == IGNORE].any()


@given(targets=st.lists(st.integers(0, 4), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_a_token_is_correct_if_it_has_the_largest_logit(targets, seed):
    logits = torch.randn(1, len(targets), 5, generator=torch.Generator().manual_seed(seed))
    _, correct = token_scores(logits, torch.tensor([targets]))
    expected = [max(range(5), key=row.__getitem__) == t for row, t in zip(logits[0].tolist(), targets, strict=True)]
    assert correct[0].tolist() == expected


# --- by chunks of rows --------------------------------------------------------------------------------------------


def head_inputs(dtype=torch.float32, *, bias=False, shape=(3, 41), vocab_size=67):
    """hidden (B, T, H), weight (V, H), bias (V,) or None, all with gradients, and labels with a quarter ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, added = (
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in ((*shape, 16), (vocab_size, 16), (vocab_size,))
    )
    labels = torch.randint(0, vocab_size, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.25] = IGNORE
    return hidden, weight, added if bias else None, labels


def from_full_logits(hidden, weight, bias, labels):
    """The reference: all logits at once, and torch's own cross-entropy, in the dtype that they have."""
    logits = F.linear(hidden, weight, bias).flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")


def off(ours, theirs) -> float:
    """Norm of the difference of two lists of tensors, as a share of the second's norm."""
    ours, theirs = (torch.cat([tensor.detach().double().flatten() for tensor in each]) for each in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("chunk_rows", [1, 7, 512])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_chunks_give_the_sum_and_gradients_of_full_logits(chunk_rows, bias, dtype, bound):
    *inputs, labels = head_inputs(dtype, bias=bias)
    wanted = [tensor for tensor in inputs if tensor is not None]
    full = from_full_logits(*inputs, labels)
    ours = sum_by_chunks(*inputs[:2], labels, bias=inputs[2], chunk_rows=chunk_rows)
    assert ours.dtype == dtype
    assert off([ours], [full]) <= bound
    for mine, theirs in zip(torch.autograd.grad(3 * ours, wanted), torch.autograd.grad(3 * full, wanted), strict=True):
        assert mine.dtype == dtype
        assert off([mine], [theirs]) <= bound


def test_gradients_of_chunks_are_the_slopes_of_their_sum():
    *inputs, labels = head_inputs(torch.float64, bias=True, shape=(2, 5), vocab_size=11)
    assert torch.autograd.gradcheck(lambda h, w, b: sum_by_chunks(h, w, labels, bias=b, chunk_rows=3), inputs)


@given(
    rows=st.integers(1, 9), chunk_rows=st.integers(1, 12), ignored=st.sets(st.integers(0, 8)), seed=st.integers(0, 99)
)
def test_any_cut_into_chunks_gives_the_same_sum(rows, chunk_rows, ignored, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in (rows, 5))
    labels = torch.randint(0, 5, (1, rows), generator=generator)
    labels[0, [place for place in ignored if place < rows]] = IGNORE
    ours = sum_by_chunks(hidden[None], weight, labels, chunk_rows=chunk_rows)
    assert float(ours) == pytest.approx(float(from_full_logits(hidden[None], weight, None, labels)), rel=1e-12)


def test_chunks_without_a_target_cost_nothing_and_teach_nothing():
    hidden, weight, bias, labels = head_inputs(bias=True)
    ours = sum_by_chunks(hidden, weight, torch.full_like(labels, IGNORE), bias=bias)
    ours.backward()
    assert ours.item() == 0.0
    assert [float(tensor.grad.abs().sum()) for tensor in (hidden, weight, bias)] == [0.0, 0.0, 0.0]


def test_label_outside_the_vocabulary_is_an_error():
    hidden, weight, _, labels = head_inputs()
    labels[0, 0] = len(weight)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        sum_by_chunks(hidden, weight, labels)


def test_chunks_under_bf16_have_float32_probabilities():
    """Reference: cross-entropy in float32 over the logits of a bfloat16 product, as `sum_of_losses` has it.

    Its own gradients go through bfloat16 too, so both are held against those of float32 throughout. Some eighty chunks
    show whether their gradients are added in float32.
    """
    *inputs, labels = head_inputs(bias=True, shape=(4, 128))
    exact = torch.autograd.grad(from_full_logits(*inputs, labels), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        full = sum_of_losses(F.linear(*inputs), labels)
        ours = sum_by_chunks(*inputs[:2], labels, bias=inputs[2], chunk_rows=5)
    assert ours.dtype == torch.float32
    assert off([ours], [full]) <= 1e-6
    mine, theirs = torch.autograd.grad(ours, inputs), torch.autograd.grad(full, inputs)
    assert [gradient.dtype for gradient in mine] == [torch.float32] * 3
    for each, reference, right in zip(mine, theirs, exact, strict=True):
        assert off([each], [right]) <= 1.2 * off([reference], [right]) <= 0.01


def test_weights_that_do_not_train_get_no_gradient():
    hidden, weight, _, labels = head_inputs()
    sum_by_chunks(hidden, weight.requires_grad_(False), labels).backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_without_gradients_only_the_sum_is_made():
    hidden, weight, _, labels = head_inputs()
    with torch.no_grad():
        ours = sum_by_chunks(hidden, weight, labels)
    assert not ours.requires_grad
    assert ours.item() == pytest.approx(by_hand(F.linear(hidden, weight), labels), rel=1e-6)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.size = max(
            self.size, *(t.numel() for t in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(t)), 0
        )
        return result


def test_no_more_logits_exist_than_those_of_a_chunk():
    hidden, weight, _, labels = head_inputs(shape=(4, 128), vocab_size=1000)
    with LargestTensor() as ours:
        sum_by_chunks(hidden, weight, labels, chunk_rows=32).backward()
    with LargestTensor() as full:
        from_full_logits(hidden, weight, None, labels).backward()
    assert ours.size == 32 * 1000
    assert full.size == 4 * 128 * 1000


# --- in the head of a model ---------------------------------------------------------------------------------------

LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2}
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32}
SHARED_HEADS = {**LLAMA, "num_key_value_heads": 2, "head_dim": 16}


def made(architecture: dict, vocab_size: int = 300):
    torch.manual_seed(0)
    values = {key: value for key, value in architecture.items() if key != "model_type"}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture["model_type"], vocab_size=vocab_size, **values)
    )


def fed(vocab_size: int = 300, shape=(2, 24)) -> dict:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, vocab_size, shape, generator=generator)
    labels[0, :12] = IGNORE
    return {"input_ids": torch.randint(0, vocab_size, shape, generator=generator), "labels": labels, "use_cache": False}


@pytest.mark.parametrize(("architecture", "tied"), [(GPT2, True), (LLAMA, False)], ids=["gpt2", "llama"])
def test_model_learns_the_same_with_the_loss_in_its_head(architecture, tied):
    """All gradients over two micro-batches, those of tied weights from both of their uses."""
    model = made(architecture).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    sums, gradients = [], []
    for sum_in in (loss.from_logits, loss.in_head(model.get_output_embeddings(), chunk_rows=7)):
        model.zero_grad()
        micro_losses = [sum_in(model, **fed(shape=shape)) for shape in ((2, 24), (3, 16))]
        for micro_loss in micro_losses:
            (micro_loss / 50).backward()
        sums.append(micro_losses)
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert off(sums[1], sums[0]) <= 1e-6
    assert off(gradients[1], gradients[0]) <= 1e-6


def test_head_is_the_ordinary_one_outside_of_the_call():
    """After a call, and after one that failed: logits, names in the checkpoint, generation."""
    model, inputs = made(LLAMA).eval(), fed()
    before, names = model(input_ids=inputs["input_ids"]).logits, list(model.state_dict())
    sum_in_head = loss.in_head(model.get_output_embeddings(), chunk_rows=7)
    sum_in_head(model, **inputs)
    with pytest.raises(IndexError):
        sum_in_head(model, **inputs | {"input_ids": inputs["input_ids"] + 300})
    assert torch.equal(model(input_ids=inputs["input_ids"]).logits, before)
    assert list(model.state_dict()) == names
    assert model.generate(inputs["input_ids"][:, :4], max_new_tokens=2, pad_token_id=0).shape == (2, 6)


def plan_of(model, *, chunk_rows=None, mixed_precision="no") -> dict:
    config = TrainConfig(
        output_dir="out",
        model=Model(config={"model_type": model.config.model_type}),
        data=Data(dataset="data", block_size=16),
        training=Training(max_steps=1, loss_chunk_rows=chunk_rows),
    )
    return probes.loss_chunks(model, config, mixed_precision=mixed_precision)


def test_chunks_are_taken_where_the_vocabulary_is_large():
    assert plan_of(made(LLAMA, probes.LARGE_VOCABULARY - 1)) == {"chunk_rows": 0, "note": ""}
    note = f"by chunks of 512 rows of logits, {probes.LARGE_VOCABULARY:,} tokens in the vocabulary"
    assert plan_of(made(LLAMA, probes.LARGE_VOCABULARY)) == {"chunk_rows": 512, "note": note}


def test_chunks_are_taken_and_left_as_asked():
    assert plan_of(made(LLAMA), chunk_rows=7)["chunk_rows"] == 7
    assert plan_of(made(LLAMA, probes.LARGE_VOCABULARY), chunk_rows=0)["chunk_rows"] == 0


@pytest.mark.parametrize(
    "architecture",
    [
        {**SHARED_HEADS, "model_type": "gemma2"},  # tanh, which small logits hardly feel
        {**LLAMA, "model_type": "cohere"},
        {**LLAMA, "model_type": "granite", "logits_scaling": 8.0},
    ],
    ids=["gemma2", "cohere", "granite"],
)
def test_model_that_changes_its_logits_is_found_out(architecture):
    model = made(architecture, probes.LARGE_VOCABULARY)
    plan = plan_of(model)
    assert plan["chunk_rows"] == 0
    assert f"because this {architecture['model_type']} model changes the logits that its head gives" in plan["note"]
    with pytest.raises(UserError, match=r"training\.loss_chunk_rows: 64, but .* Set it to 0 for full logits\."):
        plan_of(model, chunk_rows=64)


def test_head_that_is_more_than_a_product_is_found_out():
    """As an adapter's is: its weight is the base's alone."""

    class Adapted(torch.nn.Linear):
        pass

    model = made(LLAMA)
    model.set_output_embeddings(Adapted(32, 300, bias=False))
    with pytest.raises(UserError, match="the head of this llama model is a Adapted, not a Linear"):
        plan_of(model, chunk_rows=64)


def test_fp16_takes_full_logits():
    assert plan_of(made(LLAMA, probes.LARGE_VOCABULARY), mixed_precision="fp16")["chunk_rows"] == 0


# --- in a run -----------------------------------------------------------------------------------------------------

SHORT = ("training.max_steps=6", "evaluation={every_steps: 3, max_windows: 16}", "checkpoint={every_steps: 2}")


def fault(run_dir: Path, mode: str, at: int = 0) -> dict[str, object]:
    """Arguments of faults.arm for a run folder."""
    run_dir.mkdir()
    return {"root": str(run_dir), "mode": mode, "at": at, "report": str(run_dir.with_suffix(".report"))}


@pytest.fixture(scope="module")
def chunked(tiny, fork_server, tmp_path_factory) -> Path:
    """A run with the loss by chunks of 7 rows."""
    run_dir = tmp_path_factory.mktemp("chunked") / "run"
    argv = train_argv(tiny, run_dir, *SHORT, "training.loss_chunk_rows=7")
    job = fork_server.run("train", argv, fault=fault(run_dir, "count"))
    assert job.codes == [0], job.output
    assert "loss    by chunks of 7 rows of logits, 512 tokens in the vocabulary" in job.output
    return run_dir


def losses_of(run_dir: Path) -> list[float]:
    return [value for line in metrics_of(run_dir) for value in (line["loss"], line.get("grad_norm", 0.0))]


def test_run_by_chunks_says_so_and_learns_as_with_full_logits(chunked, tiny, fork_server, tmp_path):
    assert json.loads((chunked / "run.json").read_text())["loss"]["chunk_rows"] == 7
    job = fork_server.run("train", train_argv(tiny, tmp_path / "run", *SHORT))
    assert job.codes == [0], job.output
    assert losses_of(chunked) == pytest.approx(losses_of(tmp_path / "run"), rel=1e-5)


@pytest.mark.distributed
def test_two_processes_by_chunks_learn_as_one(chunked, tiny, fork_server, tmp_path):
    argv = train_argv(tiny, tmp_path / "run", *SHORT, "training.loss_chunk_rows=7")
    job = fork_server.run("train", argv, num_processes=2)
    assert job.codes == [0, 0], job.output
    assert losses_of(tmp_path / "run")[:2] == pytest.approx(losses_of(chunked)[:2], rel=1e-6)  # of the first step
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(chunked), rel=1e-5)


def test_killed_run_by_chunks_ends_in_the_same_weights(chunked, tiny, fork_server, tmp_path):
    """Killed as it logs the last step, two after its newest checkpoint."""
    calls = faults.calls_of(chunked.with_suffix(".report"))
    saves = next(call.number for call in calls if call.path.startswith("checkpoints/.tmp-step-000000006"))
    at = max(call.number for call in calls if call.path == run_folder.METRICS and call.number < saves)
    run_dir = tmp_path / "run"
    argv = train_argv(tiny, run_dir, *SHORT, "training.loss_chunk_rows=7")
    job = fork_server.run("train", argv, fault=fault(run_dir, "kill", at))
    assert job.codes == [-9], job.output
    assert run_folder.steps_saved(run_dir)[0] == 4
    assert fork_server.run("train", argv).codes == [0]
    first, second = (files.sha256_file(each / "final" / "model.safetensors") for each in (chunked, run_dir))
    assert first == second
    assert metrics_of(run_dir) == metrics_of(chunked)
