"""Networks by name: the closed list that configs and checkpoints choose from."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffpolicy.networks.anchored import Anchored
from diffpolicy.networks.base import Network
from diffpolicy.networks.mlp import MLP
from diffpolicy.networks.modalities import Modalities
from diffpolicy.networks.sequence import SequenceCNN
from diffpolicy.networks.transformer import Transformer
from diffpolicy.networks.unet1d import UNet1D
from diffpolicy.settings import check_choice, check_known

_KINDS: tuple[type[Network], ...] = (Anchored, MLP, Modalities, SequenceCNN, Transformer, UNet1D)
NETWORKS: Mapping[str, type[Network]] = {kind.TYPE: kind for kind in _KINDS}


def make_network(config: Mapping[str, Any]) -> Network:
    """Build a network from plain values.

    Args:
        config: "type" (a key of ``NETWORKS``) and the arguments of that class, as
            ``Network.config`` returns them.

    Returns:
        The network, freshly initialised.

    Raises:
        ValueError: Unknown type, unknown or missing key, or a value out of range.
    """
    network: Network = construct(NETWORKS, config, "network")
    return network


def sized_network(config: Mapping[str, Any], horizon: int, dim: int, cond_dim: int) -> Network:
    """Build a network whose sizes are those of what it is a part of.

    Args:
        config: "type" and the other arguments.
        horizon: H.
        dim: D.
        cond_dim: C.

    Raises:
        ValueError: A size stands in ``config``, or what :func:`make_network` refuses.
    """
    sizes = {"horizon": horizon, "dim": dim, "cond_dim": cond_dim}
    given = sorted(set(sizes) & set(config))
    if given:
        raise ValueError(f"{', '.join(given)} of this network are given otherwise: leave out")
    return make_network({**config, **sizes})


def construct(kinds: Mapping[str, type[Any]], config: Mapping[str, Any], what: str) -> Any:
    """An object of one of ``kinds``, whose name is "type" in ``config``, from its arguments.

    Args:
        kinds: classes by name, a closed list.
        config: "type" and the arguments of that class.
        what: what is built, for messages.

    Raises:
        ValueError: Unknown type, unknown or missing key, or a value out of range.
    """
    arguments = dict(config)
    kind = arguments.pop("type", None)
    check_choice(f"{what} type", kind, kinds)
    parameters = inspect.signature(kinds[kind]).parameters
    check_known(arguments, parameters, f"{what} {kind!r}")
    required = [name for name, one in parameters.items() if one.default is one.empty]
    missing = ", ".join(name for name in required if name not in arguments)
    if missing:
        raise ValueError(f"{what} {kind!r} needs {missing}; got {sorted(arguments)}")
    return kinds[kind](**arguments)
