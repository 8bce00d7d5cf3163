"""Adapters: few trainable numbers beside frozen weights, for tuning with little memory.

Two kinds: low-rank changes (LoRA, Hu et al. 2022, arXiv 2106.09685) and changes of the smallest
weights alone (SaRA, arXiv 2409.06633). Both are parametrizations of torch
(``torch.nn.utils.parametrize``): no layer is replaced, so linear layers, convolutions and packed
attention weights are treated alike, and whatever reads ``layer.weight`` reads the adapted weight.
The library ``peft`` would bring transformers, accelerate and a model hub with it.

The reference of a tuning is the same network with its adapters off: no second copy of the weights.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffpolicy.networks.base import check_positive
from diffpolicy.networks.registry import construct
from diffpolicy.settings import check_range

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
        raise ValueError(f"{type(denoiser).__name__} has no network that adapters could change")
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
        text = "leave out the objective's prefix ('denoiser.')"
        raise ValueError(f"state is not of this denoiser: {wrong[0]!r} is in one alone; {text}")
    plain = {name: value.detach() for name, value in state.items()}
    for site in _sites(denoiser) if has_adapters(denoiser) else ():
        weight = plain.pop(f"{site.path}.original")
        numbers = {name: plain.pop(f"{site.path}.0.{name}") for name in site.adapter.state_dict()}
        plain[site.name] = site.adapter.merged(weight, numbers)
    return plain


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
        if isinstance(module, parametrize.ParametrizationList) and isinstance(module[0], Adapter):
            owner, _, tensor = path.rpartition(".parametrizations.")
            layer = denoiser.get_submodule(owner)
            found.append(_Site(path, f"{owner}.{tensor}", layer, tensor, module[0]))
    if not found:
        raise ValueError(NONE)
    return found


def _chosen(network: nn.Module, settings: Lora | Sara) -> list[_Target]:
    able = [target for target in _targets(network) if settings.takes(target.weight)]
    names = sorted({target.name for target in able})
    patterns = ("*",) if settings.targets is None else settings.targets
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            known = ", ".join(names) or "none"
            raise ValueError(f"{settings} can adapt no layer named {pattern!r}; those are {known}")
    return [t for t in able if any(fnmatchcase(t.name, pattern) for pattern in patterns)]


def _targets(network: nn.Module) -> Iterator[_Target]:
    for name, layer in network.named_modules():
        if parametrize.is_parametrized(layer):  # by something else, which stays in charge of it
            continue
        for tensor, weight in layer.named_parameters(recurse=False):
            if weight.dim() >= 2 and (tensor == "weight" or tensor.endswith("_weight")):
                yield _Target(name, layer, tensor, weight)


class Adapter(nn.Module, ABC):
    """A change of one weight, from numbers of its own.

    Attributes:
        off: how many :func:`adapters_off` blocks are open.
        trained: names of the denoiser's parameters that took a gradient before it was adapted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.off = 0
        self.trained: frozenset[str] = frozenset()

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, or ``weight`` itself while adapters are off."""
        if self.off:
            return weight
        return self.merged(weight, {**self._parameters, **self._buffers})  # type: ignore[dict-item]

    @abstractmethod
    def merged(self, weight: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """The adapted weight for given numbers: a pure function, whether adapters are off or not.

        Args:
            weight: the frozen weight, any shape.
            numbers: as this module's ``state_dict`` names them.
        """

    def __getstate__(self) -> dict[str, Any]:
        # A copy made while adapters are off is on: no block would ever switch it on.
        return {**self.__dict__, "off": 0}


class LowRank(Adapter):
    """``W + scale * up @ down``: ``up [rows, rank]`` starts at zero, ``down [rank, columns]`` not.

    A weight of more than two dimensions is the matrix of its first dimension by all others: the
    ``[out, inner, taps]`` of a convolution, ``[3 E, E]`` of a packed attention (queries, keys and
    values share ``down``).
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        rows, columns = _sides(weight)
        down = torch.empty(rank, columns)
        # The bound that the authors' code has: 1 / sqrt(columns).
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))

    def merged(self, weight: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Adapter.merged`."""
        change = numbers["up"] @ numbers["down"]
        return torch.add(weight, change.view_as(weight), alpha=self.scale)


class Sparse(Adapter):
    """``W`` with a trainable ``change [count]`` added at its ``count`` smallest magnitudes."""

    index: Tensor

    def __init__(self, weight: Tensor, quantile: float) -> None:
        super().__init__()
        count = max(1, round(quantile * weight.numel()))
        smallest = weight.detach().abs().flatten().argsort(stable=True)[:count]
        self.register_buffer("index", smallest.sort().values.to(torch.int32))
        self.change = nn.Parameter(weight.new_zeros(count))

    def merged(self, weight: Tensor, numbers: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Adapter.merged`."""
        flat = weight.flatten().index_add(0, numbers["index"], numbers["change"])
        return flat.view_as(weight)


@dataclass(frozen=True)
class Lora:
    """Settings of low-rank adapters: ``W + scale * up @ down``.

    ``up`` starts at zero, ``down`` uniform in +-1 / sqrt(columns). ``scale`` is what is published
    as ``alpha / rank``: 1.0 is alpha = rank, and a published ``alpha`` is ``scale * rank``. An
    average of the weights (EMA) averages ``up`` and ``down`` themselves, not their product.

    Args:
        rank: of the change, at least 1.
        scale: factor of the change, above 0.
        targets: patterns (``*``, ``?``, ``[...]``; ``*`` crosses dots) of names of layers within
            the network, such as ``"blocks.*.expand"``; None: every layer with a weight matrix.
            Layers whose matrix has a side of ``rank`` or less are never adapted.
        seed: of ``down``.

    Raises:
        ValueError: a setting is out of range.
    """

    rank: int = 8
    scale: float = 1.0
    targets: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(rank=self.rank)
        check_range("(0, inf)", scale=self.scale)
        _check_targets(self.targets)

    def takes(self, weight: Tensor) -> bool:
        """Whether a weight has room for a change of this rank."""
        return min(_sides(weight)) > self.rank

    def adapters(self, weights: Sequence[Tensor]) -> list[Adapter]:
        """One adapter for each weight."""
        generator = torch.Generator().manual_seed(self.seed)
        return [LowRank(w, self.rank, self.scale, generator) for w in weights]


@dataclass(frozen=True)
class Sara:
    """Settings of sparse adapters: the smallest weights are trained, all others stay.

    SaRA (arXiv 2409.06633) trains the entries below one threshold, 0.002, of large image models.
    Here the threshold is a quantile of every layer by itself. Layers of small networks differ in
    scale: below the 0.2 quantile of all weights of a trained ``mlp`` of 3 blocks of 256 are 4 % of
    its first layer and 30 % of its blocks' last ones (and 5 % of all below 0.002). What is trained
    is the change from the given value, so weight decay pulls towards the given weights.
    The paper's nuclear-norm penalty and its second selection during training are not part of it.

    Args:
        quantile: share of the entries of a layer that are trained, in (0, 1); the paper finds the
            smallest 0.1 to 0.2 to matter least.
        targets: as for :class:`Lora`.

    Raises:
        ValueError: a setting is out of range.
    """

    quantile: float = 0.2
    targets: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_range("(0, 1)", quantile=self.quantile)
        _check_targets(self.targets)

    def takes(self, weight: Tensor) -> bool:
        """Every weight has a smallest entry."""
        return weight.numel() > 0

    def adapters(self, weights: Sequence[Tensor]) -> list[Adapter]:
        """One adapter for each weight."""
        return [Sparse(w, self.quantile) for w in weights]


KINDS: Mapping[str, type[Lora | Sara]] = {"lora": Lora, "sara": Sara}


def _sides(weight: Tensor) -> tuple[int, int]:
    """Rows and columns of a weight as a matrix."""
    return weight.shape[0], weight[0].numel()


def _check_targets(targets: Sequence[str] | None) -> None:
    if targets is None:
        return
    if isinstance(targets, str) or not targets or not all(isinstance(t, str) for t in targets):
        raise ValueError(f"targets must be patterns such as ['blocks.*'], or None; got {targets!r}")
