"""A language model whose attention is linear: trained like a transformer, decoded like an RNN.

    model = LinearCausalLM(256, recipe="modern")
    logits = model(ids)                                    # training: all positions at once
    state, logits = model.prefill(prompt)                  # the prompt in one pass; the state has a constant size
    state, logits = model.step(state, logits.argmax(-1))   # one token more; both states stay valid
    ids = model.generate(prompt, max_new_tokens=100)       # the same through `Decoder`, much faster

Two recipes for a block, x + attention(norm(x)), then x + down(activation(up(norm(x)))):

| | "thesis" | "modern" |
|---|---|---|
| positions | sinusoids added to the embedding | none: decay and convolution tell near from far |
| norm | LayerNorm | RMSNorm, no biases anywhere |
| before attention | | a causal convolution of 4 taps on q, k and v; q and k of norm sqrt(width of a head) |
| attention | phi = elu + 1, normalised | the same with a fixed decay for each head |
| after attention | | RMSNorm for each head, times silu(gate), a fourth projection of x |
| activation | relu | relu squared |

Source: Katharopoulos et al. 2020 ("thesis"). "modern" collects what later ablations found to matter: decay and head
norm of RetNet (Sun et al. 2023), norms of q and k, convolution and output gate of Gated DeltaNet (Yang et al. 2024),
relu squared (So et al. 2021). The normaliser is a positive factor for each head, so the norm that follows cancels it.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from flopwise.linear_attention import linear_attention
from flopwise.models.decoding import Backend, Decoder, Weights
from flopwise.models.sampling import GREEDY, Sampling
from flopwise.models.state import LayerState, ModelState

Recipe = Literal["thesis", "modern"]
TAPS = 4  # of the short convolution
EPS = 1e-5  # of every norm


class LinearCausalLM(nn.Module):
    """Token ids (b, n) to the logits of the next token (b, n, vocab_size).

    Args:
        vocab_size: number of tokens.
        dim: width of the residual stream; a multiple of 2 and of `heads`.
        depth: number of blocks.
        heads: attention heads, of width dim / heads.
        ff: width of the feed-forward networks.
        recipe: see the module's table.
        max_length: positions are a learned table of this many rows, and no sequence may be longer; None for the
            recipe's own positions, without a limit.
        seed: of the initial weights.

    Raises:
        ValueError: `dim` does not fit, or the recipe is not known.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 256,
        depth: int = 8,
        heads: int = 8,
        ff: int = 1024,
        recipe: Recipe = "thesis",
        *,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if recipe not in get_args(Recipe):
            raise ValueError(f"recipe is one of {', '.join(get_args(Recipe))}; got {recipe!r}.")
        if dim % heads or dim % 2:
            raise ValueError(f"dim is a multiple of 2 and of heads; got dim={dim}, heads={heads}.")
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "ff": ff,
            "recipe": recipe,
            "max_length": max_length,
        }
        self.heads, self.recipe, self.max_length = heads, recipe, max_length
        self.embedding = nn.Embedding(vocab_size, dim)
        self.position = None if max_length is None else nn.Embedding(max_length, dim)
        self.blocks = nn.ModuleList([Block(dim, heads, ff, recipe) for _ in range(depth)])
        self.norm = _norm(dim, recipe)
        self.head = nn.Linear(dim, vocab_size, bias=recipe == "thesis")
        self.initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fresh weights: normal, of variance 1 / inputs; what adds to the residual stream is divided by sqrt(2 depth).

        Rows of the embedding have the size of the sinusoids, so neither drowns the other.
        """
        if self.head.weight.is_meta:  # Hugging Face fills the weights in afterwards
            return
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                if name.endswith((".out", ".down")):
                    std /= math.sqrt(2 * len(self.blocks))
                module.weight.normal_(0, std if module is not self.head else 0.02, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.5, generator=generator)

    def forward(
        self,
        ids: Int[Tensor, "b n"],
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
        state: ModelState | None = None,
    ) -> Float[Tensor, "b n vocab"]:
        """The logits of all positions at once.

        Args:
            key_mask: True for tokens, False for padding, which no position sees and which takes no position.
            state: of the tokens before `ids`; none by default.

        Raises:
            ValueError: the sequence is longer than `max_length`.
        """
        return self.head(self.hidden(ids, key_mask=key_mask, state=state))

    def hidden(
        self,
        ids: Int[Tensor, "b n"],
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
        state: ModelState | None = None,
    ) -> Float[Tensor, "b n dim"]:
        """What the head is applied to."""
        return self.norm(self._blocks(ids, key_mask, state)[0])

    def prefill(
        self,
        ids: Int[Tensor, "b n"],
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
        state: ModelState | None = None,
    ) -> tuple[ModelState, Float[Tensor, "b vocab"]]:
        """The state after `ids`, in one pass, and the logits of the token that comes next.

        Prompts of different lengths are padded on the left, so that each ends at the last position.

        Raises:
            ValueError: there is no token, or padding that is not on the left.
        """
        state, x = self.advance(ids, key_mask=key_mask, state=state)
        return state, self.head(x[:, -1])

    def advance(
        self,
        ids: Int[Tensor, "b n"],
        *,
        key_mask: Bool[Tensor, "b n"] | None = None,
        state: ModelState | None = None,
    ) -> tuple[ModelState, Float[Tensor, "b n dim"]]:
        """`prefill`, with `hidden` at every position in place of the logits of the last."""
        if ids.shape[1] == 0:
            raise ValueError("a prompt has at least one token; got none. Begin with the token that begins a text.")
        if key_mask is not None and not (key_mask[:, -1].all() and (key_mask.int().diff(dim=1) >= 0).all()):
            raise ValueError(
                "prompts of different lengths are padded on the left: each row of key_mask is False up to its first "
                "token and True from there on, to the end. Got padding between or after the tokens."
            )
        x, layers = self._blocks(ids, key_mask, state)
        seen = torch.full_like(ids[:, 0], ids.shape[1]) if key_mask is None else key_mask.sum(1)
        state = ModelState(
            torch.stack([layer.attention.memory for layer in layers]),
            torch.stack([layer.attention.normaliser for layer in layers]),
            torch.stack([layer.recent for layer in layers]),
            seen if state is None else state.position + seen,
        )
        return state, self.norm(x)

    def step(self, state: ModelState, ids: Int[Tensor, " b"]) -> tuple[ModelState, Float[Tensor, "b vocab"]]:
        """One token more for each sequence: the new state, and the logits of the token that comes next.

        It is pure and as slow as torch's operations one by one; `decoder` does the same in place.
        """
        return self.prefill(ids[:, None], state=state)

    def init_state(self, batch: int) -> ModelState:
        """The state before the first token."""
        weight = self.embedding.weight
        config, width = self.config, self.config["dim"] // self.heads

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(config["depth"], batch, *shape, device=weight.device)

        taps = TAPS - 1 if self.recipe == "modern" else 0
        return ModelState(
            zeros(self.heads, width, width),
            zeros(self.heads, width),
            zeros(taps, 3 * config["dim"]),
            torch.zeros(batch, dtype=torch.int64, device=weight.device),
        )

    def decoder(self, batch: int = 1, *, weights: Weights = "float32", backend: Backend = "auto") -> Decoder:
        """A session that decodes `batch` sequences; see `Decoder`."""
        return Decoder(self, batch, weights=weights, backend=backend)

    def stream(
        self,
        ids: Int[Tensor, "b n"],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        generator: torch.Generator | None = None,
        key_mask: Bool[Tensor, "b n"] | None = None,
        decoder: Decoder | None = None,
    ) -> Iterator[Int[Tensor, " b"]]:
        """The new tokens of `generate`, one position at a time, as they are chosen."""
        decoder = self.decoder(len(ids)) if decoder is None else decoder
        decoder.feed(ids, key_mask=key_mask)
        return decoder.stream(max_new_tokens, sampling=sampling, generator=generator)

    def generate(
        self,
        ids: Int[Tensor, "b n"],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        stop_tokens: Sequence[int] = (),
        generator: torch.Generator | None = None,
        key_mask: Bool[Tensor, "b n"] | None = None,
        decoder: Decoder | None = None,
    ) -> Int[Tensor, "b total"]:
        """`ids` and up to `max_new_tokens` tokens more.

        Args:
            temperature, top_k, top_p, stop_tokens: see `Sampling`; greedy unless temperature is above 0. A sequence
                that has stopped repeats its stop token until all have, which ends the generation.
            generator: needed when tokens are drawn.
            key_mask: False for padding, on the left.
            decoder: a session to go on from, as it stands: with a prompt in it already, or with int8 weights.

        Raises:
            ValueError: see `prefill` and `Sampling`.
        """
        sampling = Sampling(temperature, top_k, top_p, stop_tokens)
        new = self.stream(
            ids,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            generator=generator,
            key_mask=key_mask,
            decoder=decoder,
        )
        return torch.cat([ids, *(token[:, None] for token in new)], 1)

    def save(self, path: str | Path, *, dtype: torch.dtype = torch.float32, about: str = "") -> None:
        """Write the weights, as `dtype`, and the configuration to one safetensors file.

        Args:
            about: how the model was trained, for those who find the file; read by `about`.
        """
        save_file = _safetensors().torch.save_file
        weights = {name: value.to(dtype).contiguous() for name, value in self.state_dict().items()}
        save_file(weights, path, metadata={"config": json.dumps(self.config), "about": about})

    @classmethod
    def load(cls, path: str | Path) -> "LinearCausalLM":
        """The model that `save` wrote, in float32.

        Raises:
            ValueError: the file is not one of these.
        """
        with _safetensors().safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "config" not in metadata:
                raise ValueError(f"{path} is no model saved by `LinearCausalLM.save`: it has no configuration.")
            model = cls(**json.loads(metadata["config"]))
            model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        return model

    def positions(self, position: Int[Tensor, "..."]) -> Float[Tensor, "... dim"] | None:
        """What is added to the embedding at these positions, counted from 0; None if nothing is.

        Raises:
            ValueError: the learned table ends before.
        """
        if self.position is not None:
            if position.numel() and int(position.max()) >= self.position.num_embeddings:
                raise ValueError(
                    f"this model was made for at most max_length={self.max_length} tokens; got position "
                    f"{int(position.max())}. Shorten the sequence, or train with a longer max_length or without one."
                )
            return self.position(position)
        if self.recipe == "modern":
            return None
        dim = self.config["dim"]
        rate = torch.arange(0, dim, 2, device=position.device).mul(-math.log(10000.0) / dim).exp()
        angle = position[..., None] * rate
        return torch.cat([angle.sin(), angle.cos()], -1)

    def _blocks(
        self, ids: Int[Tensor, "b n"], key_mask: Bool[Tensor, "b n"] | None, state: ModelState | None
    ) -> tuple[Float[Tensor, "b n dim"], list[Any]]:
        """The residual stream after the last block, and the layers' states after the last position."""
        if key_mask is None:
            position = torch.arange(ids.shape[1], device=ids.device)[None]
        else:
            position = (key_mask.cumsum(1) - 1).clamp(min=0)
        added = self.positions(position if state is None else state.position[:, None] + position)
        x = self.embedding(ids)
        if added is not None:
            x = x + added.to(x.dtype)
        layers = []
        for number, block in enumerate(self.blocks):
            x, after = block(x, key_mask, None if state is None else state.layer(number))
            layers.append(after)
        return x, layers


class Block(nn.Module):
    """x + attention(norm(x)), then x + down(activation(up(norm(x))))."""

    def __init__(self, dim: int, heads: int, ff: int, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.attention_norm, self.ff_norm = _norm(dim, recipe), _norm(dim, recipe)
        self.attention = Attention(dim, heads, recipe)
        self.up = nn.Linear(dim, ff, bias=recipe == "thesis")
        self.down = nn.Linear(ff, dim, bias=recipe == "thesis")

    def forward(
        self, x: Float[Tensor, "b n dim"], key_mask: Bool[Tensor, "b n"] | None, state: LayerState | None
    ) -> tuple[Float[Tensor, "b n dim"], Any]:
        y, after = self.attention(self.attention_norm(x), key_mask, state)
        x = x + y
        hidden = self.up(self.ff_norm(x)).relu()
        return x + self.down(hidden if self.recipe == "thesis" else hidden.square()), after


class Attention(nn.Module):
    """Causal linear attention of a block, with what the recipe puts around it."""

    decay: Tensor | None

    def __init__(self, dim: int, heads: int, recipe: Recipe) -> None:
        super().__init__()
        self.dim, self.heads, self.modern = dim, heads, recipe == "modern"
        self.project = nn.Linear(dim, (4 if self.modern else 3) * dim, bias=not self.modern)
        self.out = nn.Linear(dim, dim, bias=not self.modern)
        if self.modern:
            first_taps_zero = pad(torch.ones(1, 3 * dim), (0, 0, TAPS - 1, 0))  # the identity
            self.taps = nn.Parameter(first_taps_zero)
            self.out_norm = nn.Parameter(torch.ones(dim))
            # of the order of 8 to 1000 positions are remembered
            self.register_buffer("decay", 1 - 2 ** -torch.linspace(3, 10, heads))
        else:
            self.decay = None

    def forward(
        self, x: Float[Tensor, "b n dim"], key_mask: Bool[Tensor, "b n"] | None, state: LayerState | None
    ) -> tuple[Float[Tensor, "b n dim"], LayerState]:
        if state is None:
            taps = TAPS - 1 if self.modern else 0
            attention, recent = None, x.new_zeros(len(x), taps, 3 * self.dim, dtype=torch.float32)
        else:
            attention, recent = state.attention, state.recent
        qkv, gate = self.project(x).tensor_split([3 * self.dim], -1)  # "thesis" has no gate
        if self.modern:
            if key_mask is not None:
                qkv = qkv * key_mask[..., None]
            window = torch.cat([recent.to(x.dtype), qkv], 1)
            recent = window[:, x.shape[1] :].float()
            qkv = _convolve(window, self.taps)
        query, key, value = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.modern:
            query, key = _to_unit_rms(query), _to_unit_rms(key)
        y, attention = linear_attention(
            query, key, value, causal=True, key_mask=key_mask, decay=self.decay, state=attention, return_state=True
        )
        if self.modern:
            y = _to_unit_rms(y)
        y = y.transpose(1, 2).flatten(2)
        if self.modern:
            y = y * self.out_norm * silu(gate)
        return self.out(y), LayerState(attention, recent)


def _norm(dim: int, recipe: Recipe) -> nn.Module:
    return nn.LayerNorm(dim, eps=EPS) if recipe == "thesis" else nn.RMSNorm(dim, eps=EPS)


def _to_unit_rms(x: Float[Tensor, "*s e"]) -> Float[Tensor, "*s e"]:
    """RMSNorm without a factor; in elementary operations, which over few features are faster than torch's own."""
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()).to(x.dtype)


def _convolve(window: Float[Tensor, "b longer qkv"], taps: Float[Tensor, "taps qkv"]) -> Float[Tensor, "b n qkv"]:
    """y_i = sum_t taps_t window_{i+t}, channel by channel: elementwise, as torch's grouped convolution is no faster."""
    length = window.shape[1] - len(taps) + 1
    y = window[:, :length] * taps[0]
    for tap in range(1, len(taps)):
        y = torch.addcmul(y, window[:, tap : tap + length], taps[tap])
    return y


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"model files need safetensors: pip install 'flopwise[hf]' ({error}).") from error
    return safetensors
