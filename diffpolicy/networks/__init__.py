"""Networks: raw modules that map a noisy plan, a time and an observation to a plan."""

from diffpolicy.networks.anchored import Anchored
from diffpolicy.networks.base import Network
from diffpolicy.networks.convert import from_diffusion_policy_state_dict, from_lerobot_state_dict
from diffpolicy.networks.embeddings import sinusoidal
from diffpolicy.networks.mlp import MLP
from diffpolicy.networks.registry import NETWORKS, make_network
from diffpolicy.networks.transformer import Transformer
from diffpolicy.networks.unet1d import UNet1D

__all__ = [
    "MLP",
    "NETWORKS",
    "Anchored",
    "Network",
    "Transformer",
    "UNet1D",
    "from_diffusion_policy_state_dict",
    "from_lerobot_state_dict",
    "make_network",
    "sinusoidal",
]
