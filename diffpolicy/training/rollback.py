"""Modules that are as they were if what is done to them does not end well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules")


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
