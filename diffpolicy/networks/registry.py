"""Networks by name: the closed list that configs and checkpoints choose from."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from diffpolicy.extras import TRUST_VARIABLE, trusts
from diffpolicy.networks.act import ACT
from diffpolicy.networks.anchored import Anchored
from diffpolicy.networks.base import Network
from diffpolicy.networks.bc_gmm import BCGMM
from diffpolicy.networks.bc_mlp import BCMLP
from diffpolicy.networks.flow_map import FlowMap
from diffpolicy.networks.mlp import MLP
from diffpolicy.networks.modalities import Modalities
from diffpolicy.networks.sequence import SequenceCNN
from diffpolicy.networks.transformer import Transformer
from diffpolicy.networks.unet1d import UNet1D
from diffpolicy.settings import check_choice, check_known, near_miss

_DENOISING = (Anchored, MLP, Modalities, SequenceCNN, Transformer, UNet1D, FlowMap)
_IN_ONE_CALL = (BCMLP, BCGMM, ACT)
_KINDS: tuple[type[Network], ...] = (*_DENOISING, *_IN_ONE_CALL)
NETWORKS: Mapping[str, type[Network]] = {kind.TYPE: kind for kind in _KINDS}
_COLLECTING = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def make_network(config: Mapping[str, Any]) -> Network:
    """Build a network from plain values.

    Args:
        config: "type" (a key of ``NETWORKS``, or ``package.module:Class``, a subclass of
            ``Network``) and the arguments of that class, as ``Network.config`` returns them.

    Returns:
        The network, freshly initialised.

    Raises:
        ValueError: Unknown type, unknown or missing key, or a value out of range.
    """
    network: Network = construct(NETWORKS, config, "network", Network)
    return network


def network_class(name: object) -> type[Network]:
    """The class of a key of ``NETWORKS``, or of ``package.module:Class``.

    Raises:
        ValueError: What :func:`class_of` refuses.
    """
    return class_of(NETWORKS, name, "network type", Network)


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


def construct(
    kinds: Mapping[str, type[Any]],
    config: Mapping[str, Any],
    what: str,
    base: type[Any] | None = None,
) -> Any:
    """An object of one of ``kinds``, whose name is "type" in ``config``, from its arguments.

    Args:
        kinds: classes by name.
        config: "type" and the arguments of that class.
        what: what is built, for messages.
        base: see :func:`class_of`.

    Raises:
        ValueError: Unknown type, unknown or missing key, or a value out of range.
    """
    arguments = dict(config)
    name = arguments.pop("type", None)
    kind = class_of(kinds, name, f"{what} type", base)
    parameters = inspect.signature(kind).parameters.values()
    named = {one.name: one for one in parameters if one.kind not in _COLLECTING}
    if all(one.kind is not one.VAR_KEYWORD for one in parameters):
        check_known(arguments, named, f"{what} {name!r}")
    required = [key for key, one in named.items() if one.default is one.empty]
    missing = ", ".join(key for key in required if key not in arguments)
    if missing:
        raise ValueError(f"{what} {name!r} needs {missing}; got {sorted(arguments)}")
    return kind(**arguments)


def class_of(
    kinds: Mapping[str, type[Any]], name: object, what: str, base: type[Any] | None = None
) -> type[Any]:
    """The class that a configuration names: one of ``kinds``, or ``package.module:Class``.

    Args:
        kinds: classes by name.
        name: what the configuration says.
        what: what it is, for messages.
        base: what a class of the user's own must be a subclass of; None: there is only ``kinds``.

    Example:
        >>> class_of(ENCODERS, "mypackage.vision:MyEncoder", "encoder type", Encoder)

    Raises:
        ValueError: an unknown name, a module that cannot be imported, no such class in it, or one
            of another kind.
    """
    if base is None or not isinstance(name, str) or ":" not in name:
        check_choice(what, name, [*kinds, *([] if base is None else ["package:Class"])])
        return kinds[name]  # type: ignore[index]
    module, _, inside = name.partition(":")
    try:
        home = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{what} {name!r} needs the module {module!r}, which cannot be imported: {error}. "
            "Install its package, or put the folder that it is in on PYTHONPATH"
        ) from error
    found = getattr(home, inside, None)
    if not isinstance(found, type):
        classes = [key for key, one in vars(home).items() if isinstance(one, type)]
        raise ValueError(f"{module} has no class {inside!r}{near_miss(inside, classes)}")
    if not issubclass(found, base):
        raise ValueError(
            f"{what} {name!r} must be a subclass of {base.__module__}.{base.__qualname__}"
        )
    return found


def check_stored_code(values: Any, source: object) -> None:
    """Refuse code that a file names unless it was imported already, or its package is trusted.

    What a user types is code that he chose; what a file says, a policy that was downloaded, is
    not. Every ``type`` of the form ``package.module:Class`` is looked at, however deep.

    Args:
        values: what the file says, as plain values.
        source: the file, for the message.

    Raises:
        ValueError: says how to trust the package.
    """
    parts = values.values() if isinstance(values, Mapping) else values
    for part in parts if isinstance(values, Mapping | list | tuple) else ():
        check_stored_code(part, source)
    name = values.get("type") if isinstance(values, Mapping) else None
    if not isinstance(name, str) or ":" not in name:
        return
    module = name.partition(":")[0]
    package = module.partition(".")[0]
    if module not in sys.modules and not trusts(package):
        raise ValueError(
            f"{source} names {name!r}, which is code of the package {package!r} that you did not "
            f"choose. If you know it, say trust_env={package} (from Python: import {module} "
            f"before, or {TRUST_VARIABLE}={package} in the environment)"
        )
