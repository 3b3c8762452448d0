"""A classifier of large images that reads a few patches of each: attention sampling with small networks around it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.nn import functional as F

from flopwise.attention_sampling import AttentionSampling, Glimpse
from flopwise.attention_sampling.expectation import Estimator
from flopwise.attention_sampling.patches import as_float
from flopwise.attention_sampling.priors import SALIENCY

WEIGHTS, CONFIG = "model.safetensors", "config.json"
LAST_SIDE = 7  # pixels of the feature map that the last convolution may cover


@dataclass(frozen=True)
class GlimpseConfig:
    """Everything that a `GlimpseClassifier` is made of; saved beside its weights.

    Args:
        classes: names of the classes, or how many there are.
        channels: of the images.
        patch_size: pixels of the finest resolution, along a side.
        n_patches: read of each image.
        reduction: of the low-resolution view, along a side: 8 means an eighth.
        estimator, prior, prior_strength, smoothing, seed: see `AttentionSampling`; a prior is saved by its name. The
            seed also gives the initial weights.
        attention_width, feature_width: channels of the two networks' hidden layers.
        attention_window: side of the windows of the low-resolution view that attention judges one by one, best a little
            larger than what is looked for; None is three convolutions of 3 x 3.
        features: D.
        scale: the L2 norm of a patch's features.
    """

    classes: int | tuple[str, ...]
    channels: int = 1
    patch_size: int = 40
    n_patches: int = 10
    reduction: int = 8
    estimator: Estimator = "murthy"
    prior: str | None = "local_contrast"
    prior_strength: float = 1.0
    smoothing: float = 0.05
    attention_width: int = 8
    attention_window: int | None = None
    feature_width: int = 32
    features: int = 64
    scale: float = 8.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prior is not None and self.prior not in SALIENCY:
            raise ValueError(
                f"prior is one of {', '.join(SALIENCY)}, or None, so that it can be saved; got {self.prior!r}."
            )
        if self.estimator not in get_args(Estimator):
            raise ValueError(f"estimator is one of {', '.join(get_args(Estimator))}; got {self.estimator!r}.")

    @property
    def names(self) -> tuple[str, ...]:
        """One for each class."""
        return tuple(map(str, range(self.classes))) if isinstance(self.classes, int) else self.classes


class Classified(NamedTuple):
    """What the model says of a batch, (B, classes), and what it saw."""

    logits: Float[Tensor, "b classes"]
    glimpse: Glimpse


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes:
        label: the name of the class.
        probabilities: of all classes.
        attention: (rows, columns), summing to 1.
        positions: (y, x) of the top-left pixel of every patch that was read, in pixels of the image.
        weights: how much each patch counted.
        patches: their pixels, from 0 to 1.
    """

    label: str
    probabilities: Float[Tensor, " classes"]
    attention: Float[Tensor, "rows columns"]
    positions: Int[Tensor, "n 2"]
    weights: Float[Tensor, " n"]
    patches: Float[Tensor, "n c h w"]


class GlimpseClassifier(nn.Module):
    """Attention on the low-resolution view, features of a few patches, a linear layer on their expectation.

    model = GlimpseClassifier(GlimpseConfig(classes=("healthy", "ill"), channels=3, patch_size=256, reduction=32))
    images = [open_image(path) for path in paths]
    logits, glimpse = model(model.low_views(images), images)
    loss = cross_entropy(logits, targets) + entropy_loss(glimpse.entropy, floor=3.0)
    ...
    model.save("model")
    GlimpseClassifier.load("model").predict([open_image("new.tiff")])[0].label
    """

    def __init__(self, config: GlimpseConfig) -> None:
        super().__init__()
        self.config = config
        self.look = AttentionSampling(
            attention_network(config.channels, config.attention_width, config.attention_window),
            feature_network(config.channels, config.feature_width, config.features, config.patch_size, config.scale),
            patch_size=config.patch_size,
            n_patches=config.n_patches,
            estimator=config.estimator,
            prior=config.prior,  # type: ignore[arg-type]
            prior_strength=config.prior_strength,
            smoothing=config.smoothing,
            seed=config.seed,
        )
        self.head = nn.Linear(config.features, len(config.names))
        initialise(self, torch.Generator().manual_seed(config.seed))
        nn.init.zeros_(self.look.attention[-1].weight)  # type: ignore[index]  # attention begins as the prior
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a third faster on a CPU

    def forward(self, low: Any, high: Any, **options: Any) -> Classified:
        """Logits of a batch and what was seen; the arguments are those of `AttentionSampling.forward`."""
        glimpse = self.look(low, high, **options)
        return Classified(self.head(glimpse.features), glimpse)

    def low_views(self, images: Num[Tensor, "b c h w"] | Sequence[Any]) -> Any:
        """The low-resolution views of tensors (C, H, W) or lazy images, each the mean over squares of the finest."""
        if isinstance(images, Tensor):
            return _reduced(images, self.config.reduction)
        return [self._low_view(image) for image in images]

    @torch.no_grad()
    def predict(
        self, images: Sequence[Any], *, estimator: Estimator | None = None, n_patches: int | None = None
    ) -> list[Prediction]:
        """Class, attention and the patches looked at, for tensors (C, H, W) or lazy images, one after another.

        Args:
            estimator: the model's own, whose draw follows from the seed and the image, so that the answer is the same
                every time. "topk" reads the patches with the most attention: better where attention is concentrated,
                much worse where it is spread (.41 against .22 on our lakes).
            n_patches: the model's own number; more is better.
        """
        training = self.training
        self.eval()
        found = []
        for image in images:
            logits, glimpse = self(self.low_views([image]), [image], estimator=estimator, n_patches=n_patches)
            probabilities = logits[0].softmax(0)
            found.append(
                Prediction(
                    self.config.names[int(probabilities.argmax())],
                    probabilities,
                    glimpse.attention[0],
                    glimpse.positions[0],
                    glimpse.weights[0],
                    glimpse.patches[0],
                )
            )
        self.train(training)
        return found

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `config.json` into a folder."""
        safetensors = _safetensors()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.save_file({name: p.contiguous() for name, p in self.state_dict().items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps({"model": type(self).__name__, **asdict(self.config)}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "GlimpseClassifier":
        """Read what `save` wrote.

        Raises:
            ValueError: the folder holds no such model.
        """
        safetensors = _safetensors()
        folder = Path(folder)
        missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"a saved model is a folder with {CONFIG} and {WEIGHTS}; {folder} lacks {missing[0]}.")
        config = json.loads((folder / CONFIG).read_text())
        if config.pop("model", None) != cls.__name__:
            raise ValueError(f"{folder / CONFIG} is not the configuration of a {cls.__name__}.")
        if isinstance(config["classes"], list):  # JSON has no tuples
            config["classes"] = tuple(config["classes"])
        model = cls(GlimpseConfig(**config))
        model.load_state_dict(safetensors.load_file(folder / WEIGHTS))
        return model

    def _low_view(self, image: Any) -> Float[Tensor, "c h w"]:
        reduction = self.config.reduction
        if isinstance(image, Tensor):
            return _reduced(image[None], reduction)[0]
        finest = image.levels[0]
        thumbnail = getattr(image, "thumbnail", None)
        if thumbnail is not None:
            return as_float(thumbnail(-(-max(finest.height, finest.width) // reduction)))
        return _reduced(image.read(0, 0, 0, finest.height, finest.width)[None], reduction)[0]


def attention_network(channels: int, width: int, window: int | None = None) -> nn.Sequential:
    """Logits for every second position of the low-resolution view, both ways.

    Three convolutions, bounded by tanh until the last; or, with a window, one network of three layers on each of them:
    the first layer sees all of the window at once, which learns to tell things apart from far fewer images.
    """
    if window is None:
        return nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2),
            nn.Tanh(),
            nn.Conv2d(width, width, 3),
            nn.Tanh(),
            nn.Conv2d(width, 1, 3),
        )
    return nn.Sequential(
        nn.Conv2d(channels, width, window, stride=2),
        nn.ReLU(inplace=True),  # the hidden layers are most of the memory
        nn.Conv2d(width, width // 2, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(width // 2, 1, 1),
    )


def feature_network(channels: int, width: int, features: int, patch_size: int, scale: float) -> nn.Sequential:
    """Patches (n, C, p, p) to (n, D) of length `scale`: convolutions, each followed by halving, and one over the rest.

    All of it is convolutions: without its last two layers it is the same network over a whole image.
    """
    layers: list[nn.Module] = []
    side, came, goes = patch_size, channels, width // 2
    while side > LAST_SIDE:
        layers += [nn.Conv2d(came, goes, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]  # max first: ReLU sees a quarter
        side, came, goes = side // 2, goes, width
    return nn.Sequential(*layers, nn.Conv2d(came, features, side), nn.Flatten(), Normalised(scale))


class Normalised(nn.Module):
    """Rows of one length: sampling in proportion to the attention alone has least variance then."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return self.scale * F.normalize(x, dim=1)


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """He's normal weights and biases of zero, from a generator of its own."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.1, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _reduced(images: Num[Tensor, "b c h w"], reduction: int) -> Float[Tensor, "b c _ _"]:
    height, width = images.shape[2:]
    size = max(1, round(height / reduction)), max(1, round(width / reduction))
    return F.interpolate(as_float(images), size=size, mode="area")


def _safetensors() -> Any:
    try:
        from safetensors import torch as safetensors
    except ImportError as error:
        raise ImportError("models are saved as safetensors: pip install safetensors") from error
    return safetensors
