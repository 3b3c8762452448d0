"""The model's three forms agree, positions and padding mean what they should, and it saves, loads and learns."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from flopwise.models import LinearCausalLM
from flopwise.models.causal_lm import Recipe

RECIPES: tuple[Recipe, ...] = ("thesis", "modern")
pytestmark = pytest.mark.parametrize("recipe", RECIPES)


def small(recipe: Recipe, generator: torch.Generator, **options) -> LinearCausalLM:
    """A model in which nothing is zero or one by initialisation, biases, norms and taps included."""
    model = LinearCausalLM(50, dim=24, depth=2, heads=3, ff=40, recipe=recipe, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=generator)


@torch.no_grad()
@pytest.mark.parametrize("max_length", [None, 13])
@pytest.mark.parametrize("cut", [1, 2, 7, 12])
def test_a_prompt_and_then_steps_are_the_whole_sequence(recipe, max_length, cut, generator):
    model = small(recipe, generator, max_length=max_length)
    ids = tokens(2, 13, generator=generator)
    whole = model(ids)
    state, logits = model.prefill(ids[:, :cut])
    torch.testing.assert_close(logits, whole[:, cut - 1])
    torch.testing.assert_close(model(ids[:, cut:], state=state), whole[:, cut:])
    for i in range(cut, 13):
        state, logits = model.step(state, ids[:, i])
        torch.testing.assert_close(logits, whole[:, i])
    assert state.position.tolist() == [13, 13]


@torch.no_grad()
def test_no_position_sees_a_later_one(recipe, generator):
    model = small(recipe, generator)
    ids = tokens(1, 12, generator=generator)
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1) % 50
    before, after = model(ids)[0], model(changed)[0]
    assert torch.equal(before[:8], after[:8])
    assert ((before[8:] - after[8:]).abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_order_matters(recipe, generator):
    model = small(recipe, generator)
    ids = tokens(1, 12, generator=generator)
    swapped = ids.clone()
    swapped[0, 2], swapped[0, 5] = ids[0, 5], ids[0, 2]
    assert (model(ids)[0, -1] - model(swapped)[0, -1]).abs().max() > 1e-4


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(recipe, generator):
    model = small(recipe, generator)
    short, long = tokens(1, 5, generator=generator), tokens(1, 9, generator=generator)
    ids = torch.cat([torch.cat([tokens(1, 4, generator=generator), short], 1), long])
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[0, :4] = False
    state, logits = model.prefill(ids, key_mask=keep)
    for row, alone in enumerate((short, long)):
        alone_state, alone_logits = model.prefill(alone)
        torch.testing.assert_close(logits[row], alone_logits[0])
        for part, alone_part in zip(state[:3], alone_state[:3], strict=True):
            torch.testing.assert_close(part[:, row], alone_part[:, 0])
    assert state.position.tolist() == [5, 9]
    torch.testing.assert_close(model(ids, key_mask=keep)[0, 4:], model(short)[0])


@torch.no_grad()
def test_states_are_values(recipe, generator):
    model = small(recipe, generator)
    ids = tokens(2, 6, generator=generator)
    state, logits = model.prefill(ids)
    kept = [part.clone() for part in state]
    _, first = model.step(state, logits.argmax(-1))
    _, second = model.step(state, logits.argmax(-1))
    assert torch.equal(first, second)
    assert all(torch.equal(part, before) for part, before in zip(state, kept, strict=True))
    forked = state.fork(3)
    assert forked.position.tolist() == [6] * 6
    for a, b in pairwise(range(3)):
        assert torch.equal(forked.memory[:, a], forked.memory[:, b])
    again = forked.reorder(torch.tensor([0, 3]))
    assert all(torch.equal(part, before) for part, before in zip(again, kept, strict=True))


@torch.no_grad()
def test_the_first_state_is_no_state(recipe, generator):
    model = small(recipe, generator)
    ids = tokens(2, 6, generator=generator)
    assert torch.equal(model(ids, state=model.init_state(2)), model(ids))
    for part, wanted in zip(model.init_state(2), model.prefill(ids)[0], strict=True):
        assert part.shape == wanted.shape and part.dtype == wanted.dtype


@torch.no_grad()
def test_the_state_is_float32_whatever_the_model_is(recipe, generator):
    model = small(recipe, generator).bfloat16()
    state, logits = model.prefill(tokens(2, 6, generator=generator))
    assert logits.dtype == torch.bfloat16
    assert {part.dtype for part in state[:3]} == {torch.float32}


def test_every_parameter_learns(recipe, generator):
    model = small(recipe, generator, max_length=20)
    ids = torch.arange(20)[None] * 7 % 50
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
        loss.backward()
        if not losses:
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert model.generate(ids[:, :4], max_new_tokens=10).tolist() == ids[:, :14].tolist()


@torch.no_grad()
def test_saved_is_loaded(recipe, generator, tmp_path: Path):
    model = small(recipe, generator, max_length=9)
    ids = tokens(2, 6, generator=generator)
    model.save(tmp_path / "a.safetensors", about="not trained at all")
    assert torch.equal(LinearCausalLM.load(tmp_path / "a.safetensors")(ids), model(ids))
    model.save(tmp_path / "b.safetensors", dtype=torch.float16)
    torch.testing.assert_close(LinearCausalLM.load(tmp_path / "b.safetensors")(ids), model(ids), atol=0.02, rtol=0.02)
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata()["about"] == "not trained at all"


def test_initial_weights_follow_the_seed(recipe):
    def total(seed: int) -> float:
        return sum(
            p.detach().double().sum().item() for p in LinearCausalLM(9, 8, 1, 2, 8, recipe, seed=seed).parameters()
        )

    torch.manual_seed(5)
    first = total(3)
    torch.manual_seed(6)
    assert total(3) == first != total(4)


def test_mistakes_are_explained(recipe, generator, tmp_path: Path):
    with pytest.raises(ValueError, match="multiple of 2 and of heads; got dim=10, heads=4"):
        LinearCausalLM(9, 10, 1, 4, recipe=recipe)
    model = small(recipe, generator, max_length=5)
    with pytest.raises(ValueError, match="at most max_length=5 tokens; got position 5"):
        model(tokens(1, 6, generator=generator))
    with pytest.raises(ValueError, match="at least one token"):
        model.prefill(torch.zeros(1, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="padded on the left"):
        model.prefill(tokens(1, 3, generator=generator), key_mask=torch.tensor([[True, True, False]]))
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no model saved by"):
        LinearCausalLM.load(tmp_path / "other.safetensors")
