"""Reference networks: DreamerV3's agent and its parts, and the networks of random network distillation.

No network draws anything in its forward pass: what samples takes its noise as an argument. Initial parameters come from
torch's global generator, as those of every torch module: call ``torch.manual_seed`` before making a network.
"""

from rlloss_nn.networks.agent import Actor as Actor
from rlloss_nn.networks.agent import Agent as Agent
from rlloss_nn.networks.agent import Continuous as Continuous
from rlloss_nn.networks.agent import Discrete as Discrete
from rlloss_nn.networks.agent import Memory as Memory
from rlloss_nn.networks.codecs import ImageDecoder as ImageDecoder
from rlloss_nn.networks.codecs import ImageEncoder as ImageEncoder
from rlloss_nn.networks.codecs import VectorDecoder as VectorDecoder
from rlloss_nn.networks.codecs import VectorEncoder as VectorEncoder
from rlloss_nn.networks.heads import MLPHead as MLPHead
from rlloss_nn.networks.layers import MLP as MLP
from rlloss_nn.networks.layers import BlockLinear as BlockLinear
from rlloss_nn.networks.layers import RMSNorm as RMSNorm
from rlloss_nn.networks.observations import Decoder as Decoder
from rlloss_nn.networks.observations import Encoder as Encoder
from rlloss_nn.networks.rnd import RNDConvNetwork as RNDConvNetwork
from rlloss_nn.networks.rnd import RNDVectorNetwork as RNDVectorNetwork
from rlloss_nn.networks.rssm import RSSM as RSSM
from rlloss_nn.networks.rssm import Imagined as Imagined
from rlloss_nn.networks.rssm import Observed as Observed
from rlloss_nn.networks.rssm import RSSMState as RSSMState
from rlloss_nn.networks.world_model import SIZES as SIZES
from rlloss_nn.networks.world_model import WorldModel as WorldModel

__all__ = [
    "MLP",
    "RSSM",
    "SIZES",
    "Actor",
    "Agent",
    "BlockLinear",
    "Continuous",
    "Decoder",
    "Discrete",
    "Encoder",
    "ImageDecoder",
    "ImageEncoder",
    "Imagined",
    "MLPHead",
    "Memory",
    "Observed",
    "RMSNorm",
    "RNDConvNetwork",
    "RNDVectorNetwork",
    "RSSMState",
    "VectorDecoder",
    "VectorEncoder",
    "WorldModel",
]
