"""What a model remembers of the tokens it has seen: values of constant size."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flopwise.linear_attention import LinearState


class LayerState(NamedTuple):
    """What a layer remembers of the positions before."""

    attention: LinearState
    recent: Float[Tensor, "b taps qkv"]


class ModelState(NamedTuple):
    """What a model remembers of the positions before: a value of constant size, never changed in place.

    Args:
        memory: S of every layer, sequence and head.
        normaliser: z likewise.
        recent: the last inputs of the short convolution; "thesis" has none and keeps 0 of them.
        position: the number of tokens seen.
    """

    memory: Float[Tensor, "layers b h e m"]
    normaliser: Float[Tensor, "layers b h e"]
    recent: Float[Tensor, "layers b taps qkv"]
    position: Int[Tensor, " b"]

    def reorder(self, index: Int[Tensor, " n"]) -> "ModelState":
        """The states of the sequences that `index` names, which may repeat: beam search."""
        memory, normaliser, recent = (part.index_select(1, index) for part in self[:3])
        return ModelState(memory, normaliser, recent, self.position[index])

    def fork(self, copies: int) -> "ModelState":
        """Each sequence `copies` times, side by side: many continuations of a prompt that was computed once."""
        return self.reorder(torch.arange(len(self.position), device=self.position.device).repeat_interleave(copies))

    def layer(self, number: int) -> LayerState:
        return LayerState(LinearState(self.memory[number], self.normaliser[number]), self.recent[number])
