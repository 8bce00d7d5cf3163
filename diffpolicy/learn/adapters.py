"""Adapters: few trainable numbers beside frozen weights, for tuning with little memory.

Two kinds: low-rank changes (LoRA, Hu et al. 2022, arXiv 2106.09685) and changes of the smallest
weights alone (SaRA, arXiv 2409.06633). Both are parametrizations of torch
(``torch.nn.utils.parametrize``): no layer is replaced, so linear layers, convolutions and packed
attention weights are treated alike, and whatever reads ``layer.weight`` reads the adapted weight.
The library ``peft`` would bring transformers, accelerate and a model hub with it.

The reference of a tuning is the same network with its adapters off: no second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffpolicy.learn.adapter_kinds import KINDS, Adapter, Lora, Sara
from diffpolicy.networks.registry import construct

NONE = "the denoiser has no adapters: add_adapters(denoiser, config) first"


def add_adapters(denoiser: nn.Module, config: Mapping[str, Any]) -> None:
    """Adapt a denoiser in place; afterwards its adapters alone take a gradient.

    Its outputs are what they were, bit for bit, until the adapters are trained. Weights are those
    parameters of two or more dimensions that a layer calls ``weight`` or ``..._weight``.

    Args:
        denoiser: a module whose ``network`` is adapted; all its parameters are frozen.
        config: ``type`` and the settings of :class:`Lora` (``"lora"``) or :class:`Sara`
            (``"sara"``).

    Example:
        >>> add_adapters(policy.denoiser, {"type": "lora", "rank": 4, "targets": ["blocks.*"]})

    Raises:
        ValueError: unknown settings, a pattern that no layer matches, a denoiser without a network
            or one that has adapters already.
    """
    settings: Lora | Sara = construct(KINDS, config, "adapter")
    if has_adapters(denoiser):
        raise ValueError("the denoiser has adapters already: merge_adapters(denoiser) first")
    network = getattr(denoiser, "network", None)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"adapters need a denoiser with a network; {type(denoiser).__name__} has none"
        )
    chosen = _chosen(network, settings)
    trained = frozenset(name for name, p in denoiser.named_parameters() if p.requires_grad)
    adapters = settings.adapters([target.weight for target in chosen])
    denoiser.requires_grad_(requires_grad=False)
    for target, adapter in zip(chosen, adapters, strict=True):
        adapter.trained = trained
        parametrize.register_parametrization(target.layer, target.tensor, adapter)


def has_adapters(denoiser: nn.Module) -> bool:
    """Whether :func:`add_adapters` was applied, and its adapters are not merged yet."""
    return any(isinstance(module, Adapter) for module in denoiser.modules())


@contextmanager
def adapters_off(denoiser: nn.Module) -> Iterator[None]:
    """Within the block the denoiser is the one it was before :func:`add_adapters`, bit for bit.

    Blocks may be nested, and an exception leaves none open. Copies of the denoiser, made before or
    within, are not touched. The switch is the denoiser's, not the thread's.

    What is computed once belongs to one side: a sampler's ``Grid`` holds embeddings of time, and a
    chain with ``checkpoint=True`` runs the network again in its backward pass, so make and use both
    within one block. ``torch.nn.utils.parametrize.cached`` around a block defeats it.

    Raises:
        ValueError: the denoiser has no adapters.
    """
    adapters = [module for module in denoiser.modules() if isinstance(module, Adapter)]
    if not adapters:
        raise ValueError(NONE)
    for adapter in adapters:
        adapter.off += 1
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.off -= 1


def merge_adapters(denoiser: nn.Module) -> None:
    """Make plain weights of the adapted ones, in place: the same outputs, the names of before.

    Parameters that took a gradient before :func:`add_adapters` take one again.

    Raises:
        ValueError: the denoiser has no adapters.
    """
    sites = _sites(denoiser)
    merged = merged_state(denoiser, denoiser.state_dict())
    originals = [site.layer.parametrizations[site.tensor].original for site in sites]  # type: ignore[index, union-attr]
    for layer in {id(site.layer): site.layer for site in sites}.values():
        # Not torch's remove_parametrizations: it would take the weight from a copy's class, too.
        plain = parametrize.type_before_parametrizations(layer)
        delattr(layer, "parametrizations")
        layer.__class__ = plain
    for site, original in zip(sites, originals, strict=True):
        # In the same tensor, so that whoever holds it sees it change.
        original.detach().copy_(merged[site.name])
        site.layer.register_parameter(site.tensor, original)
    for name, parameter in denoiser.named_parameters():
        parameter.requires_grad = name in sites[0].adapter.trained


def merged_state(denoiser: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plain ``state_dict`` that an adapted one amounts to, such as an average of training.

    A pure function of ``state``: the denoiser gives the structure alone and is not changed, and it
    does not matter whether its adapters are off. A denoiser without adapters gives ``state`` back.

    Args:
        denoiser: has adapters.
        state: under the names of its ``state_dict``, on one device.

    Returns:
        The names of the denoiser before :func:`add_adapters`; entries without an adapter are the
        tensors of ``state`` themselves.

    Raises:
        ValueError: ``state`` has other names than the denoiser.
    """
    expected = denoiser.state_dict().keys()
    wrong = sorted(expected ^ state.keys())
    if wrong:
        raise ValueError(
            f"state is not one of this denoiser: it {_differs(wrong[0], state)}; pass the entries "
            "of the adapted denoiser alone, without the objective's prefix ('denoiser.')"
        )
    plain = {name: value.detach() for name, value in state.items()}
    for site in _sites(denoiser) if has_adapters(denoiser) else ():
        weight = plain.pop(f"{site.path}.original")
        numbers = {name: plain.pop(f"{site.path}.0.{name}") for name in site.adapter.state_dict()}
        plain[site.name] = site.adapter.merged(weight, numbers)
    return plain


def _differs(name: str, state: Mapping[str, Tensor]) -> str:
    return f"has {name!r}" if name in state else f"lacks {name!r}"


class _Target(NamedTuple):
    """A weight that can be adapted; ``name`` is that of its layer within the network."""

    name: str
    layer: nn.Module
    tensor: str
    weight: Tensor


class _Site(NamedTuple):
    """An adapter, where it is, and the plain name of its weight within the denoiser."""

    path: str
    name: str
    layer: nn.Module
    tensor: str
    adapter: Adapter


def _sites(denoiser: nn.Module) -> list[_Site]:
    found = []
    for path, module in denoiser.named_modules():
        if not isinstance(module, parametrize.ParametrizationList):
            continue
        adapter = module[0]
        if isinstance(adapter, Adapter):
            owner, _, tensor = path.rpartition(".parametrizations.")
            layer = denoiser.get_submodule(owner)
            found.append(_Site(path, f"{owner}.{tensor}", layer, tensor, adapter))
    if not found:
        raise ValueError(NONE)
    return found


def _chosen(network: nn.Module, settings: Lora | Sara) -> list[_Target]:
    able = [target for target in _targets(network) if settings.takes(target.weight)]
    names = sorted({target.name for target in able})
    patterns = ("*",) if settings.targets is None else settings.targets
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"no layer of {type(network).__name__} that {settings} can adapt is named "
                f"{pattern!r}; those are {', '.join(names) or 'none'}"
            )
    return [t for t in able if any(fnmatchcase(t.name, pattern) for pattern in patterns)]


def _targets(network: nn.Module) -> Iterator[_Target]:
    for name, layer in network.named_modules():
        if parametrize.is_parametrized(layer):  # by something else, which stays in charge of it
            continue
        for tensor, weight in layer.named_parameters(recurse=False):
            if weight.dim() >= 2 and (tensor == "weight" or tensor.endswith("_weight")):
                yield _Target(name, layer, tensor, weight)
