r"""Heads: what reads a prediction out of the latent state."""

from torch import Tensor, nn

from rlloss import checks
from rlloss_nn.networks.layers import MLP, linear, positive


class MLPHead(nn.Module):
    r"""Layers of linear, norm and activation, then a linear layer to the outputs.

    With the default ``outscale`` every output starts as exactly 0: two-hot logits then decode to 0, so that a reward
    or value head begins with an honest "nothing" rather than with noise.

    Source: danijar/dreamerv3@e3f0224 embodied/jax/heads.py ``MLPHead``; outscale 0.0 for reward and value, 0.01 for the
    policy and 1.0 for the others, dreamerv3/configs.yaml.

    Args:
        in_features: size of the input.
        out_features: number of outputs, such as bins of a reward or logits of a policy.
        layers: hidden layers.
        units: width of each.
        act: name of the activation.
        outscale: factor on the initial weights of the output layer.

    Raises:
        ValueError: if a size is not positive or ``act`` is unknown.

    Example:
        >>> import torch
        >>> MLPHead(8, 3)(torch.randn(2, 8))
        tensor([[0., 0., 0.],
                [0., 0., 0.]], grad_fn=<AddmmBackward0>)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        layers: int = 1,
        units: int = 64,
        act: str = "silu",
        outscale: float = 0.0,
    ):
        super().__init__()
        positive("MLPHead", in_features=in_features, out_features=out_features)
        self.in_features = in_features
        self.mlp = MLP(in_features, units, layers, act)
        self.out = linear(self.mlp.out_features, out_features, outscale=outscale)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        checks.last_dimension("MLPHead", "x", x, self.in_features)
        outputs: Tensor = self.out(self.mlp(x))
        return outputs
