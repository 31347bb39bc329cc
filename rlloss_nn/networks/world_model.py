r"""DreamerV3's world model in one module, with the inputs and outputs of ``rlloss.dreamer_v3_model_loss``."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlloss import checks
from rlloss_nn.networks.heads import MLPHead
from rlloss_nn.networks.observations import Decoder, Encoder, ObservationShape
from rlloss_nn.networks.rssm import RSSM, RSSMState

#: The author's sizes, named by their rough number of parameters: ``WorldModel(shape, action_dim, **SIZES["12m"])``.
SIZES: Mapping[str, Mapping[str, int]] = {
    "1m": {"deter": 512, "hidden": 64, "classes": 4, "depth": 4, "units": 64},
    "12m": {"deter": 2048, "hidden": 256, "classes": 16, "depth": 16, "units": 256},
    "25m": {"deter": 3072, "hidden": 384, "classes": 24, "depth": 24, "units": 384},
    "50m": {"deter": 4096, "hidden": 512, "classes": 32, "depth": 32, "units": 512},
    "100m": {"deter": 6144, "hidden": 768, "classes": 48, "depth": 48, "units": 768},
    "200m": {"deter": 8192, "hidden": 1024, "classes": 64, "depth": 64, "units": 1024},
    "400m": {"deter": 12288, "hidden": 1536, "classes": 96, "depth": 96, "units": 1536},
}


class WorldModel(nn.Module):
    r"""Encoder, RSSM, decoder, reward head and continue head.

    ``apply, params = functionalize(world_model)`` makes it the pure function that
    ``dreamer_v3_model_loss(params, batch, world_model=apply)`` takes. Vectors are reconstructed in symlog space and
    images in [0, 1]: the loss's ``reco_transform="auto"`` is for uint8 images and for vectors.

    ``action[:, t]`` is the action taken *before* ``observation[:, t]`` was seen; where ``is_first`` it is ignored,
    whatever it holds. The defaults are the author's smallest size; :data:`SIZES` has the others.

    Source: Hafner et al. 2023 (arXiv:2301.04104); danijar/dreamerv3@e3f0224 dreamerv3/agent.py ``Agent.loss``,
    dreamerv3/configs.yaml.

    Args:
        observation_shape: shape of the observation without leading dimensions, or a mapping name -> shape. (C, H, W)
            is an image, any shorter shape a vector.
        action_dim: size of an action; discrete actions come in one-hot, as floats.
        deter: size of the recurrent state, divisible by ``blocks``.
        hidden: width of the RSSM's other layers.
        stoch: number of categorical variables.
        classes: classes of each.
        blocks: blocks of the recurrent layers and of the image decoder's input.
        unimix: share of the uniform distribution in what the latent is sampled from.
        depth: channels of the image networks, times ``mults`` for each stage.
        mults: one multiple of ``depth`` for each halving of an image.
        kernel: width of the convolutions.
        units: width of the encoder's, decoder's and heads' layers.
        layers: layers of the vector encoder and decoder.
        head_layers: hidden layers of the reward and continue heads.
        num_reward_bins: bins of the two-hot reward.
        act: name of the activation.

    Raises:
        ValueError: if a size is not possible.

    Example:
        >>> world_model = WorldModel((3,), action_dim=2, deter=16, hidden=8, stoch=4, units=8)
        >>> batch = {"observation": torch.zeros(5, 7, 3), "action": torch.zeros(5, 7, 2)}
        >>> batch |= {"is_first": torch.zeros(5, 7, dtype=torch.bool), "noise": torch.zeros(5, 7, 4, 4)}
        >>> {name: list(output.shape) for name, output in world_model(batch).items()}
        {'prior_logits': [5, 7, 4, 4], 'posterior_logits': [5, 7, 4, 4], 'deter': [5, 7, 16], 'stoch': [5, 7, 4, 4],
         'reconstruction': [5, 7, 3], 'reward': [5, 7, 255], 'continue_logits': [5, 7]}
    """

    def __init__(
        self,
        observation_shape: ObservationShape,
        action_dim: int,
        *,
        deter: int = 512,
        hidden: int = 64,
        stoch: int = 32,
        classes: int = 4,
        blocks: int = 8,
        unimix: float = 0.01,
        depth: int = 4,
        mults: Sequence[int] = (2, 3, 4, 4),
        kernel: int = 5,
        units: int = 64,
        layers: int = 3,
        head_layers: int = 1,
        num_reward_bins: int = 255,
        act: str = "silu",
    ):
        super().__init__()
        codec: dict[str, Any] = {"depth": depth, "mults": mults, "kernel": kernel, "units": units, "layers": layers}
        core: dict[str, Any] = {"deter": deter, "hidden": hidden, "stoch": stoch, "classes": classes, "unimix": unimix}
        head: dict[str, Any] = {"layers": head_layers, "units": units, "act": act}
        self.feature_size = deter + stoch * classes
        self.encoder = Encoder(observation_shape, **codec, act=act)
        self.rssm = RSSM(action_dim, self.encoder.out_features, **core, blocks=blocks, act=act)
        self.decoder = Decoder(deter, stoch * classes, observation_shape, **codec, blocks=blocks, act=act)
        self.reward_head = MLPHead(self.feature_size, num_reward_bins, **head, outscale=0.0)
        self.continue_head = MLPHead(self.feature_size, 1, **head, outscale=1.0)

    def forward(self, batch: Any) -> dict[str, Any]:
        r"""Follow a batch of sequences and predict what was seen.

        Args:
            batch: a mapping (dict or TensorDict) with "observation": [B, T, *obs] or a mapping of them, "action":
                [B, T, action_dim], "is_first": bool [B, T], "noise": Gumbel noise [B, T, groups, classes], and
                optionally "state": the :class:`RSSMState` (or mapping with "deter" and "stoch") to start from.

        Returns:
            "prior_logits" and "posterior_logits" [B, T, groups, classes], before unimix; "deter" [B, T, deter],
            "stoch" [B, T, groups, classes]; and what :meth:`predict` gives.

        Raises:
            KeyError: if ``batch`` lacks a key.
            TypeError: if a tensor has another dtype.
            ValueError: if a tensor has another shape.
        """
        take = {name: checks.take("WorldModel", "batch", batch, name) for name in ("action", "is_first", "noise")}
        tokens = self.encoder(checks.take("WorldModel", "batch", batch, "observation"))
        state = _state(batch["state"]) if checks.has(batch, "state") else None
        outputs = self.rssm.observe(tokens, take["action"], take["is_first"], take["noise"], state)
        return {
            "prior_logits": outputs.prior_logits,
            "posterior_logits": outputs.posterior_logits,
            "deter": outputs.deter,
            "stoch": outputs.stoch,
            **self.predict(outputs.deter, outputs.stoch),
        }

    def predict(self, deter: Tensor, stoch: Tensor) -> dict[str, Any]:
        """What latent states, observed or imagined, look like from outside.

        Args:
            deter: [..., deter].
            stoch: [..., groups, classes].

        Returns:
            "reconstruction": [..., *obs] or a mapping of them, as the observation; "reward": logits
            [..., num_reward_bins]; "continue_logits": [...], positive where the episode goes on.

        Raises:
            ValueError: if an argument has another shape.
        """
        features = self.features(deter, stoch)
        return {
            "reconstruction": self.decoder(features),
            "reward": self.reward_head(features),
            "continue_logits": self.continue_head(features).squeeze(-1),
        }

    def imagine_step(self, state: RSSMState, action: Tensor, noise: Tensor) -> RSSMState:
        """The state [B, *] that follows an action [B, action_dim], as :meth:`RSSM.imagine_step` predicts it."""
        return self.rssm.imagine_step(state, action, noise)[0]

    def features(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """[..., deter] and [..., groups, classes] to the features [..., deter + groups * classes] that heads read."""
        checks.last_dimension("WorldModel.features", "deter", deter, self.rssm.deter)
        wanted = (*deter.shape[:-1], self.rssm.stoch, self.rssm.classes)
        checks.same_shape("WorldModel.features", "stoch", stoch, "deter, groups and classes", wanted)
        return torch.cat([deter, stoch.flatten(-2)], -1)


def _state(state: Any) -> RSSMState:
    if isinstance(state, RSSMState):
        return state
    return RSSMState(*(checks.take("WorldModel", "batch['state']", state, name) for name in RSSMState._fields))
