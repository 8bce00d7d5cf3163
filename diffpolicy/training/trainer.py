"""The one trainer: every loss of the library is trained here, and every run can be resumed exactly.

Data order, levels and noise are pure functions of ``(seed, step, rank)``, so a run continues bit
for bit from its step number, its tensors and torch's global generator (which dropout uses).
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffpolicy.training.checkpoint import (
    CheckpointError,
    read_bundle,
    read_pointer,
    write_bundle,
    write_pointer,
)
from diffpolicy.training.diagnose import NonFiniteError, explain_non_finite
from diffpolicy.training.distributed import Group
from diffpolicy.training.ema import EMA
from diffpolicy.training.logging import MetricsFile

Evaluate = Callable[[Path, int], Mapping[str, float]]
Export = Callable[[Mapping[str, Tensor]], Mapping[str, Any]]


class Source(Protocol):
    """Examples by index."""

    def __len__(self) -> int:
        """Number of examples."""

    def gather(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch: every value has ``len(indices)`` rows."""


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of a training run.

    Args:
        steps: optimiser steps.
        batch_size: examples per step, over all processes.
        lr: peak learning rate.
        betas: of AdamW.
        weight_decay: of AdamW.
        warmup_steps: linear warm-up.
        lr_schedule: ``cosine`` (to 0 at ``steps``) or ``constant``.
        grad_clip: largest norm of the gradient; ``None``: no limit.
        ema_power: of the weight average (see :class:`EMA`); ``None``: no average.
        ema_max: its largest decay.
        precision: ``fp32``, or ``bf16`` autocast on a GPU.
        compile: ``torch.compile`` the objective.
        seed: of data order, levels and noise.
        log_every: steps between rows of ``metrics.csv``.
        eval_every: steps between evaluations, each with a checkpoint; ``None``: at the end only.
        checkpoint_every: steps between checkpoints; ``None``: with evaluations only.
        keep_last: checkpoints kept beside the best one.
        progress: show a bar with the time left.
    """

    steps: int = 10_000
    batch_size: int = 256
    lr: float = 3e-4
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: float = 1e-6
    warmup_steps: int = 500
    lr_schedule: str = "cosine"
    grad_clip: float | None = 1.0
    ema_power: float | None = 0.75
    ema_max: float = 0.9999
    precision: str = "fp32"
    compile: bool = False
    seed: int = 0
    log_every: int = 100
    eval_every: int | None = None
    checkpoint_every: int | None = None
    keep_last: int = 1
    progress: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("steps", "batch_size", "lr", "log_every", "keep_last"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("eval_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive or null, got {value}")
        if self.lr_schedule not in ("cosine", "constant"):
            raise ValueError(
                f"lr_schedule must be 'cosine' or 'constant', got {self.lr_schedule!r}"
            )
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")

    def lr_at(self, step: int) -> float:
        """Learning rate of optimiser step ``step`` (from 0)."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.lr_schedule == "constant":
            return self.lr * warm
        span = max(1, self.steps - self.warmup_steps)
        fraction = min(1.0, max(0.0, (step - self.warmup_steps) / span))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * fraction))


@dataclass(frozen=True)
class TrainResult:
    """Outcome of a run: steps done, the averaged weights of the objective.

    Whether it was interrupted.
    """

    step: int
    ema: Mapping[str, Tensor]
    interrupted: bool
    best_score: float | None


class Trainer:
    """Trains an objective on a source.

    Args:
        objective: ``forward(batch, generator)`` returns ``loss [B]`` and ``metrics``.
        source: the examples.
        config: settings.
        run_dir: receives ``metrics.csv`` and ``checkpoints/``.
        export: from the averaged state of the objective to the files of a deployable policy, stored
            with every checkpoint under ``policy/``.
        val_source: held-out examples; their loss is logged at every evaluation, with the same noise
            every time.
        evaluate: called with a policy directory and the step; its metrics are logged, and ``score``
            decides the best checkpoint.
        resume: continue the run in ``run_dir``.
        overwrite: replace it.

    Raises:
        ValueError: settings that cannot work, or a run directory in use.
    """

    def __init__(
        self,
        objective: nn.Module,
        source: Source,
        config: TrainerConfig,
        run_dir: str | os.PathLike[str],
        *,
        export: Export | None = None,
        val_source: Source | None = None,
        evaluate: Evaluate | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.config, self.source, self.val_source = config, source, val_source
        self.export, self.evaluate = export, evaluate
        self.run_dir, self.checkpoints = Path(run_dir), Path(run_dir) / "checkpoints"
        self.group = Group()
        if config.batch_size > len(source):
            raise ValueError(
                f"batch_size={config.batch_size} is larger than the {len(source)} training examples; "
                "lower trainer.batch_size or add data"
            )
        if config.batch_size % self.group.size:
            raise ValueError(
                f"batch_size={config.batch_size} must divide over {self.group.size} processes"
            )
        self.objective = objective
        self.device = next(objective.parameters()).device
        if config.precision == "bf16" and self.device.type != "cuda":
            raise ValueError(
                "precision=bf16 is for GPUs (on a CPU without bf16 units it is slower); use fp32"
            )
        self._forward = self.group.wrap(objective, self.device)
        if config.compile:
            self._forward.compile()
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.names = [n for n, p in objective.named_parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        power = config.ema_power
        self.ema = EMA(objective, power=power or 1.0, max_decay=config.ema_max if power else 0.0)
        self.step, self.train_s = 0, 0.0
        self.best_score: float | None = None
        self._stop = False
        self._begin(resume, overwrite)

    def _begin(self, resume: bool, overwrite: bool) -> None:
        exists = self.checkpoints.exists() or (self.run_dir / "metrics.csv").exists()
        if exists and not resume and not overwrite:
            raise ValueError(
                f"{self.run_dir} already holds a run; resume it, overwrite it or choose another"
            )
        if exists and not resume and self.group.first:
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            (self.run_dir / "metrics.csv").unlink(missing_ok=True)
        self.group.barrier()
        if resume and read_pointer(self.checkpoints / "last") is not None:
            self._load()
        self.metrics = (
            MetricsFile(self.run_dir / "metrics.csv", keep_until=self.step)
            if self.group.first
            else None
        )

    # ---------------------------------------------------------------- the loop

    def fit(self) -> TrainResult:
        """Train to the last step, or until interrupted.

        Raises:
            NonFiniteError: a loss or gradient that is not finite, naming where it came from; no
                checkpoint is written from that state.
        """
        previous = self._catch_signals()
        try:
            self._loop()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return TrainResult(self.step, self.ema.state, self._stop, self.best_score)

    def _loop(self) -> None:
        config = self.config
        totals: dict[str, Tensor] = {}
        began, since = time.perf_counter(), self.step
        bar = tqdm(
            total=config.steps,
            initial=self.step,
            desc="train",
            unit="step",
            disable=not (config.progress and self.group.first),
            mininterval=1.0,
        )
        with bar:
            while self.step < config.steps and not self._stop:
                self._train_step(totals)
                bar.update()
                due = self._due(config.eval_every) or self.step == config.steps
                if self._due(config.log_every) or due:
                    row = self._averages(totals, since, time.perf_counter() - began)
                    bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                    self.train_s += time.perf_counter() - began
                    if due:
                        row |= self._evaluate()
                    if self.metrics is not None:
                        self.metrics.append(self.step, row)
                    totals, since, began = {}, self.step, time.perf_counter()
                if due or self._due(config.checkpoint_every) or self._stop:
                    self._save()

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _train_step(self, totals: dict[str, Tensor]) -> None:
        config = self.config
        indices = self._indices(self.step)
        batch = {
            k: v.to(self.device, non_blocking=True) for k, v in self.source.gather(indices).items()
        }
        generator = self._generator(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            out = self._forward(batch, generator)
        loss = out.loss.mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = math.inf if config.grad_clip is None else config.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        if not math.isfinite(norm.item() + loss.item()):
            raise NonFiniteError(explain_non_finite(self.step, batch, indices, out, self.objective))
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step)
        self.optimizer.step()
        self.ema.update(self.objective)
        self.step += 1
        for name, value in {"loss": loss, "grad_norm": norm, **out.metrics}.items():
            totals[name] = totals.get(name, torch.zeros((), device=self.device)) + value.detach()

    def _indices(self, step: int) -> Tensor:
        """Rows of this process at ``step``: a fresh permutation every epoch, drawn from (seed.

        Epoch).
        """
        size, count = self.config.batch_size, len(self.source)
        per_epoch = count // size
        epoch, position = divmod(step, per_epoch)
        if getattr(self, "_epoch", None) != epoch:
            order = torch.Generator().manual_seed(_mix(self.config.seed, epoch, 0x0E))
            self._epoch, self._order = epoch, torch.randperm(count, generator=order)
        whole = self._order[position * size : (position + 1) * size]
        return whole[self.group.rank :: self.group.size]

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(
            _mix(self.config.seed, step, self.group.rank)
        )

    def _averages(
        self, totals: Mapping[str, Tensor], since: int, seconds: float
    ) -> dict[str, float]:
        steps = max(1, self.step - since)
        row = {name: (self.group.mean(value) / steps).item() for name, value in totals.items()}
        row["lr"] = self.config.lr_at(self.step - 1)
        row["samples_per_s"] = steps * self.config.batch_size / seconds
        return row

    # ---------------------------------------------------------------- evaluation

    def _evaluate(self) -> dict[str, float]:
        row: dict[str, float] = {}
        if self.val_source is not None:
            row["val_loss"] = self._validation_loss(self.val_source)
        if self.evaluate is None or self.export is None or not self.group.first:
            return row
        folder = write_bundle(self.run_dir / ".candidate", self.export(self.ema.state))
        try:
            row |= {name: float(value) for name, value in self.evaluate(folder, self.step).items()}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return row

    @torch.no_grad()
    def _validation_loss(self, source: Source) -> float:
        """Loss of the averaged weights on all held-out examples.

        With the same levels and noise every time.
        """
        live = {k: v.clone() for k, v in self.objective.state_dict().items()}
        self.objective.load_state_dict(self.ema.state)
        self.objective.eval()
        total, count = 0.0, 0
        for number, rows in enumerate(
            torch.split(torch.arange(len(source)), self.config.batch_size)
        ):
            batch = {k: v.to(self.device) for k, v in source.gather(rows).items()}
            generator = torch.Generator(self.device).manual_seed(
                _mix(self.config.seed, number, 0x7A1)
            )
            total += self.objective(batch, generator).loss.sum().item()
            count += len(rows)
        self.objective.load_state_dict(live)
        self.objective.train()
        return total / count

    # ---------------------------------------------------------------- checkpoints

    def _save(self) -> None:
        if not self.group.first:
            self.group.barrier()
            return
        name = f"{self.step:07d}"
        score = None if self.metrics is None else self.metrics.last("score", self.step)
        is_best = score is not None and (self.best_score is None or score >= self.best_score)
        self.best_score = score if is_best else self.best_score
        write_bundle(self.checkpoints / name, self._files())
        if is_best:
            write_pointer(self.checkpoints / "best", name)
        write_pointer(self.checkpoints / "last", name)
        self._prune()
        self.group.barrier()

    def _files(self) -> dict[str, Any]:
        moments: dict[str, Tensor] = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            for key, value in self.optimizer.state[parameter].items():
                moments[f"{name}/{key}"] = value
        state = {
            "step": self.step,
            "ema_updates": self.ema.updates,
            "best_score": self.best_score,
            "train_s": self.train_s,
            "config": asdict(self.config),
        }
        files: dict[str, Any] = {
            "training/params.safetensors": self.objective.state_dict(),
            "training/ema.safetensors": self.ema.state,
            "training/optimizer.safetensors": moments,
            "training/rng.safetensors": {"torch": torch.get_rng_state()},
            "training/state.json": state,
        }
        if self.export is not None:
            files |= {
                f"policy/{name}": content for name, content in self.export(self.ema.state).items()
            }
        return files

    def _prune(self) -> None:
        keep = {read_pointer(self.checkpoints / "best"), read_pointer(self.checkpoints / "last")}
        names = sorted(
            p.name for p in self.checkpoints.iterdir() if p.is_dir() and not p.name.startswith(".")
        )
        keep |= set(names[-self.config.keep_last :])
        for name in names:
            if name not in keep:
                shutil.rmtree(self.checkpoints / name)
        for leftover in self.checkpoints.glob(".*.partial.*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _load(self) -> None:
        name = read_pointer(self.checkpoints / "last")
        try:
            files = read_bundle(self.checkpoints / str(name), "training/")
        except CheckpointError as error:
            others = sorted(p.name for p in self.checkpoints.glob("[0-9]*") if p.name != name)
            hint = (
                f"; to go back, write {others[-1]} into {self.checkpoints / 'last'}"
                if others
                else ""
            )
            raise CheckpointError(f"{error}{hint}") from None
        state = files["state.json"]
        self._check_same(state["config"])
        self.objective.load_state_dict(files["params.safetensors"])
        self.ema.load(files["ema.safetensors"], state["ema_updates"])
        for parameter_name, parameter in zip(self.names, self.parameters, strict=True):
            prefix = f"{parameter_name}/"
            moments = {
                k.removeprefix(prefix): v
                for k, v in files["optimizer.safetensors"].items()
                if k.startswith(prefix)
            }
            self.optimizer.state[parameter] = {
                k: v if k == "step" and self.device.type == "cpu" else v.to(self.device)
                for k, v in moments.items()
            }
        torch.set_rng_state(files["rng.safetensors"]["torch"])
        self.step, self.best_score, self.train_s = (
            state["step"],
            state["best_score"],
            state["train_s"],
        )

    def _check_same(self, saved: Mapping[str, Any]) -> None:
        free = {"log_every", "checkpoint_every", "keep_last", "progress", "compile"}
        now = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.config).items()}
        changed = {
            k: (saved.get(k), v) for k, v in now.items() if k not in free and saved.get(k) != v
        }
        if changed:
            what = ", ".join(f"{k} was {a!r}, is {b!r}" for k, (a, b) in changed.items())
            raise ValueError(
                f"{self.run_dir} cannot be resumed exactly with other settings: {what}"
            )

    def _catch_signals(self) -> dict[int, Any]:
        """Finish the step and write a checkpoint on Ctrl-C or SIGTERM (main thread only)."""

        def stop(number: int, frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        try:
            return {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread
            return {}


def _mix(*values: int) -> int:
    """A 63-bit seed that differs whenever any of the values does (splitmix64 steps)."""
    state = 0
    for value in values:
        state = (state + 0x9E3779B97F4A7C15 + value) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
