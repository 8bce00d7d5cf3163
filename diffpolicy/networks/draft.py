"""Causal models that write the first version of a plan, one state after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffpolicy.networks.base import Configured, check_positive
from diffpolicy.networks.embeddings import sinusoidal, zeroed
from diffpolicy.settings import check_choice, check_range, check_shape

DRAFT_BASES = ("gru", "transformer")


class Draft(Configured):
    """Predict the next state, and the next return if it is told one, from those so far.

    The first stage of Trajectory Diffuser (Huang et al. 2024): a plan written by this cheap model
    is close enough to the data for diffusion to begin at a low noise level. Both bases predict
    changes, from zero at the start of training: an untrained draft stays where it is.

    Args:
        obs_dim: O.
        horizon: H, the longest sequence.
        n_obs_steps: To, the length of the history that :meth:`rollout` goes on from.
        returns: whether it is told the return to go, and predicts how that changes.
        base: ``"gru"`` (fastest one by one) or ``"transformer"`` (rolled out with cached keys and
            values).
        width: units of a layer.
        depth: layers.
        heads: attention heads of the transformer.
        constant: entries of the observation that never change; a rollout does not move them.

    Raises:
        ValueError: an unknown base, or a size or entry out of range.
    """

    TYPE = "draft"
    free: Tensor

    def __init__(
        self,
        obs_dim: int,
        horizon: int,
        n_obs_steps: int,
        *,
        returns: bool = False,
        base: str = "gru",
        width: int = 128,
        depth: int = 1,
        heads: int = 4,
        constant: Sequence[int] = (),
    ) -> None:
        super().__init__()
        check_positive(obs_dim=obs_dim, horizon=horizon, n_obs_steps=n_obs_steps)
        check_positive(width=width, depth=depth)
        check_choice("base of a draft", base, DRAFT_BASES)
        if horizon <= n_obs_steps:
            text = f"a draft goes on from n_obs_steps={n_obs_steps} states"
            raise ValueError(f"{text}: horizon must be larger, got {horizon}")
        self.obs_dim, self.horizon, self.n_obs_steps = obs_dim, horizon, n_obs_steps
        self.returns, self.base, self.width, self.depth = bool(returns), base, width, depth
        self.heads = heads
        size = obs_dim + self.returns
        self.constant = tuple(constant)
        for entry in self.constant:
            check_range(f"[0, {obs_dim})", constant=entry)
        free = torch.ones(size)
        free[list(self.constant)] = 0.0
        self.register_buffer("free", free, persistent=False)
        self.model: _GRU | _CausalTransformer
        if base == "gru":
            self.model = _GRU(size, width, depth)
        else:
            self.model = _CausalTransformer(size, horizon, width, depth, heads)
        self.hidden = nn.Linear(width, width)
        self.outward = zeroed(nn.Linear(width, size))

    def forward(
        self, states: Tensor, returns: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What comes after each state of a sequence, given those up to it (teacher forcing).

        Args:
            states: normalised ``[B, T, O]``, T at most H.
            returns: return to go at each of them ``[B, T, 1]``, exactly if ``returns`` is set.

        Returns:
            Next states ``[B, T, O]`` and next returns ``[B, T, 1]`` or None.

        Raises:
            ValueError: a shape does not fit.
        """
        check_shape("states", states.shape, ("B", "T", self.obs_dim))
        check_range(f"[1, {self.horizon}]", T=states.shape[1])
        tokens = self._tokens(states, returns, (*states.shape[:2], 1))
        following = tokens + self._change(self.model(tokens))
        told = following[..., self.obs_dim :] if self.returns else None
        return following[..., : self.obs_dim], told

    def rollout(self, history: Tensor, returns: Tensor | None = None) -> Tensor:
        """A plan: the history and what follows it, each state made from those before.

        Args:
            history: the last To observations, normalised ``[B, To, O]``.
            returns: return to go of the current state, normalised ``[B, 1]``, exactly if
                ``returns`` is set; earlier states of the history are told the same.

        Returns:
            States ``[B, H, O]``, the first To of which are the history.

        Raises:
            ValueError: a shape does not fit.
        """
        check_shape("history", history.shape, ("B", self.n_obs_steps, self.obs_dim))
        told = None if returns is None else returns.unsqueeze(1).expand(-1, self.n_obs_steps, -1)
        tokens = self._tokens(history, told, (len(history), self.n_obs_steps, 1))
        out, memory = self.model.begin(tokens)
        token = tokens[:, -1] + self._change(out)
        states = [token]
        for position in range(self.n_obs_steps, self.horizon - 1):
            out = self.model.step(token, memory, position)
            token = token + self._change(out)
            states.append(token)
        return torch.cat([history, torch.stack(states, dim=1)[..., : self.obs_dim]], dim=1)

    def _change(self, out: Tensor) -> Tensor:
        change: Tensor = self.outward(F.silu(self.hidden(out)))
        return change * self.free

    def _tokens(self, states: Tensor, returns: Tensor | None, expected: tuple[int, ...]) -> Tensor:
        if (returns is not None) != self.returns:
            fix = "returns" if self.returns else "none"
            raise ValueError(f"this draft was built with returns={self.returns}: pass {fix}")
        if returns is None:
            return states
        check_shape("returns", returns.shape, expected)
        return torch.cat([states, returns], dim=-1)


class _GRU(nn.Module):
    """A stack of gated recurrent units; ``step`` writes its memory (a list of states) in place."""

    def __init__(self, size: int, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.GRU(size, width, depth, batch_first=True)
        self.depth = depth

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.layers(tokens)[0]
        return out

    def begin(self, tokens: Tensor) -> tuple[Tensor, list[Any]]:
        """Outputs of the last token ``[B, W]``, and the memory to go on with."""
        out, state = self.layers(tokens)
        return out[:, -1], list(state.unbind(0))

    def step(self, token: Tensor, memory: list[Any], position: int) -> Tensor:
        del position  # a recurrent model needs no clock
        weights = self.layers.all_weights
        for number in range(self.depth):
            memory[number] = token = torch.gru_cell(token, memory[number], *weights[number])
        return token


class _CausalTransformer(nn.Module):
    """Causal self-attention over positions; its memory is the keys and values so far."""

    def __init__(self, size: int, horizon: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        check_positive(heads=heads)
        if width % heads or width % 2:
            raise ValueError(f"width must be even and a multiple of heads, got {width} and {heads}")
        self.inward = nn.Linear(size, width)
        self.positions = nn.Parameter(0.1 * sinusoidal(torch.arange(horizon), width))
        self.blocks = nn.ModuleList(_CausalBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.norm(self._through(tokens)[0])
        return out

    def begin(self, tokens: Tensor) -> tuple[Tensor, list[Any]]:
        """Outputs of the last token ``[B, W]``, and the memory to go on with."""
        h, memory = self._through(tokens)
        out: Tensor = self.norm(h[:, -1])
        return out, memory

    def _through(self, tokens: Tensor) -> tuple[Tensor, list[Any]]:
        h = self.inward(tokens) + self.positions[: tokens.shape[1]]
        memory: list[Any] = []
        for block in self.blocks:
            h, *known = block(h)
            memory.append(known)
        return h, memory

    def step(self, token: Tensor, memory: list[Any], position: int) -> Tensor:
        h = self.inward(token) + self.positions[position]
        for number, block in enumerate(self.blocks):
            h, memory[number] = block.step(h, *memory[number])  # type: ignore[operator]
        out: Tensor = self.norm(h)
        return out


class _CausalBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_a, self.norm_m = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.expand = nn.Linear(width, 2 * width)
        self.contract = nn.Linear(2 * width, width)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``h [B, T, W]`` after the block, and its keys and values ``[B, heads, T, W / heads]``."""
        qkv = self.qkv(self.norm_a(h)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self._finish(h, mixed.transpose(1, 2).flatten(2)), k, v

    def step(self, h: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """``h [B, W]`` of the next position, and the keys and values with its own."""
        qkv = self.qkv(self.norm_a(h)).unflatten(-1, (3, self.heads, 1, -1))
        q, k, v = qkv.unbind(1)
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        mixed = F.scaled_dot_product_attention(q, keys, values)
        return self._finish(h, mixed.flatten(1)), (keys, values)

    def _finish(self, h: Tensor, mixed: Tensor) -> Tensor:
        h = h + self.project(mixed)
        out: Tensor = h + self.contract(F.silu(self.expand(self.norm_m(h))))
        return out
