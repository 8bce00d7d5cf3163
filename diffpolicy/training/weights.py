"""Weights during training: their average, their loss on held-out examples, and their restoring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffpolicy.training.settings import TrainerConfig, mix_seed
from diffpolicy.training.sources import Source, Weighted

_Place = tuple[Mapping[str, Tensor | None], str]  # a module's parameters or buffers, and a name
_TABLES = ("_parameters", "_buffers", "_modules")


class EMA:
    """Power schedule of Diffusion Policy: ``decay = min(max_decay, 1 - (1 + n)^-power)``.

    ``n = max(0, updates - 1)``, so the first two updates copy.

    Args:
        module: whose parameters (averaged) and buffers (copied) are followed.
        power: 0.75 suits runs of under a million steps; ``None``: the weights as they are.
        max_decay: upper bound of the decay.
    """

    def __init__(
        self, module: nn.Module, *, power: float | None = 0.75, max_decay: float = 0.9999
    ) -> None:
        self.power, self.max_decay, self.updates = power, max_decay, 0
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}
        # Where each tensor lives: making a state_dict at every step would cost more than averaging.
        self._averaged: list[tuple[Tensor, _Place]] = []
        self._copied: list[tuple[Tensor, _Place]] = []
        for prefix, part in module.named_modules(remove_duplicate=False):
            for tensors in (part._parameters, part._buffers):
                for key in tensors:
                    average = self.state.get(f"{prefix}.{key}" if prefix else key)
                    if average is None:  # not persistent
                        continue
                    moves = tensors is part._parameters and average.is_floating_point()
                    (self._averaged if moves else self._copied).append((average, (tensors, key)))

    def decay(self) -> float:
        """The decay of the next update."""
        if self.power is None:
            return 0.0
        n = max(0, self.updates - 1)
        return min(self.max_decay, 1 - float((1 + n) ** -self.power))

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the module's present weights."""
        averages = [average for average, _ in self._averaged]
        live = [_tensor(tensors[key]) for _, (tensors, key) in self._averaged]
        torch._foreach_lerp_(averages, live, 1 - self.decay())
        for kept, (tensors, key) in self._copied:
            kept.copy_(_tensor(tensors[key]))
        self.updates += 1

    def load(self, state: Mapping[str, Tensor], updates: int) -> None:
        """Restore a saved average and its number of updates."""
        for name, value in self.state.items():
            value.copy_(state[name])
        self.updates = updates


def _tensor(value: Tensor | None) -> Tensor:
    assert value is not None  # it had a value when its average began
    return value.detach()


def by_learning_rate(
    parameters: Mapping[str, nn.Parameter], config: TrainerConfig
) -> list[dict[str, Any]]:
    """The weights as an optimiser's groups, each with the ``scale`` of its learning rate.

    Raises:
        ValueError: a scale of the encoder, where none of its weights is trained.
    """
    scale = config.encoder_lr_scale
    groups: dict[float, list[nn.Parameter]] = {1.0: [], scale: []}
    for name, parameter in parameters.items():
        groups[scale if name.startswith("denoiser.encoder.") else 1.0].append(parameter)
    if not groups[scale]:
        raise ValueError(
            f"encoder_lr_scale={scale}, but no weight of an encoder of observations is trained; "
            "leave it out"
        )
    return [{"params": params, "scale": key} for key, params in groups.items()]


def autocast(config: TrainerConfig, device: torch.device) -> torch.autocast:
    """The precision that losses are computed in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def set_training(objective: nn.Module) -> None:
    """Put the modules that learn into training mode; a frozen reference stays as it is."""
    for module in objective.modules():
        if any(p.requires_grad for p in module.parameters()):
            module.training = True


def validation_losses(
    objective: nn.Module, weights: Mapping[str, Tensor], source: Source, config: TrainerConfig
) -> dict[str, float]:
    """``val_loss`` of held-out examples; of weighted parts its mean, and ``val_loss_NAME`` of each.

    Arguments are those of :func:`validation_loss`.
    """
    if not isinstance(source, Weighted):
        return {"val_loss": validation_loss(objective, weights, source, config)}
    found = {
        f"val_loss_{name}": validation_loss(objective, weights, part, config)
        for name, part in source.parts.items()
    }
    mean = sum(p * v for p, v in zip(source.shares, found.values(), strict=True))
    return {"val_loss": mean, **found}


@torch.no_grad()
def validation_loss(
    objective: nn.Module, weights: Mapping[str, Tensor], source: Source, config: TrainerConfig
) -> float:
    """Measure the loss of an objective with other weights on held-out examples, on equal noise.

    Args:
        objective: is left as it was.
        weights: the averaged ones.
        source: held-out examples.
        config: batch size, precision and seed.
    """
    device = next(objective.parameters()).device
    modes = [(m, m.training) for m in objective.modules()]
    live = {k: v.clone() for k, v in objective.state_dict().items()}
    objective.load_state_dict(weights)
    objective.eval()
    total, count = 0.0, 0
    for number, rows in enumerate(torch.split(torch.arange(len(source)), config.batch_size)):
        batch = {k: v.to(device) for k, v in source.gather(rows).items()}
        generator = torch.Generator(device).manual_seed(mix_seed(config.seed, number, 0x7A1))
        with autocast(config, device):
            total += objective(batch, generator).loss.sum().item()
        count += len(rows)
    objective.load_state_dict(live)
    for module, mode in modes:
        module.training = mode
    return total / count


@contextmanager
def unchanged_on_error(*modules: nn.Module) -> Iterator[None]:
    """Undo whatever happened to modules if an exception, an interrupt too, leaves the block.

    Weights, what takes a gradient, training modes and the structure (adapters) are restored, in
    the same tensors and modules.
    """
    kept = [_Kept(part) for module in modules for part in module.modules()]
    try:
        yield
    except BaseException:
        for part in kept:
            part.restore()
        raise


class _Kept:
    """One module without its children, as it is now."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.type, self.training = module, type(module), module.training
        self.tables = {name: dict(getattr(module, name)) for name in _TABLES}
        tensors = [*module._parameters.values(), *module._buffers.values()]
        self.values = [
            (tensor, tensor.detach().clone(), tensor.requires_grad)
            for tensor in tensors
            if tensor is not None
        ]

    @torch.no_grad()
    def restore(self) -> None:
        self.module.__class__, self.module.training = self.type, self.training
        for name, table in self.tables.items():
            now = getattr(self.module, name)
            now.clear()
            now.update(table)
        for tensor, value, requires_grad in self.values:
            tensor.copy_(value)
            tensor.requires_grad_(requires_grad)
            tensor.grad = None
