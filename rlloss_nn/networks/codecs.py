r"""Encoders of vectors and images into tokens, and decoders of the latent state back into vectors and images.

A vector is squashed by symlog on the way in and predicted in symlog space on the way out; an image is uint8, or floats
in [0, 1], in torch's layout [..., C, H, W], and predicted in [0, 1]. All take any leading dimensions.

Source of all: danijar/dreamerv3@e3f0224 dreamerv3/rssm.py ``Encoder`` and ``Decoder``.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlloss import checks
from rlloss.transforms import symlog
from rlloss_nn.networks.layers import (
    MLP,
    BlockLinear,
    RMSNorm,
    activation,
    convolution,
    divisible,
    leading_dimensions,
    linear,
    parameter_dtype,
    pixels,
    positive,
)


class VectorEncoder(nn.Module):
    r"""symlog, then an MLP.

    Args:
        in_features: size of the vector.
        units: width of each layer, and of the tokens.
        layers: number of layers, at least 1.
        act: name of the activation.

    Example:
        >>> VectorEncoder(3, units=8)(torch.tensor([1e6, -1.0, 0.0])).shape
        torch.Size([8])
    """

    def __init__(self, in_features: int, *, units: int = 64, layers: int = 3, act: str = "silu"):
        super().__init__()
        positive("VectorEncoder", layers=layers)
        self.mlp = MLP(in_features, units, layers, act)
        self.out_features = self.mlp.out_features

    def forward(self, vector: Tensor) -> Tensor:
        """[..., in_features], any numbers, to [..., units]."""
        checks.last_dimension("VectorEncoder", "vector", vector, self.mlp.in_features)
        tokens: Tensor = self.mlp(symlog(vector).to(parameter_dtype(self)))
        return tokens


class VectorDecoder(nn.Module):
    r"""An MLP and a linear layer; what it predicts is the symlog of the vector.

    Args:
        in_features: size of the features, the concatenated latent state.
        out_features: size of the vector.
        units: width of each layer.
        layers: number of layers.
        act: name of the activation.
        outscale: factor on the initial weights of the output layer.

    Example:
        >>> VectorDecoder(8, 3)(torch.zeros(2, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        units: int = 64,
        layers: int = 3,
        act: str = "silu",
        outscale: float = 1.0,
    ):
        super().__init__()
        positive("VectorDecoder", out_features=out_features)
        self.mlp = MLP(in_features, units, layers, act)
        self.out = linear(self.mlp.out_features, out_features, outscale=outscale)

    def forward(self, features: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features], in symlog space."""
        checks.last_dimension("VectorDecoder", "features", features, self.mlp.in_features)
        vector: Tensor = self.out(self.mlp(features))
        return vector


class ImageEncoder(nn.Module):
    r"""Stages of convolution, max-pooling by 2, RMS norm over channels and activation.

    Args:
        shape: (C, H, W); height and width divisible by 2 for each stage.
        depth: channels of the network, times ``mults`` for each stage.
        mults: one multiple of ``depth`` for each stage.
        kernel: width of the convolutions.
        act: name of the activation.

    Raises:
        ValueError: if ``shape`` is not that of an image the stages can halve.

    Example:
        >>> encoder = ImageEncoder((3, 64, 64), depth=4)
        >>> encoder(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape
        torch.Size([2, 256])
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        depth: int = 4,
        mults: Sequence[int] = (2, 3, 4, 4),
        kernel: int = 5,
        act: str = "silu",
    ):
        super().__init__()
        height, width = _smallest("ImageEncoder", shape, mults)
        self.shape = tuple(shape)
        self.act = activation("ImageEncoder", act)
        channels = [shape[0], *(depth * mult for mult in mults)]
        self.convolutions = nn.ModuleList(convolution(i, o, kernel) for i, o in pairwise(channels))
        self.norms = nn.ModuleList(RMSNorm(channel, dim=-3) for channel in channels[1:])
        self.out_features = channels[-1] * height * width

    def forward(self, image: Tensor) -> Tensor:
        """[..., C, H, W], uint8 or floats in [0, 1], to [..., out_features]."""
        leading = leading_dimensions("ImageEncoder", "image", image, self.shape)
        x = pixels(image, parameter_dtype(self)) - 0.5
        x = x.reshape(math.prod(leading), *self.shape)
        for convolve, norm in zip(self.convolutions, self.norms, strict=True):
            x = self.act(norm(_max_pool(convolve(x))))
        return x.reshape(*leading, self.out_features)


class ImageDecoder(nn.Module):
    r"""A small image from the latent state, then stages of upsampling by 2, convolution, RMS norm and activation.

    The small image is the sum of what a block-linear layer makes of the recurrent state (each block its own channels)
    and what two linear layers make of the samples. The output ends in a sigmoid.

    Args:
        deter: size of the recurrent state, the first part of the features.
        stoch: size of the flattened samples, the second part.
        shape: (C, H, W); height and width divisible by 2 for each stage.
        depth: channels of the network, times ``mults`` for each stage.
        mults: one multiple of ``depth`` for each stage, the last for the smallest image.
        units: half the width of the layer between the samples and the small image.
        kernel: width of the convolutions.
        blocks: blocks of the block-linear layer; divides ``deter`` and the channels of the smallest image.
        act: name of the activation.
        outscale: factor on the initial weights of the output layer.

    Raises:
        ValueError: if ``shape`` is not that of an image the stages can double, or ``blocks`` does not divide.

    Example:
        >>> ImageDecoder(16, 12, (3, 64, 64), depth=4)(torch.zeros(2, 28)).shape
        torch.Size([2, 3, 64, 64])
    """

    def __init__(
        self,
        deter: int,
        stoch: int,
        shape: Sequence[int],
        *,
        depth: int = 4,
        mults: Sequence[int] = (2, 3, 4, 4),
        units: int = 64,
        kernel: int = 5,
        blocks: int = 8,
        act: str = "silu",
        outscale: float = 1.0,
    ):
        super().__init__()
        height, width = _smallest("ImageDecoder", shape, mults)
        channels = [depth * mult for mult in reversed(mults)]
        divisible("ImageDecoder", "depth * mults[-1]", channels[0], "blocks", blocks)
        self.deter, self.stoch, self.start = deter, stoch, (channels[0], height, width)
        self.act = activation("ImageDecoder", act)
        self.deter_start = BlockLinear(deter, math.prod(self.start), blocks)
        self.stoch_mlp = MLP(stoch, 2 * units, 1, act)
        self.stoch_start = linear(2 * units, math.prod(self.start))
        self.start_norm = RMSNorm(channels[0], dim=-3)
        self.convolutions = nn.ModuleList(convolution(i, o, kernel) for i, o in pairwise(channels))
        self.norms = nn.ModuleList(RMSNorm(channel, dim=-3) for channel in channels[1:])
        self.out = convolution(channels[-1], shape[0], kernel, outscale=outscale)

    def forward(self, features: Tensor) -> Tensor:
        """[..., deter + stoch] to [..., C, H, W], in [0, 1]."""
        checks.last_dimension("ImageDecoder", "features", features, self.deter + self.stoch)
        leading = features.shape[:-1]
        deter, stoch = torch.split(features.reshape(-1, self.deter + self.stoch), [self.deter, self.stoch], -1)
        start = self.deter_start(deter) + self.stoch_start(self.stoch_mlp(stoch))
        x = self.act(self.start_norm(start.unflatten(-1, self.start)))
        for convolve, norm in zip(self.convolutions, self.norms, strict=True):
            x = self.act(norm(convolve(_upsample(x))))
        image = torch.sigmoid(self.out(_upsample(x)))
        return image.reshape(*leading, *image.shape[1:])


def _smallest(function: str, shape: Sequence[int], mults: Sequence[int]) -> tuple[int, int]:
    """Height and width after all stages."""
    if len(shape) != 3:
        raise ValueError(checks.text(function, "shape", "(C, H, W)", repr(tuple(shape))))
    factor = 2 ** len(mults)
    if shape[1] % factor or shape[2] % factor:
        wanted = f"(C, H, W) with H and W divisible by {factor}, for {len(mults)} stages"
        guess = "Did you pass channels last?" if shape[0] % factor == 0 else ""
        raise ValueError(checks.text(function, "shape", wanted, repr(tuple(shape)), guess))
    return shape[1] // factor, shape[2] // factor


def _max_pool(x: Tensor) -> Tensor:
    # As in the source, pixels that tie share the gradient; torch's max_pool2d gives it all to one of them.
    height, width = x.shape[-2:]
    return x.reshape(*x.shape[:-2], height // 2, 2, width // 2, 2).amax((-3, -1))


def _upsample(x: Tensor) -> Tensor:
    return functional.interpolate(x, scale_factor=2, mode="nearest")
