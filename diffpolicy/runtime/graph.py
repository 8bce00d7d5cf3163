"""A sampling loop as a module of plain tensors: what runtimes compile and files hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.data.observation import ObsField, each, from_fields, to_fields
from diffpolicy.policies.plan_loop import Encoded, PlanLoop
from diffpolicy.runtime.ports import SEEN, Port, seen_ports
from diffpolicy.runtime.rolled import rolled


class LoopGraph(nn.Module):
    """A loop, or a part of it, that takes its inputs one by one, in the order of its ports.

    Args:
        loop: the loop.
        part: ``"whole"``, from observations to plans; ``"encoder"``, from observations to
            ``cond [n, C]``; ``"rest"``, from ``cond`` to plans: where several plans are made of one
            observation, it is encoded once.
        run: another form of the loop.

    Attributes:
        ports: its inputs.
    """

    def __init__(self, loop: PlanLoop, part: str = "whole", run: nn.Module | None = None) -> None:
        super().__init__()
        self.loop, self.part, self.run = loop, part, loop if run is None else run
        plan, seen = (loop.horizon, loop.action_dim), seen_ports(loop.fields, loop.obs_shape[0])
        rest = [Port("guess", ("batch", *plan)), Port("noise", (loop.draws, "batch", *plan))]
        if part == "rest":
            seen = [Port("cond", ("batch", loop.condition(example_inputs(loop, 1)[0]).shape[1]))]
        self.ports = seen if part == "encoder" else [*seen, *rest]

    def rolled(self) -> LoopGraph:
        """The same with its step repeated where that pays, :mod:`diffpolicy.runtime.rolled`."""
        whole = self.part == "encoder"
        return self if whole else LoopGraph(self.loop, self.part, rolled(self.loop))

    def forward(self, *inputs: Tensor) -> Tensor:
        """Plans ``[n, H, A]``, or ``cond [n, C]``, of what the ports name."""
        named = {port.name: value for port, value in zip(self.ports, inputs, strict=True)}
        told = Encoded(named["cond"]) if self.part == "rest" else from_fields(named, SEEN)
        call, rest = self.run, [named[name] for name in ("guess", "noise") if name in named]
        out: Tensor = call(told, *rest) if rest else self.loop.condition(told)
        return out

    @torch.no_grad()
    def example(self, batch: int, *, seed: int = 0) -> list[Tensor]:
        """Random inputs in the order of the ports."""
        history, *rest = example_inputs(self.loop, batch, seed=seed)
        if self.part == "rest":
            return [self.loop.condition(history), *rest]
        return [*to_fields(history).values(), *(rest if self.part == "whole" else ())]


def example_inputs(loop: PlanLoop, batch: int, *, seed: int = 0) -> tuple[Any, Tensor, Tensor]:
    """Random inputs on the loop's device: observations like the training data, a guess and noise.

    Args:
        loop: the loop.
        batch: n.
        seed: same seed, same inputs.

    Returns:
        ``history [n, To, ...]`` raw, ``guess [n, H, A]`` in [-1, 1], ``noise [R, n, H, A]``.
    """
    generator, steps = torch.Generator().manual_seed(seed), loop.obs_shape[0]
    plan = (loop.horizon, loop.action_dim)

    def seen(field: ObsField) -> Tensor:
        shape = (batch, steps, *field.shape)
        if field.is_image:
            return torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        # Normalised data lie about [-1, 1]; raw ones of arbitrary scale would saturate the network.
        return torch.randn(shape, generator=generator)

    observed = each(lambda field: seen(field).to(loop.device), loop.fields)
    guess = 2 * torch.rand(batch, *plan, generator=generator) - 1
    noise = torch.randn(loop.draws, batch, *plan, generator=generator)
    history = loop.normalizer.unnormalize_obs(observed)
    return history, guess.to(loop.device), noise.to(loop.device)
