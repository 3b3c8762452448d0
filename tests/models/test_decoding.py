"""The decoder, on every backend and at every number of sequences, against the model's own pure steps."""

import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_causal_lm import RECIPES, small, tokens

from flopwise.models import Sampling
from flopwise.models.causal_lm import Recipe
from flopwise.models.decoding import SMALL, pack, round_to_int8

NO_NUMBA = pytest.mark.skipif(find_spec("numba") is None, reason="the extra `cpu` is not installed")
BACKENDS = ("torch", pytest.param("numba", marks=NO_NUMBA))


@pytest.fixture(autouse=True)
def narrow_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small matrices have several panels too, the last one narrower."""
    monkeypatch.setattr("flopwise.models.decoding.PANEL", 32)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 3, SMALL + 2])
@pytest.mark.parametrize("max_length", [None, 12])
def test_steps_are_the_models(recipe: Recipe, backend, batch: int, max_length, generator):
    model = small(recipe, generator, max_length=max_length)
    ids = tokens(batch, 12, generator=generator)
    decoder = model.decoder(batch, backend=backend)
    assert decoder.backend == backend
    with torch.no_grad():
        state, logits = model.prefill(ids[:, :5])
        torch.testing.assert_close(decoder.feed(ids[:, :5]), logits)
        for i in range(5, 10):
            state, logits = model.step(state, ids[:, i])
            torch.testing.assert_close(decoder.step(ids[:, i]), logits)
        for part, wanted in zip(decoder.state, state, strict=True):
            torch.testing.assert_close(part, wanted)
        _, logits = model.prefill(ids[:, 10:], state=state)
        torch.testing.assert_close(decoder.feed(ids[:, 10:]), logits)  # a second prompt goes on from the first


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_from_the_first_token(recipe: Recipe, backend, generator):
    model = small(recipe, generator)
    ids = tokens(2, 4, generator=generator)
    decoder = model.decoder(2, backend=backend)
    steps = torch.stack([decoder.step(ids[:, i]) for i in range(4)], 1)
    torch.testing.assert_close(steps, model(ids).detach())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [2, SMALL + 1])
def test_int8_is_the_model_with_rounded_weights(recipe: Recipe, backend, batch: int, generator):
    """The reference is float32 arithmetic on the rounded, unfolded matrices."""
    model = small(recipe, generator)
    ids = tokens(batch, 6, generator=generator)
    decoder = model.decoder(batch, weights="int8", backend=backend)
    logits = torch.stack([decoder.step(ids[:, i]) for i in range(6)], 1)

    packed, dim = pack(model, "int8"), model.config["dim"]
    blocks: list[Any] = list(model.blocks)
    last: Any = model.norm
    with torch.no_grad():
        for layer, block in enumerate(blocks):
            linears = (block.attention.project, block.attention.out, block.up, block.down)
            for linear, matrix in zip(linears, (packed.project, packed.out, packed.up, packed.down), strict=True):
                linear.weight.copy_(matrix.values[layer] * matrix.scale[layer][:, None])
                if linear.bias is not None:
                    linear.bias.copy_(matrix.bias[layer])
            norms = [block.attention_norm, block.ff_norm]
            for norm in norms:
                norm.weight.fill_(1)
                if hasattr(norm, "bias"):
                    norm.bias.zero_()
            if recipe == "modern":
                block.attention.out_norm.copy_(torch.ones(dim))
        model.head.weight.copy_(packed.head.values[0] * packed.head.scale[0][:, None])
        if model.head.bias is not None:
            model.head.bias.copy_(packed.head.bias[0])
        last.weight.fill_(1)
        if hasattr(last, "bias"):
            last.bias.zero_()
        torch.testing.assert_close(logits, model(ids))


def test_rounding_is_within_half_a_step(generator):
    x = torch.randn(5, 7, 33, generator=generator)
    x[0, 0] = 0
    values, scale = round_to_int8(x)
    assert values.dtype == torch.int8
    assert ((x - values * scale[..., None]).abs() <= 0.5001 * scale[..., None]).all()
    assert (values.abs().amax(-1)[x.abs().amax(-1) > 0] == 127).all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, SMALL + 1])
def test_greedy_is_the_most_probable_token_of_the_whole_forward(recipe: Recipe, backend, batch: int, generator):
    model = small(recipe, generator)
    ids = tokens(batch, 7, generator=generator)
    wanted = ids
    for _ in range(12):
        wanted = torch.cat([wanted, model(wanted)[:, -1:].argmax(-1)], 1)
    decoder = model.decoder(batch, backend=backend)
    assert torch.equal(model.generate(ids, max_new_tokens=12, decoder=decoder), wanted)
    assert torch.equal(model.generate(ids, max_new_tokens=12), wanted)
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)


def test_prompts_of_different_lengths(generator):
    model = small("modern", generator)
    short, long = tokens(1, 3, generator=generator), tokens(1, 8, generator=generator)
    ids = torch.cat([torch.cat([torch.zeros(1, 5, dtype=torch.int64), short], 1), long])
    keep = torch.ones(2, 8, dtype=torch.bool)
    keep[0, :5] = False
    new = model.generate(ids, max_new_tokens=9, key_mask=keep)[:, 8:]
    assert torch.equal(new[:1], model.generate(short, max_new_tokens=9)[:, 3:])
    assert torch.equal(new[1:], model.generate(long, max_new_tokens=9)[:, 8:])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_snapshots_forks_and_rewinds(recipe: Recipe, backend, generator):
    model = small(recipe, generator)
    prompt = tokens(1, 6, generator=generator)
    decoder = model.decoder(backend=backend)
    decoder.feed(prompt)
    start = decoder.snapshot()
    kept = [part.clone() for part in (*start.state, start.logits)]

    first = decoder.generate(8)
    assert torch.equal(torch.cat([prompt, first], 1), model.generate(prompt, max_new_tokens=8))
    decoder.rewind(start)
    many = decoder.fork(SMALL + 1)
    assert torch.equal(many.generate(8), first.repeat(SMALL + 1, 1))
    assert torch.equal(decoder.generate(8), first)  # the fork left it where it was
    decoder.rewind(start)
    assert torch.equal(decoder.generate(8), first)

    many.rewind(start)  # back to one sequence
    assert torch.equal(many.generate(8), first)
    other = model.decoder(backend="torch")
    other.rewind(start)
    assert torch.equal(other.generate(8), first)
    assert all(torch.equal(a, b) for a, b in zip((*start.state, start.logits), kept, strict=True))


def test_results_do_not_change_with_the_decoder(generator):
    model = small("thesis", generator)
    decoder = model.decoder()
    first = decoder.step(torch.tensor([3]))
    kept, state = first.clone(), decoder.state
    memory = state.memory.clone()
    decoder.step(torch.tensor([4]))
    assert torch.equal(first, kept) and torch.equal(state.memory, memory)
    assert not first.is_inference() and not state.memory.is_inference()
    with torch.no_grad():
        model.head.weight.zero_()
    assert decoder.step(torch.tensor([4])).abs().max() > 0.1  # its weights are its own


def test_long_generation_outgrows_the_table_of_positions(generator):
    model = small("thesis", generator)
    decoder = model.decoder()
    ids = tokens(1, 1100, generator=generator)
    logits = decoder.feed(ids[:, :1020])
    for i in range(1020, 1100):
        logits = decoder.step(ids[:, i])
    torch.testing.assert_close(logits, model(ids)[:, -1].detach(), rtol=1e-4, atol=1e-4)


def test_stop_tokens_end_each_sequence_and_then_all(generator):
    model = small("thesis", generator)
    ids = tokens(3, 4, generator=generator)
    free = model.generate(ids, max_new_tokens=40)[:, 4:]
    stops = (int(free[0, 3]), int(free[1, 9]))
    got = model.generate(ids, max_new_tokens=40, stop_tokens=stops)[:, 4:]
    ends = []
    for row in range(3):
        hits = [i for i in range(40) if int(free[row, i]) in stops]
        ends.append(hits[0] if hits else 39)
        assert got[row, : ends[row] + 1].tolist() == free[row, : ends[row] + 1].tolist()
        assert (got[row, ends[row] :] == got[row, ends[row]]).all()
    assert got.shape[1] == max(ends) + 1


def test_tokens_come_one_at_a_time(generator):
    model = small("thesis", generator)
    ids = tokens(2, 4, generator=generator)
    decoder = model.decoder(2)
    stream = model.stream(ids, max_new_tokens=5, decoder=decoder)
    first = next(stream)
    assert decoder.state.position.tolist() == [5, 5]
    rest = list(stream)
    assert torch.equal(torch.stack([first, *rest], 1), model.generate(ids, max_new_tokens=5)[:, 4:])


def test_draws_follow_the_generator(generator):
    model = small("modern", generator)
    ids = tokens(6, 4, generator=generator)

    def draw(seed: int) -> torch.Tensor:
        own = torch.Generator().manual_seed(seed)
        return model.generate(ids, max_new_tokens=8, temperature=1.0, top_k=20, top_p=0.95, generator=own)

    torch.manual_seed(1)
    first = draw(0)
    torch.manual_seed(2)
    assert torch.equal(draw(0), first)
    assert not torch.equal(draw(1), first)


def test_mistakes_are_explained(generator, monkeypatch: pytest.MonkeyPatch):
    model = small("thesis", generator)
    decoder = model.decoder(2)
    for call in (decoder.snapshot, lambda: decoder.generate(3)):
        with pytest.raises(ValueError, match="`feed` a prompt"):
            call()
    with pytest.raises(ValueError, match="decodes 2 sequences at a time; got 3"):
        decoder.step(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs generator"):
        model.generate(torch.zeros(1, 1, dtype=torch.int64), max_new_tokens=1, temperature=1.0)
    limited = small("thesis", generator, max_length=3).decoder()
    for _ in range(3):
        limited.step(torch.tensor([1]))
    with pytest.raises(ValueError, match="at most max_length=3"):
        limited.step(torch.tensor([1]))

    monkeypatch.setattr("flopwise.models.decoding.find_spec", lambda name: None)
    fallback = model.decoder()
    assert fallback.backend == "torch" and "flopwise[cpu]" in fallback.because
    with pytest.raises(ValueError, match=r"cannot run.*flopwise\[cpu\]"):
        model.decoder(backend="numba")


def test_without_the_shape_checks():
    """numba is imported when it is used; options that are not known are explained."""
    code = """
import sys, torch
from flopwise.models import LinearCausalLM

def explains(call):
    try:
        call()
    except ValueError as error:
        return str(error)

assert explains(lambda: LinearCausalLM(9, recipe="old")) == "recipe is one of thesis, modern; got 'old'."
model = LinearCausalLM(9, 8, 1, 2, 8)
model.decoder(backend="torch").step(torch.tensor([1]))
assert explains(lambda: model.decoder(weights="int4")) == "weights is one of float32, int8; got 'int4'."
assert explains(lambda: model.decoder(backend="c")) == "backend is one of auto, numba, torch; got 'c'."
assert "numba" not in sys.modules and "safetensors" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_sampling_is_the_distribution_it_names(generator):
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])
    full = (logits / 0.7).softmax(-1)[0]
    cases = [
        (Sampling(0.7), full),
        (Sampling(0.7, top_k=2), torch.where(torch.arange(5) < 2, full, 0)),
        (Sampling(0.7, top_p=0.9), torch.where(torch.arange(5) < 3, full, 0)),
        (Sampling(0.7, top_p=1e-6), torch.where(torch.arange(5) < 1, full, 0)),
        # of the 2 that are kept, the first holds 0.81 of the mass
        (Sampling(0.7, top_k=2, top_p=0.8), torch.where(torch.arange(5) < 1, full, 0)),
        (Sampling(0.7, top_k=99, top_p=1.0), full),
    ]
    assert float(full[:2].sum()) < 0.9 < float(full[:3].sum())
    draws, rows = 20_000, torch.tensor([4, 2, 0, 3, 1])  # in an order that is not sorted
    for sampling, p in cases:
        shuffled = logits[:, rows].expand(draws, -1)
        drawn = sampling.choose(shuffled, generator)
        counts = torch.bincount(rows[drawn], minlength=5).double()
        p = (p / p.sum()).double()
        assert counts[p == 0].sum() == 0
        chi = ((counts - draws * p) ** 2 / (draws * p))[p > 0].sum()
        assert chi < 18.5  # 99.9 % of chi-square with 4 degrees of freedom
    assert Sampling().choose(torch.tensor([[0.0, 3.0, 3.0]]), None).tolist() == [1]


@pytest.mark.parametrize(
    ("options", "says"),
    [({"temperature": -1}, "at least 0"), ({"top_k": 0}, "at least 1"), ({"top_p": 0.0}, "above 0")],
)
def test_a_sampling_that_is_none_is_explained(options, says: str):
    with pytest.raises(ValueError, match=says):
        Sampling(**options)


@NO_NUMBA
def test_the_vectors_exponential_is_exp():
    from flopwise.models.kernels import numba

    x = -torch.rand(2000, generator=torch.Generator().manual_seed(0)).mul(87)
    x[:3] = torch.tensor([0.0, -87.0, -1e-6])
    got = torch.tensor([float(numba._exp(numba.F(value))) for value in x.tolist()], dtype=torch.float64)
    assert ((got / x.double().exp() - 1).abs() < 5e-7).all()
    assert numba._exp(numba.F("nan")) != numba._exp(numba.F("nan"))
    assert 0 < numba._exp(numba.F("-inf")) < 1e-37
