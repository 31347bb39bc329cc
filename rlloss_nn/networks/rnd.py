r"""The networks of random network distillation.

A predictor has two hidden layers more than its target. Every layer is orthogonal with gain sqrt(2), outputs included.
Hand in normalised observations: ``rnd_loss(..., obs_stats=...)`` does it.

Source of all: Burda et al. 2018 (arXiv:1810.12894); openai/random-network-distillation@f75c0f1
policies/cnn_policy_param_matched.py, utils.py.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from rlloss import checks
from rlloss_nn.networks.layers import leading_dimensions, parameter_dtype, pixels, positive

Layer = TypeVar("Layer", nn.Linear, nn.Conv2d)


class RNDConvNetwork(nn.Module):
    r"""The network for images: three convolutions and a linear layer.

    Args:
        observation_shape: (C, H, W), at least 36 pixels high and wide.
        out_features: size of the output.
        hidden: width of the predictor's hidden layers.
        predictor: whether to put two hidden layers before the output.

    Raises:
        ValueError: if ``observation_shape`` is not that of an image, or too small.

    Example:
        >>> import torch
        >>> target, predictor = RNDConvNetwork(), RNDConvNetwork(predictor=True)
        >>> target(torch.zeros(2, 4, 84, 84)).shape
        torch.Size([2, 512])
    """

    def __init__(
        self,
        observation_shape: Sequence[int] = (4, 84, 84),
        out_features: int = 512,
        *,
        hidden: int = 512,
        predictor: bool = False,
    ):
        super().__init__()
        if len(observation_shape) != 3 or min(observation_shape[1:]) < 36:
            wanted = "(C, H, W) with H and W at least 36"
            raise ValueError(checks.text("RNDConvNetwork", "observation_shape", wanted, repr(tuple(observation_shape))))
        positive("RNDConvNetwork", out_features=out_features, hidden=hidden)
        self.shape = tuple(observation_shape)
        self.trunk = nn.Sequential(
            orthogonal(nn.Conv2d(self.shape[0], 32, 8, stride=4)),
            nn.LeakyReLU(0.2),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2)),
            nn.LeakyReLU(0.2),
            orthogonal(nn.Conv2d(64, 64, 3, stride=1)),
            nn.LeakyReLU(0.2),
            nn.Flatten(-3),
        )
        height, width = self.shape[1:]
        for kernel, stride in ((8, 4), (4, 2), (3, 1)):
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
        self.out = _output(64 * height * width, hidden, out_features, predictor)

    def forward(self, image: Tensor) -> Tensor:
        """[..., C, H, W], normalised floats (uint8 is read as [0, 1]), to [..., out_features]."""
        leading = leading_dimensions("RNDConvNetwork", "image", image, self.shape)
        x = pixels(image, parameter_dtype(self)).reshape(math.prod(leading), *self.shape)
        y: Tensor = self.out(self.trunk(x))
        return y.reshape(*leading, y.shape[-1])


class RNDVectorNetwork(nn.Module):
    r"""The same for vectors: two linear layers in place of the convolutions.

    Args:
        in_features: size of an observation.
        hidden: width of the hidden layers.
        out_features: size of the output.
        predictor: whether to put two more hidden layers before the output.

    Raises:
        ValueError: if a size is not positive.

    Example:
        >>> import torch
        >>> target, predictor = RNDVectorNetwork(3, 32, 16), RNDVectorNetwork(3, 32, 16, predictor=True)
        >>> predictor(torch.zeros(2, 3)).shape
        torch.Size([2, 16])
    """

    def __init__(self, in_features: int, hidden: int = 512, out_features: int = 512, *, predictor: bool = False):
        super().__init__()
        positive("RNDVectorNetwork", in_features=in_features, hidden=hidden, out_features=out_features)
        self.in_features = in_features
        self.trunk = nn.Sequential(
            orthogonal(nn.Linear(in_features, hidden)),
            nn.LeakyReLU(0.2),
            orthogonal(nn.Linear(hidden, hidden)),
            nn.LeakyReLU(0.2),
        )
        self.out = _output(hidden, hidden, out_features, predictor)

    def forward(self, vector: Tensor) -> Tensor:
        """[..., in_features], normalised, to [..., out_features]."""
        vector = checks.real("RNDVectorNetwork", "vector", vector)
        checks.last_dimension("RNDVectorNetwork", "vector", vector, self.in_features)
        y: Tensor = self.out(self.trunk(vector.to(parameter_dtype(self))))
        return y


def orthogonal(layer: Layer) -> Layer:
    """``layer`` with an orthogonal weight of gain sqrt(2) and a zero bias."""
    nn.init.orthogonal_(layer.weight, math.sqrt(2))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _output(in_features: int, hidden: int, out_features: int, predictor: bool) -> nn.Module:
    if not predictor:
        return orthogonal(nn.Linear(in_features, out_features))
    return nn.Sequential(
        orthogonal(nn.Linear(in_features, hidden)),
        nn.ReLU(),
        orthogonal(nn.Linear(hidden, hidden)),
        nn.ReLU(),
        orthogonal(nn.Linear(hidden, out_features)),
    )
