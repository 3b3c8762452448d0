"""Feature maps phi: what stands in for the softmax, sim(q, k) = phi(q) . phi(k).

Two kinds. Those that approximate the softmax's exp(q . k / sqrt(e)) scale their input by e^-1/4 themselves: "taylor2",
`RandomFourierFeatures`, `SmoothedRandomFourierFeatures`, `Favor`. The others are kernels of their own: "elu", "relu",
"squared_relu", `GeneralizedRandomFeatures`, `Hedgehog`.

A map that is drawn at random takes a `torch.Generator`, keeps its draw in a buffer that `state_dict` saves, and draws
anew only when `redraw` is called. Features of one sign keep the normaliser away from 0; Fourier features have both.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

FeatureMap = str | Callable[[Tensor], Tensor]  # a name in BY_NAME, or a function or module (b, h, n, e) -> (b, h, n, f)


def features_of(feature_map: FeatureMap, x: Float[Tensor, "b h n e"]) -> Float[Tensor, "b h n f"]:
    """phi(x) for a map given by name or as a function or module.

    Raises:
        ValueError: there is no map of this name.
    """
    if not isinstance(feature_map, str):
        return feature_map(x)
    if feature_map not in BY_NAME:
        raise ValueError(
            f"feature_map is one of {', '.join(BY_NAME)}, or a function (b, h, n, e) -> (b, h, n, f); "
            f"got {feature_map!r}."
        )
    return BY_NAME[feature_map](x)


def feature_width(feature_map: FeatureMap, width: int) -> int:
    """How many features f a map makes of inputs of this width: the size `init_state` asks for."""
    heads = feature_map.heads if isinstance(feature_map, Hedgehog) else 1
    device = None
    if isinstance(feature_map, nn.Module):
        device = next((x.device for x in (*feature_map.parameters(), *feature_map.buffers())), None)
    with torch.no_grad():
        return features_of(feature_map, torch.zeros(1, heads, 1, width, device=device)).shape[-1]


def elu(x: Float[Tensor, "*s e"]) -> Float[Tensor, "*s e"]:
    """elu(x) + 1 = max(x, 0) + exp(min(x, 0)) (Katharopoulos et al., 2020, equation 7).

    Written so that exp(x) of a very negative x is not lost in a sum with 1.
    """
    return x.relu() + x.clamp(max=0).exp()


def squared_relu(x: Float[Tensor, "*s e"]) -> Float[Tensor, "*s e"]:
    """max(x, 0)^2."""
    return x.relu().square()


def taylor2(x: Float[Tensor, "*s e"]) -> Float[Tensor, "*s f"]:
    """[1, x, x x^T / sqrt(2)] of the scaled x, so that phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(e).

    The second-order Taylor expansion of the softmax's exponential, at least 1/2 everywhere. f = 1 + e + e^2.
    """
    x = x * x.shape[-1] ** -0.25
    square = (x[..., :, None] * x[..., None, :]).flatten(-2) * 0.5**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)


def identity(x: Float[Tensor, "*s e"]) -> Float[Tensor, "*s e"]:
    """x: query and key are features already."""
    return x


BY_NAME: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu,
    "relu": torch.relu,
    "squared_relu": squared_relu,
    "taylor2": taylor2,
    "identity": identity,
}


class RandomFeatures(nn.Module):
    """What the random maps share: omega, (width, draws), with standard normal columns.

    Args:
        width: of the queries and keys.
        draws: columns of omega; by default as many as `width`.
        orthogonal: columns orthogonal within each block of `width`, with the norms of normal ones: less variance.
        generator: of the draw. None takes torch's global one, as `nn.Linear` does for its weight.
    """

    def __init__(
        self,
        width: int,
        draws: int | None = None,
        *,
        orthogonal: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.orthogonal = orthogonal
        self.omega: Tensor
        self.register_buffer("omega", torch.empty(width, draws or width))
        self.redraw(generator)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw omega anew."""
        width, draws = self.omega.shape
        device = generator.device if generator is not None else self.omega.device
        normal = torch.randn(-(-draws // width), width, width, generator=generator, device=device)
        if self.orthogonal:
            norm = torch.randn(normal.shape, generator=generator, device=device).norm(dim=-2, keepdim=True)
            basis, triangle = torch.linalg.qr(normal)
            # The signs make the basis uniform over all of them; those of the algorithm are not, and would be a bias.
            normal = basis * triangle.diagonal(dim1=-2, dim2=-1).sign()[:, None] * norm
        self.omega.copy_(normal.transpose(0, 1).reshape(width, -1)[:, :draws])

    def project(self, x: Float[Tensor, "*s e"]) -> Float[Tensor, "*s draws"]:
        """x omega."""
        if x.shape[-1] != len(self.omega):
            raise ValueError(f"this map was made for width {len(self.omega)}; got {tuple(x.shape)}.")
        return x @ self.omega.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.omega.shape[0]}, {self.omega.shape[1]}, orthogonal={self.orthogonal}"


class RandomFourierFeatures(RandomFeatures):
    """[cos(x omega), sin(x omega)] / sqrt(draws): phi(q) . phi(k) is exp(-||q - k||^2 / 2) in the mean.

    q and k are scaled by e^-1/4. This is the softmax's kernel once queries and keys have one norm: normalise them
    before. f = 2 draws. The features have both signs, and so may the normaliser.

    Source: Rahimi & Recht 2007; as attention, Peng et al. 2021.
    """

    def forward(self, x: Float[Tensor, "*s e"]) -> Float[Tensor, "*s f"]:
        angle = self.project(x * x.shape[-1] ** -0.25)
        return torch.cat([angle.cos(), angle.sin()], -1) * self.omega.shape[1] ** -0.5


class SmoothedRandomFourierFeatures(RandomFourierFeatures):
    """Random Fourier features and one that is constant, so that phi(q) . phi(k) is larger by `smoothing`.

    It keeps the normaliser positive where the estimate of a small similarity falls below 0. f = 2 draws + 1.
    """

    def __init__(
        self,
        width: int,
        draws: int | None = None,
        *,
        smoothing: float = 1.0,
        orthogonal: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, draws, orthogonal=orthogonal, generator=generator)
        self.smoothing = smoothing

    def forward(self, x: Float[Tensor, "*s e"]) -> Float[Tensor, "*s f"]:
        return nn.functional.pad(super().forward(x), (0, 1), value=math.sqrt(self.smoothing))


class Favor(RandomFeatures):
    """exp(x omega - ||x||^2 / 2) / sqrt(draws): positive, and phi(q) . phi(k) is exp(q . k / sqrt(e)) in the mean.

    x is scaled by e^-1/4, and f = draws. No maximum is subtracted: one over all keys would tell earlier positions about
    later ones, and a recurrent step does not know it. It is not needed against overflow, the exponent being at most
    ||omega_i||^2 / 2.

    Source: Choromanski et al. 2021 (FAVOR+), lemma 1.
    """

    def forward(self, x: Float[Tensor, "*s e"]) -> Float[Tensor, "*s f"]:
        x = x * x.shape[-1] ** -0.25
        return (self.project(x) - x.square().sum(-1, keepdim=True) / 2).exp() * self.omega.shape[1] ** -0.5


class GeneralizedRandomFeatures(RandomFeatures):
    """(kernel(x omega) + epsilon) / sqrt(draws), for any kernel; relu by default. f = draws.

    Source: Choromanski et al. 2021, generalised attention.
    """

    def __init__(
        self,
        width: int,
        draws: int | None = None,
        *,
        kernel: Callable[[Tensor], Tensor] = torch.relu,
        epsilon: float = 1e-3,
        orthogonal: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, draws, orthogonal=orthogonal, generator=generator)
        self.kernel, self.epsilon = kernel, epsilon

    def forward(self, x: Float[Tensor, "*s e"]) -> Float[Tensor, "*s f"]:
        return (self.kernel(self.project(x)) + self.epsilon) * self.omega.shape[1] ** -0.5


class Hedgehog(nn.Module):
    """[softmax(x W), softmax(-x W)], W learned, one a key head, the identity at first. f = 2 width.

    Trained so that its attention is that of a softmax model, it turns that model into a linear one.

    Args:
        heads: of the key; query head i takes the map of the key head it reads.
        width: of the queries and keys.

    Source: Zhang et al. 2024, sections 4.1 and A.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.eye(width).repeat(heads, 1, 1))

    def forward(self, x: Float[Tensor, "b h n e"]) -> Float[Tensor, "b h n f"]:
        if x.shape[1] % self.heads:
            raise ValueError(f"this map was made for {self.heads} key heads, or a multiple; got {tuple(x.shape)}.")
        y = x.unflatten(1, (self.heads, -1)) @ self.weight[:, None].to(x.dtype)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"{self.heads}, {self.weight.shape[1]}"
