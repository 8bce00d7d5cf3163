"""What every network of the library answers to."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpolicy.settings import check_range, check_shape

T_KINDS = ("row", "position", "dim")


class Configured(nn.Module):
    """A module that says the arguments it was made with, by its attributes of the same names.

    Attributes:
        TYPE: its name in the registry.
    """

    TYPE: ClassVar[str]

    def config(self) -> dict[str, Any]:
        """Plain values from which the registry makes the same module (untrained)."""
        names = inspect.signature(type(self)).parameters
        return {"type": self.TYPE, **{name: _plain(self.argument(name)) for name in names}}

    def argument(self, name: str) -> Any:
        """What it was made with, by the argument's name."""
        return getattr(self, name)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


class Network(Configured, ABC):
    """A map ``(x [B, H, D], t, cond [B, C]) -> [B, H, D]``.

    ``t`` is *network time* (whatever scale the denoiser trains with; 0..1000 suits the sinusoidal
    embedding) and broadcasts to ``x``: ``[B, 1, 1]`` (kind "row"), ``[B, H, 1]`` ("position") or
    ``[B, 1, D]`` ("dim"). No network reads a tensor's value on the host.

    Sequences of tokens are one-hot along D, soft or hard. A network with ``takes_tokens`` also
    takes them as integers: int64 ``[B, H]`` in 0 .. D - 1, the same output as for their one-hot.

    Args:
        horizon: Positions H of a plan, at least 1.
        dim: Size D of one position, at least 1.
        cond_dim: Size C of the flat observation; 0 makes the network unconditional.
        t_kinds: The kinds of ``t`` the network takes, a subset of ``T_KINDS``.

    Raises:
        ValueError: A size is not a positive integer.
    """

    takes_tokens = False

    def __init__(self, horizon: int, dim: int, cond_dim: int, *, t_kinds: Iterable[str]) -> None:
        super().__init__()
        check_positive(horizon=horizon, dim=dim)
        check_range("[0, inf)", cond_dim=cond_dim)
        self.horizon, self.dim, self.cond_dim = horizon, dim, cond_dim
        self.t_kinds = frozenset(t_kinds)

    @abstractmethod
    def embed_time(self, t: Tensor) -> Tensor:
        """Embed times of shape ``[..., 1 or H, 1 or D]``; the leading dimensions are kept.

        Entries are independent, so the times of a whole loop, stacked to ``[K, 1, 1, 1]``, can be
        embedded at once and the k-th result passed to :meth:`forward` as ``time_emb``.
        """

    @abstractmethod
    def forward(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, *, time_emb: Tensor | None = None
    ) -> Tensor:
        """Apply the network.

        Args:
            x: Noisy plans [B, H, D], or int64 tokens [B, H] if the network ``takes_tokens``.
            t: Network time, broadcastable to ``x``; ignored when ``time_emb`` is given.
            cond: Observations [B, C] (or [1, C]); None exactly when ``cond_dim`` is 0.
            time_emb: ``embed_time(t)``, computed beforehand.

        Returns:
            The output [B, H, D].

        Raises:
            ValueError: A shape does not fit, or integers for a network which does not take them.
        """

    def num_parameters(self) -> int:
        """Number of trainable scalars."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def check_inputs(self, x: Tensor, cond: Tensor | None) -> None:
        """Refuse shapes that do not fit; looks at shapes and types only.

        Raises:
            ValueError: ``x`` or ``cond`` has another shape than the network was built for, or
                ``x`` is of integers and the network does not take tokens.
        """
        if not x.is_floating_point():
            self._check_tokens(x)
        else:
            check_shape("x", x.shape, ("B", self.horizon, self.dim))
        if (cond is None) != (not self.cond_dim):
            given = "none" if cond is None else list(cond.shape)
            built = f"cond_dim={self.cond_dim} (0: unconditional)"
            raise ValueError(f"this network was built with {built}, got cond {given}")
        if cond is not None:
            check_shape("cond", cond.shape, ("B", self.cond_dim))

    def _check_tokens(self, x: Tensor) -> None:
        got = f"got {list(x.shape)} of {x.dtype}"
        if not self.takes_tokens:
            raise ValueError(
                f"{type(self).__name__} takes x [B, {self.horizon}, {self.dim}] of floats, {got}: "
                "pass a one-hot of the tokens, or use mlp, transformer or sequence_cnn"
            )
        if x.dtype != torch.int64 or x.dim() != 2 or x.shape[1] != self.horizon:
            wanted = f"int64 [B, {self.horizon}] (horizon) in 0 .. {self.dim - 1}"
            raise ValueError(f"tokens must be {wanted}, {got}")


def check_positive(**sizes: int) -> None:
    """Raise unless every named size is an integer above zero.

    Raises:
        ValueError: Names the first that is not.
    """
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def as_time(t: Tensor | float, like: Tensor) -> Tensor:
    """Give ``t`` two trailing dimensions: a number or 0-dim tensor becomes [1, 1, 1]."""
    t = torch.as_tensor(t, device=like.device)
    return t.reshape(1, 1, 1) if t.dim() == 0 else t


def one_hot(tokens: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Tokens [...] in 0 .. size - 1 as floats [..., size], without reading them on the host.

    Raises:
        IndexError: A token is out of range; on a GPU an assertion of the device.
    """
    # A lookup: torch's one_hot reads the smallest and the largest token on the host.
    return F.embedding(tokens, torch.eye(size, dtype=dtype, device=tokens.device))


def described(holder: object, what: str, network: nn.Module) -> str:
    """The ``repr`` of what holds a network: its class, what it is, its size and where it is."""
    weights = list(network.parameters())
    count = sum(weight.numel() for weight in weights)
    size = f"{count / 1e6:.2f}M" if count >= 1e5 else str(count)
    where = f", on {weights[0].device}" if weights else ""
    return f"{type(holder).__name__}({what}; {size} parameters{where})"
