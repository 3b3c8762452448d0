"""Decoding with the state in place: one token a step, and nothing allocated or recomputed between them.

The weights are packed once: all layers in one array, the norms' factors folded into the matrices that follow them
(W (g n + b) = (W g) n + W b). With numba, up to `SMALL` sequences are decoded by one call through the whole stack,
which reads each weight once; more sequences use torch's matrix products, with numba or torch in between. For these the
matrices are kept a second time, in the order that torch reads fastest.
"""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from flopwise.models.kernels import torch as torch_kernels
from flopwise.models.sampling import GREEDY, Sampling
from flopwise.models.state import ModelState

Backend = Literal["auto", "numba", "torch"]
Weights = Literal["float32", "int8"]
SMALL = 4  # sequences up to which reading the weights, not the arithmetic, is what a step costs
PANEL = 512  # outputs of a matrix that torch computes in one product


class Snapshot(NamedTuple):
    """A moment of a `Decoder`, to come back to."""

    state: ModelState
    logits: Float[Tensor, "b vocab"]


class Decoder:
    """Decodes `batch` sequences with a model, from the beginning of a text.

        decoder = model.decoder()
        decoder.feed(prompt)                       # computed once
        start = decoder.snapshot()
        for _ in range(3):
            decoder.rewind(start)
            ids = decoder.generate(100, sampling=Sampling(temperature=0.8), generator=generator)
        many = decoder.fork(16)                    # 16 sequences that go on from here

    Args:
        model: a `LinearCausalLM`. Its weights are copied: a decoder does not follow later training.
        batch: sequences that are decoded together.
        weights: "int8" rounds every matrix to 8 bits, a scale for each row; a quarter of the memory to read. A prompt
            goes through the model's own weights. Where torch multiplies, the rounded weights are kept in float32: the
            same numbers, no gain.
        backend: "numba" (CPU), "torch", or whichever can run.

    Attributes:
        backend: what decodes, and `because`: why that was chosen.
        logits: of the token that comes next; None before the first.

    Raises:
        ValueError: an option is not known, or numba was asked for and cannot run.
    """

    def __init__(self, model: Any, batch: int = 1, *, weights: Weights = "float32", backend: Backend = "auto") -> None:
        for name, value, known in (("weights", weights, Weights), ("backend", backend, Backend)):
            if value not in get_args(known):
                raise ValueError(f"{name} is one of {', '.join(get_args(known))}; got {value!r}.")
        self._model = model
        self._packed = pack(model, weights)
        obstacle = _numba_obstacle(self._packed.head.values.device)
        if backend == "numba" and obstacle:
            raise ValueError(f"backend='numba' cannot run: {obstacle}")
        self.backend = "torch" if obstacle or backend == "torch" else "numba"
        reason = obstacle or "numba is installed and the model is on the CPU."
        self.because = reason if backend == "auto" else f"backend={backend!r} was asked for."
        self._kernels: Any = torch_kernels
        if self.backend == "numba":
            from flopwise.models.kernels import numba as numba_kernels

            self._kernels = numba_kernels
        self.logits: Tensor | None = None
        self._reset(model.init_state(batch))

    @property
    def state(self) -> ModelState:
        """The state now, as a value: a copy."""
        return ModelState(*(part.clone() for part in self._state))

    def feed(self, ids: Int[Tensor, "b n"], *, key_mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b vocab"]:
        """Take up `ids`, all in one pass, and return the logits of the token that comes next; see `prefill`."""
        self._check_batch(len(ids))
        with torch.inference_mode():
            snapshot = Snapshot(*self._model.prefill(ids, key_mask=key_mask, state=self._state))
        self.rewind(snapshot)
        return self._known_logits()

    def step(self, ids: Int[Tensor, " b"]) -> Float[Tensor, "b vocab"]:
        """Take up one token for each sequence and return the logits of the one that comes next."""
        self._check_batch(len(ids))
        with torch.inference_mode():
            self._embed(ids)
            if self.backend == "numba" and len(ids) <= SMALL:
                self._kernels.stack(*self._whole_stack)
            else:
                self._layer_by_layer()
        self.logits = self._logits.clone()
        return self.logits

    def stream(
        self, max_new_tokens: int, *, sampling: Sampling = GREEDY, generator: torch.Generator | None = None
    ) -> Iterator[Int[Tensor, " b"]]:
        """Up to `max_new_tokens` tokens for each sequence, one position at a time, as they are chosen.

        Every token that is yielded is taken up, the last one too. A sequence that has stopped repeats its stop token;
        when all have, the stream ends.

        Raises:
            ValueError: nothing was fed yet.
        """
        logits = self._known_logits()
        stops = torch.tensor(list(sampling.stop_tokens), dtype=torch.int64, device=logits.device)
        stopped = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
        token = torch.zeros_like(stopped, dtype=torch.int64)
        for _ in range(max_new_tokens):
            chosen = sampling.choose(logits, generator)
            token = torch.where(stopped, token, chosen) if len(stops) else chosen
            logits = self.step(token)
            yield token
            if len(stops):
                stopped = stopped | torch.isin(token, stops)
                if stopped.all():
                    return

    def generate(
        self, max_new_tokens: int, *, sampling: Sampling = GREEDY, generator: torch.Generator | None = None
    ) -> Int[Tensor, "b new"]:
        """The tokens of `stream`, together."""
        tokens = list(self.stream(max_new_tokens, sampling=sampling, generator=generator))
        return torch.stack(tokens, 1) if tokens else self._state.position.new_zeros(len(self._state.position), 0)

    def snapshot(self) -> Snapshot:
        """This moment, to `rewind` to; it does not change with the decoder.

        Raises:
            ValueError: nothing was fed yet.
        """
        return Snapshot(self.state, self._known_logits())

    def rewind(self, snapshot: Snapshot) -> None:
        """Go back (or on) to a moment of this or another decoder of the same model."""
        if snapshot.state.memory.shape == self._state.memory.shape:
            with torch.inference_mode():
                for part, new in zip(self._state, snapshot.state, strict=True):
                    part.copy_(new)
            self._longest = int(self._state.position.max())
        else:
            self._reset(snapshot.state)
        self.logits = snapshot.logits.clone()

    def fork(self, copies: int) -> "Decoder":
        """A new decoder with each sequence `copies` times, side by side; it shares the weights with this one."""
        forked = copy(self)
        forked._reset(self._state.fork(copies))
        forked.logits = None if self.logits is None else self.logits.repeat_interleave(copies, 0)
        return forked

    def _reset(self, state: ModelState) -> None:
        """Buffers for this many sequences, in this state."""
        packed = self._packed
        self._state = ModelState(*(part.clone(memory_format=torch.contiguous_format) for part in state))
        self._longest = int(state.position.max())
        self._table = self._model.positions(state.position[:0])  # grows when it is used

        def buffer(width: int) -> Tensor:
            return torch.empty(len(state.position), width, device=packed.embedding.device)

        dim = packed.embedding.shape[1]
        self._x, self._normed, self._attended = buffer(dim), buffer(dim), buffer(dim)
        self._projected, self._hidden = buffer(packed.project.rows), buffer(packed.up.rows)
        self._logits = buffer(packed.head.rows)

        given: Callable[[Tensor], Any] = Tensor.numpy if self.backend == "numba" else lambda tensor: tensor
        x, normed, attended, projected, hidden, logits, taps, decay, memory, normaliser, recent = map(
            given,
            (
                *(self._x, self._normed, self._attended, self._projected, self._hidden, self._logits),
                *(packed.taps, packed.decay, *self._state[:3]),
            ),
        )
        self._pieces = list(map(pieces, (self._x, self._projected, self._hidden, self._logits)))
        self._attention = taps, decay, memory, normaliser, recent
        self._between = x, normed, attended, projected, hidden
        if self.backend == "numba":
            matrices = (packed.project, packed.out, packed.up, packed.down, packed.head)
            weights = (part.numpy() for matrix in matrices for part in (matrix.values, matrix.scale, matrix.bias))
            self._whole_stack = (
                *(packed.modern, *weights, *self._attention),
                *(x, normed, projected, attended, hidden, logits),
            )

    def _embed(self, ids: Int[Tensor, " b"]) -> None:
        """The first value of the residual stream; the state's positions move on by one."""
        torch.index_select(self._packed.embedding, 0, ids, out=self._x)
        if self._table is not None:
            if self._longest >= len(self._table):
                length = self._model.max_length or max(1024, 2 * self._longest)
                length = max(length, self._longest + 1)  # beyond max_length the model complains
                self._table = self._model.positions(torch.arange(length, device=ids.device)).float()
            self._x += self._table.index_select(0, self._state.position)
        self._state.position.add_(1)
        self._longest += 1

    def _layer_by_layer(self) -> None:
        """`stack` in pieces: torch multiplies by the matrices, the kernels do what is between."""
        packed, kernels, modern = self._packed, self._kernels, self._packed.modern
        x, normed, attended, projected, hidden = self._between
        into_x, into_projected, into_hidden, into_logits = self._pieces
        for layer in range(len(self._state.memory)):
            kernels.normalise(modern, x, normed)
            packed.project.multiply(layer, self._normed, into_projected)
            kernels.attend(modern, layer, projected, *self._attention, attended)
            packed.out.multiply(layer, self._attended, into_x, add=True)
            kernels.normalise(modern, x, normed)
            packed.up.multiply(layer, self._normed, into_hidden)
            kernels.activate(modern, hidden)
            packed.down.multiply(layer, self._hidden, into_x, add=True)
        kernels.normalise(modern, x, normed)
        packed.head.multiply(0, self._normed, into_logits)

    def _known_logits(self) -> Float[Tensor, "b vocab"]:
        if self.logits is None:
            raise ValueError("this decoder has seen no token yet, so there is nothing to go on from: `feed` a prompt.")
        return self.logits

    def _check_batch(self, given: int) -> None:
        if given != len(self._state.position):
            raise ValueError(
                f"this decoder decodes {len(self._state.position)} sequences at a time; got {given}. "
                "`model.decoder(batch)` makes one for another number, and `fork` multiplies its sequences."
            )


def pieces(whole: Float[Tensor, "b rows"]) -> tuple[Float[Tensor, "b _"], ...]:
    """Views of the outputs of a matrix, for `Matrix.multiply`."""
    return whole.split(PANEL, 1)


@dataclass(frozen=True)
class Matrix:
    """One linear layer of every block: y = scale * (values x) + bias."""

    values: Shaped[Tensor, "layers rows columns"]  # float32 or int8
    scale: Float[Tensor, "layers rows"]
    bias: Float[Tensor, "layers rows"]

    @property
    def rows(self) -> int:
        return self.values.shape[1]

    def multiply(
        self, layer: int, x: Float[Tensor, "b columns"], out: tuple[Float[Tensor, "b _"], ...], *, add: bool = False
    ) -> None:
        """The same for all rows of `x`, by torch, into the `pieces` of the result; added to them if `add`."""
        for piece, bias, panel in zip(out, *self._panels[layer], strict=True):
            if add:
                piece.addmm_(x, panel).add_(bias)
            else:
                torch.addmm(bias, x, panel, out=piece)

    @cached_property
    def _panels(self) -> list[tuple[tuple[Tensor, ...], list[Tensor]]]:
        """For each layer the biases and the transposed values, PANEL columns in each piece.

        With rows of `values` as they are, torch's products of 5 to 64 sequences take 1.3 to 1.5 times as long.
        """
        values = self.values
        if values.dtype == torch.int8:
            values = values * self.scale[..., None]
        return [
            (bias.split(PANEL), [panel.T.contiguous() for panel in matrix.split(PANEL)])
            for bias, matrix in zip(self.bias, values, strict=True)
        ]


@dataclass(frozen=True)
class Packed:
    """The weights of a `LinearCausalLM`, all blocks together, its norms' factors folded into the matrices."""

    modern: bool
    embedding: Float[Tensor, "vocab dim"]
    project: Matrix
    out: Matrix
    up: Matrix
    down: Matrix
    head: Matrix
    taps: Float[Tensor, "layers taps qkv"]
    decay: Float[Tensor, " h"]


@torch.no_grad()
def pack(model: Any, weights: Weights) -> Packed:
    """Copies, in float32 or rounded to int8, of the weights of a `LinearCausalLM`."""
    blocks, modern = list(model.blocks), model.recipe == "modern"
    attention = [block.attention for block in blocks]

    def matrix(linears: list[nn.Linear], norms: list[Any]) -> Matrix:
        """W (g n + b) + c = (W g) n + (W b + c), with the factors g and b of the norm before."""
        values, biases = [], []
        for linear, norm in zip(linears, norms, strict=True):
            factor, offset = (norm, None) if isinstance(norm, Tensor) else (norm.weight, getattr(norm, "bias", None))
            weight = linear.weight.float()
            bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.float()
            values.append(weight * factor.float())
            biases.append(bias if offset is None else bias + weight @ offset.float())
        stacked = torch.stack(values)
        rounded, scale = (stacked, torch.ones_like(stacked[..., 0])) if weights == "float32" else round_to_int8(stacked)
        return Matrix(rounded, scale, torch.stack(biases))

    dim, ff = model.config["dim"], model.config["ff"]
    ones = torch.ones(max(dim, ff), device=model.head.weight.device)
    return Packed(
        modern=modern,
        embedding=model.embedding.weight.float().clone(),
        project=matrix([a.project for a in attention], [block.attention_norm for block in blocks]),
        out=matrix([a.out for a in attention], [a.out_norm if modern else ones[:dim] for a in attention]),
        up=matrix([block.up for block in blocks], [block.ff_norm for block in blocks]),
        down=matrix([block.down for block in blocks], [ones[:ff]] * len(blocks)),
        head=matrix([model.head], [model.norm]),
        taps=torch.stack([a.taps.float() for a in attention]) if modern else ones.new_zeros(len(blocks), 0, 3 * dim),
        decay=attention[0].decay.float().clone() if modern else ones.new_ones(model.heads),
    )


def round_to_int8(x: Float[Tensor, "... columns"]) -> tuple[Shaped[Tensor, "... columns"], Float[Tensor, "..."]]:
    """The nearest int8 and a scale for each row: x = scale * values, within half a scale."""
    scale = x.abs().amax(-1).clamp(min=1e-30) / 127
    return (x / scale[..., None]).round().to(torch.int8), scale


def _numba_obstacle(device: torch.device) -> str:
    """Why numba cannot decode here, with the remedy; empty when it can."""
    if find_spec("numba") is None:
        return "numba is not installed; pip install 'flopwise[cpu]'."
    if device.type != "cpu":
        return f"numba runs on the CPU and the model is on {device}; move it with .cpu()."
    return ""
