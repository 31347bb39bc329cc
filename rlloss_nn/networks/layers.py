r"""The layers DreamerV3's networks are made of, with the author's initialisation.

Source of all: danijar/dreamerv3@e3f0224 embodied/jax/nets.py.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlloss import checks

#: Activations by name. ``gelu`` is the tanh approximation, as in JAX.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "elu": functional.elu,
    "tanh": torch.tanh,
}


class RMSNorm(nn.Module):
    r"""Divide by the root mean square of one dimension, then scale each feature.

    .. math:: y = s \, x \, / \sqrt{\mathrm{mean}(x^2) + \epsilon}

    Computed in float32 at least and cast back to the dtype of ``x``.

    Args:
        features: size of the normalised dimension.
        dim: that dimension, counted from the end: -1 for vectors, -3 for the channels of images [..., C, H, W].
        eps: what is added to the mean square.

    Example:
        >>> RMSNorm(2)(torch.tensor([3.0, 4.0]))
        tensor([0.8485, 1.1314], grad_fn=<MulBackward0>)
    """

    def __init__(self, features: int, *, dim: int = -1, eps: float = 1e-4):
        super().__init__()
        self.dim, self.eps = dim, eps
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., features, ...] to the same shape and dtype."""
        wide = x.to(checks.compute_dtype(x))
        scale = self.scale.to(wide.dtype).reshape(-1, *[1] * (-1 - self.dim))
        mean_square = wide.square().mean(self.dim, keepdim=True)
        return (wide * (torch.rsqrt(mean_square + self.eps) * scale)).to(x.dtype)


class BlockLinear(nn.Module):
    r"""Linear layer with a block-diagonal matrix: each block of the output sees one block of the input.

    Args:
        in_features: size of the input, divisible by ``blocks``.
        out_features: size of the output, divisible by ``blocks``.
        blocks: number of blocks. The weight is [blocks, in_features / blocks, out_features / blocks].

    Raises:
        ValueError: if ``blocks`` does not divide a size.

    Example:
        >>> layer = BlockLinear(6, 4, blocks=2)
        >>> layer.weight.shape, layer(torch.zeros(5, 6)).shape
        (torch.Size([2, 3, 2]), torch.Size([5, 4]))
    """

    def __init__(self, in_features: int, out_features: int, blocks: int):
        super().__init__()
        divisible("BlockLinear", "in_features", in_features, "blocks", blocks)
        divisible("BlockLinear", "out_features", out_features, "blocks", blocks)
        self.in_features, self.out_features, self.blocks = in_features, out_features, blocks
        self.weight = nn.Parameter(torch.empty(blocks, in_features // blocks, out_features // blocks))
        self.bias = nn.Parameter(torch.zeros(out_features))
        # The author's fan-in of a block is the whole input: blocks start smaller than a dense layer of their size.
        truncated_normal_(self.weight, in_features)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        checks.last_dimension("BlockLinear", "x", x, self.in_features)
        x = torch.unflatten(x, -1, (self.blocks, self.in_features // self.blocks))
        return torch.einsum("...ki,kio->...ko", x, self.weight).flatten(-2) + self.bias


class MLP(nn.Module):
    r"""Layers of linear, RMS norm, activation.

    Args:
        in_features: size of the input.
        units: size of each layer.
        layers: number of layers; 0 gives the input back.
        act: name of the activation, a key of :data:`ACTIVATIONS`.

    Raises:
        ValueError: if a size is not positive or ``act`` is unknown.

    Example:
        >>> MLP(3, units=8, layers=2)(torch.zeros(5, 3)).shape
        torch.Size([5, 8])
    """

    def __init__(self, in_features: int, units: int, layers: int, act: str = "silu"):
        super().__init__()
        positive("MLP", in_features=in_features, units=units)
        checks.within("MLP", "layers", layers, 0)
        sizes = [in_features] + [units] * layers
        self.in_features, self.out_features = in_features, sizes[-1]
        self.act = activation("MLP", act)
        self.linears = nn.ModuleList(linear(sizes[i], sizes[i + 1]) for i in range(layers))
        self.norms = nn.ModuleList(RMSNorm(units) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., units]."""
        checks.last_dimension("MLP", "x", x, self.in_features)
        for layer, norm in zip(self.linears, self.norms, strict=True):
            x = self.act(norm(layer(x)))
        return x


def linear(in_features: int, out_features: int, *, outscale: float = 1.0) -> nn.Linear:
    """A linear layer as the author initialises it; ``outscale`` 0 makes a layer that starts as zero."""
    layer = nn.Linear(in_features, out_features)
    truncated_normal_(layer.weight, in_features, outscale)
    nn.init.zeros_(layer.bias)
    return layer


def convolution(in_channels: int, out_channels: int, kernel: int, *, outscale: float = 1.0) -> nn.Conv2d:
    """A convolution that keeps height and width, as the author initialises it."""
    layer = nn.Conv2d(in_channels, out_channels, kernel, padding="same")
    truncated_normal_(layer.weight, in_channels * kernel**2, outscale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def truncated_normal_(weight: Tensor, fan_in: int, outscale: float = 1.0) -> Tensor:
    """Fill ``weight`` from a normal cut at two sigma, so that its standard deviation is outscale / sqrt(fan_in)."""
    # A unit normal cut at 2 has standard deviation 0.8796 = 1 / 1.1368.
    sigma = 1.1368 / math.sqrt(fan_in)
    nn.init.trunc_normal_(weight, std=sigma, a=-2 * sigma, b=2 * sigma)
    with torch.no_grad():
        return weight.mul_(outscale)


def pixels(image: Tensor, dtype: torch.dtype) -> Tensor:
    """A uint8 image as floats in [0, 1]; floats are taken as they are."""
    return image.to(dtype) / 255 if image.dtype == torch.uint8 else image.to(dtype)


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """The dtype a module computes in: that of its first parameter."""
    return next(module.parameters()).dtype


def leading_dimensions(function: str, argument: str, x: Tensor, shape: Sequence[int]) -> torch.Size:
    """The dimensions of ``x`` before its last ones, which are ``shape``."""
    x = checks.tensor(function, argument, x)
    split = x.ndim - len(shape)
    if split < 0 or tuple(x.shape[split:]) != tuple(shape):
        last = len(shape) == 3 and tuple(x.shape[-3:]) == (*shape[1:], shape[0])
        guess = "Did you pass channels last? Images are [..., C, H, W]." if last else ""
        wanted = f"of shape [{', '.join(map(str, ['...', *shape]))}]"
        raise ValueError(checks.text(function, argument, wanted, checks.describe(x), guess))
    return x.shape[:split]


def activation(function: str, name: str) -> Callable[[Tensor], Tensor]:
    """The activation called ``name``."""
    checks.option(function, "act", name, ACTIVATIONS)
    return ACTIVATIONS[name]


def positive(function: str, **sizes: int) -> None:
    """Every size is at least 1."""
    for name, size in sizes.items():
        checks.within(function, name, size, 1)


def divisible(function: str, argument: str, size: int, divisor_name: str, divisor: int) -> None:
    """``size`` is a positive multiple of ``divisor``."""
    positive(function, **{divisor_name: divisor, argument: size})
    if size % divisor:
        raise ValueError(checks.text(function, argument, f"a multiple of {divisor_name}={divisor}", repr(size)))


def exact_shape(function: str, argument: str, x: Tensor, shape: Sequence[int | str], guess: str = "") -> None:
    """``x`` has exactly ``shape``; a name in it stands for any size."""
    if x.ndim != len(shape) or any(w != g for w, g in zip(shape, x.shape, strict=True) if isinstance(w, int)):
        guess = guess or checks.time_first(x.shape, [w if isinstance(w, int) else -1 for w in shape])
        wanted = f"of shape [{', '.join(map(str, shape))}]"
        raise ValueError(checks.text(function, argument, wanted, checks.describe(x), guess))
