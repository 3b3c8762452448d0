"""Linear attention as a recurrent network: a state of constant size, and one step of it."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from flopwise.linear_attention.feature_maps import FeatureMap, features_of


class LinearState(NamedTuple):
    """What linear attention remembers of all positions so far; a value, never changed in place.

        S = sum_j phi(k_j) v_j^T        z = sum_j phi(k_j)

    Its size does not depend on how many there were. float32, or float64 for float64 inputs.
    """

    memory: Float[Tensor, "b g f m"]
    normaliser: Float[Tensor, "b g f"]

    def reorder(self, index: Int[Tensor, " beams"]) -> "LinearState":
        """The states of texts `index`, in that order: what beam search does to its cache."""
        return LinearState(self.memory.index_select(0, index), self.normaliser.index_select(0, index))


def init_state(
    batch: int,
    heads: int,
    feature_width: int,
    value_width: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> LinearState:
    """The state before the first position: zeros. `heads` are those of the key; see `feature_width`."""
    memory = torch.zeros(batch, heads, feature_width, value_width, dtype=dtype, device=device)
    return LinearState(memory, memory.new_zeros(batch, heads, feature_width))


def step(
    state: LinearState,
    query: Float[Tensor, "b h e"],
    key: Float[Tensor, "b g e"],
    value: Float[Tensor, "b g m"],
    *,
    feature_map: FeatureMap = "elu",
    decay: Float[Tensor, " g"] | None = None,
) -> tuple[LinearState, Float[Tensor, "b h m"]]:
    """One position of causal linear attention, in time and memory that do not depend on how many came before.

        S_i = decay S_{i-1} + phi(k_i) v_i^T,   z_i = decay z_{i-1} + phi(k_i),   y_i = phi(q_i)^T S_i / phi(q_i)^T z_i

    Pure: the state passed in stays what it was, so branches of a beam search may share it.

    Args:
        state: from `init_state`, an earlier step, or `linear_attention(..., return_state=True)`.
        query, key, value: of one position; query head i reads key head i // (h / g).
        feature_map, decay: as in `linear_attention`.

    Returns:
        The new state, and the output in the query's dtype.

    Source: Katharopoulos et al., ICML 2020, section 3.4, equations 16 to 20.
    """
    memory, normaliser = state
    q = features_of(feature_map, query[:, :, None])[:, :, 0].to(memory.dtype)
    k = features_of(feature_map, key[:, :, None])[:, :, 0].to(memory.dtype)
    if decay is not None:
        memory, normaliser = memory * decay[:, None, None], normaliser * decay[:, None]
    memory = memory + k[..., :, None] * value[..., None, :].to(memory.dtype)
    normaliser = normaliser + k

    grouped = q.unflatten(1, (k.shape[1], -1))  # the query heads that read one key head
    denominator = grouped @ normaliser[..., None]
    out = torch.where(denominator == 0, 0.0, grouped @ memory / denominator)
    return LinearState(memory, normaliser), out.flatten(1, 2).to(query.dtype)
