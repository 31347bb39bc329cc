r"""Encoder and decoder of whole observations: one tensor, or a mapping of named vectors and images.

Source of all: danijar/dreamerv3@e3f0224 dreamerv3/rssm.py ``Encoder`` and ``Decoder``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from rlloss import checks
from rlloss_nn.networks.codecs import ImageDecoder, ImageEncoder, VectorDecoder, VectorEncoder
from rlloss_nn.networks.layers import leading_dimensions, parameter_dtype, pixels

#: Shape of an observation without leading dimensions, or a mapping name -> shape.
ObservationShape: TypeAlias = Sequence[int] | Mapping[str, Sequence[int]]


class ObservationSpace:
    """Which observations there are, and how they become one vector and one image.

    A shape (C, H, W) is an image, any shorter one a vector. Vectors are flattened and concatenated, images too along
    their channels, both in the order of their names.
    """

    def __init__(self, function: str, shape: ObservationShape):
        self.single = not isinstance(shape, Mapping)
        shapes = dict(sorted(shape.items())) if isinstance(shape, Mapping) else {"observation": shape}
        if not shapes or any(len(s) > 3 for s in shapes.values()):
            wanted = "one or more shapes of at most three dimensions"
            raise ValueError(checks.text(function, "observation_shape", wanted, repr(shape)))
        self.vectors = {name: tuple(s) for name, s in shapes.items() if len(s) < 3}
        self.images = {name: tuple(s) for name, s in shapes.items() if len(s) == 3}
        if len({s[1:] for s in self.images.values()}) > 1:
            raise ValueError(checks.text(function, "observation_shape", "of equal image sizes", repr(self.images)))
        self.vector_sizes = [math.prod(s) for s in self.vectors.values()]
        self.channels = [s[0] for s in self.images.values()]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of all images concatenated."""
        return (sum(self.channels), *next(iter(self.images.values()))[1:])

    def concatenate(self, function: str, observation: Any, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The vector and the image of an observation; an image in [0, 1], None for what there is not."""
        vectors, images = [], []
        first: torch.Size | None = None
        for name, shape in (self.vectors | self.images).items():
            x = observation if self.single else checks.take(function, "observation", observation, name)
            argument = "observation" if self.single else f"observation[{name!r}]"
            leading = leading_dimensions(function, argument, x, shape)
            first = leading if first is None else first
            checks.leading_shape(function, argument, x, "the other observations", first)
            if name in self.images:
                images.append(pixels(x, dtype))
            else:
                vectors.append(checks.real(function, argument, x).reshape(*leading, math.prod(shape)))
        return torch.cat(vectors, -1) if vectors else None, torch.cat(images, -3) if images else None

    def separate(self, vector: Tensor | None, image: Tensor | None) -> Any:
        """A prediction for each observation, structured like them."""
        parts: dict[str, Tensor] = {}
        if vector is not None:
            for (name, shape), x in zip(self.vectors.items(), torch.split(vector, self.vector_sizes, -1), strict=True):
                parts[name] = x.reshape(*x.shape[:-1], *shape)
        if image is not None:
            parts.update(zip(self.images, torch.split(image, self.channels, -3), strict=True))
        return parts["observation"] if self.single else parts


class Encoder(nn.Module):
    r"""Tokens of one observation or of a mapping of them: vectors share an MLP, images share a convolutional network.

    A shape (C, H, W) is an image, any shorter one a vector (flattened). Vectors are concatenated in the order of their
    names, images along their channels.

    Args:
        observation_shape: shape of the observation without leading dimensions, or a mapping name -> shape.
        units: width of the MLP.
        layers: layers of the MLP.
        depth: see :class:`ImageEncoder`.
        mults: see :class:`ImageEncoder`.
        kernel: see :class:`ImageEncoder`.
        act: name of the activation.

    Raises:
        ValueError: if there is no observation, one has more than three dimensions, or images differ in size.

    Example:
        >>> encoder = Encoder({"camera": (3, 64, 64), "position": (2,)}, units=8)
        >>> observation = {"camera": torch.zeros(5, 3, 64, 64, dtype=torch.uint8), "position": torch.zeros(5, 2)}
        >>> encoder(observation).shape
        torch.Size([5, 264])
    """

    def __init__(
        self,
        observation_shape: ObservationShape,
        *,
        units: int = 64,
        layers: int = 3,
        depth: int = 4,
        mults: Sequence[int] = (2, 3, 4, 4),
        kernel: int = 5,
        act: str = "silu",
    ):
        super().__init__()
        self.space = ObservationSpace("Encoder", observation_shape)
        self.vector: VectorEncoder | None = None
        self.image: ImageEncoder | None = None
        if self.space.vectors:
            self.vector = VectorEncoder(sum(self.space.vector_sizes), units=units, layers=layers, act=act)
        if self.space.images:
            self.image = ImageEncoder(self.space.image_shape, depth=depth, mults=mults, kernel=kernel, act=act)
        self.out_features = sum(part.out_features for part in (self.vector, self.image) if part is not None)

    def forward(self, observation: Any) -> Tensor:
        """A tensor [..., *shape], or a mapping of them, to tokens [..., out_features]."""
        vector, image = self.space.concatenate("Encoder", observation, parameter_dtype(self))
        tokens: list[Tensor] = []
        if self.vector is not None:
            tokens.append(self.vector(vector))
        if self.image is not None:
            tokens.append(self.image(image))
        return torch.cat(tokens, -1)


class Decoder(nn.Module):
    r"""Predictions of one observation, or of a mapping of them, from the latent state.

    Vectors share an MLP and images a convolutional network; a vector is predicted in symlog space, an image in [0, 1].

    Args:
        deter: size of the recurrent state, the first part of the features.
        stoch: size of the flattened samples, the second part.
        observation_shape: shape of the observation without leading dimensions, or a mapping name -> shape.
        units: width of the MLP, and half that of the image decoder's input layer.
        layers: layers of the MLP.
        depth: see :class:`ImageDecoder`.
        mults: see :class:`ImageDecoder`.
        kernel: see :class:`ImageDecoder`.
        blocks: see :class:`ImageDecoder`.
        act: name of the activation.
        outscale: factor on the initial weights of the output layers.

    Raises:
        ValueError: if there is no observation, one has more than three dimensions, or images differ in size.

    Example:
        >>> Decoder(16, 12, {"position": (2,)})(torch.zeros(5, 28))["position"].shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        deter: int,
        stoch: int,
        observation_shape: ObservationShape,
        *,
        units: int = 64,
        layers: int = 3,
        depth: int = 4,
        mults: Sequence[int] = (2, 3, 4, 4),
        kernel: int = 5,
        blocks: int = 8,
        act: str = "silu",
        outscale: float = 1.0,
    ):
        super().__init__()
        self.space = space = ObservationSpace("Decoder", observation_shape)
        self.vector: VectorDecoder | None = None
        self.image: ImageDecoder | None = None
        if space.vectors:
            size = sum(space.vector_sizes)
            self.vector = VectorDecoder(deter + stoch, size, units=units, layers=layers, act=act, outscale=outscale)
        if space.images:
            sizes: dict[str, Any] = {"depth": depth, "mults": mults, "units": units, "kernel": kernel, "blocks": blocks}
            self.image = ImageDecoder(deter, stoch, space.image_shape, **sizes, act=act, outscale=outscale)

    def forward(self, features: Tensor) -> Any:
        """[..., deter + stoch] to a tensor [..., *shape] or a mapping of them."""
        vector = None if self.vector is None else self.vector(features)
        image = None if self.image is None else self.image(features)
        return self.space.separate(vector, image)
