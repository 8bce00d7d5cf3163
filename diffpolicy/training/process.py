"""The process that a run lives in: its group, signals, generators and checkpoint writer."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from concurrent import futures
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


class Group:
    """The processes of a run, from torchrun's environment (``RANK``, ``WORLD_SIZE``)."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = torch.device("cpu")
        if self.size > 1 and torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            # The first process evaluates while the others wait.
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=4))

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def wrap(self, module: nn.Module, device: torch.device) -> nn.Module:
        """``module``, averaging gradients over the group."""
        if self.size == 1:
            return module
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids)

    def mean(self, value: Tensor) -> Tensor:
        """Mean of a tensor over the group."""
        if self.size > 1:
            dist.all_reduce(value)
            value = value / self.size
        return value

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process of the group."""
        if self.size == 1:
            return flag
        votes = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(votes)
        return bool(votes.item())

    def barrier(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()


class StopRequest:
    """Within the block, the first signal is remembered and the second one interrupts.

    Signals reach the main thread only; in another one nothing is caught.

    Attributes:
        asked: whether there was one.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        with contextlib.suppress(ValueError):  # not the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class GlobalNoise:
    """Seed the global generators of the CPU and of a device, and give them back as they were.

    ``torch.manual_seed`` does the same to every device there is, and formats a stack trace each
    time (0.2 ms).

    Args:
        device: that modules run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generators.append(torch.cuda.default_generators[index])
        self._before: list[Tensor] = []

    def __enter__(self) -> Self:
        self._before = [generator.get_state() for generator in self._generators]
        return self

    def __exit__(self, *error: object) -> None:
        for generator, state in zip(self._generators, self._before, strict=True):
            generator.set_state(state)

    def seed(self, seed: int) -> None:
        """What modules draw from now on is a function of ``seed``."""
        for generator in self._generators:
            generator.manual_seed(seed)


def seeded(seed: int, make: Callable[[], T]) -> T:
    """Return what ``make`` makes with torch's global generator seeded, and give that back.

    Example:
        >>> network = seeded(0, spec.make_network)
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


class BackgroundWriter:
    """One write at a time on a thread of its own; the next one, and the end, wait for it.

    An error of a write is raised by whatever call comes next. Leaving the block waits too, also
    after an exception or an interrupt, so that nothing is cut short.
    """

    def __init__(self) -> None:
        self._pool = futures.ThreadPoolExecutor(1, "checkpoint")
        self._write: futures.Future[None] | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Write when the one before is done."""
        self.wait()
        self._write = self._pool.submit(write)

    def check(self) -> None:
        """Raise the error of a write that failed; waits for nothing."""
        if self._write is not None and self._write.done():
            done, self._write = self._write, None
            done.result()

    def wait(self) -> None:
        """Wait for the write that is under way."""
        if self._write is not None:
            futures.wait([self._write])
        self.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except BaseException as failed:
            if error is None:
                raise
            error.add_note(f"The last checkpoint could not be written either: {failed!r}")


def copied(files: Mapping[str, Any]) -> dict[str, Any]:
    """Return the files of a bundle with copies of its tensors on the host: training may go on."""
    return {
        name: {k: tensor.detach().to("cpu", copy=True) for k, tensor in content.items()}
        if name.endswith(".safetensors")
        else content
        for name, content in files.items()
    }
