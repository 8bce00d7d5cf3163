"""Networks: raw modules that map a noisy plan, a time and an observation to a plan."""

from diffpolicy.networks.act import ACT
from diffpolicy.networks.anchored import Anchored
from diffpolicy.networks.base import Network
from diffpolicy.networks.bc_gmm import BCGMM
from diffpolicy.networks.bc_mlp import BCMLP
from diffpolicy.networks.convert import (
    from_diffusion_policy_state_dict,
    from_lerobot_state_dict,
    from_resnet18_state_dict,
)
from diffpolicy.networks.critics import QEnsemble, StateValue
from diffpolicy.networks.direct import Direct
from diffpolicy.networks.draft import Draft
from diffpolicy.networks.embeddings import sinusoidal
from diffpolicy.networks.flow_map import FlowMap
from diffpolicy.networks.heads import HEADS, InverseDynamics, TrajectoryValue, make_head
from diffpolicy.networks.mlp import MLP
from diffpolicy.networks.modalities import Modalities
from diffpolicy.networks.registry import NETWORKS, make_network
from diffpolicy.networks.sequence import SequenceCNN, SequenceRegressor
from diffpolicy.networks.transformer import Transformer
from diffpolicy.networks.unet1d import UNet1D

__all__ = [
    "ACT",
    "BCGMM",
    "BCMLP",
    "HEADS",
    "MLP",
    "NETWORKS",
    "Anchored",
    "Direct",
    "Draft",
    "FlowMap",
    "InverseDynamics",
    "Modalities",
    "Network",
    "QEnsemble",
    "SequenceCNN",
    "SequenceRegressor",
    "StateValue",
    "TrajectoryValue",
    "Transformer",
    "UNet1D",
    "from_diffusion_policy_state_dict",
    "from_lerobot_state_dict",
    "from_resnet18_state_dict",
    "make_head",
    "make_network",
    "sinusoidal",
]
