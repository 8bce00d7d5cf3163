"""The one trainer: every loss of the library is trained here, and every run can be resumed exactly.

Data order, levels and noise are pure functions of ``(seed, step, rank)``, so a run continues bit
for bit from its step number, its tensors and torch's global generator (which dropout uses).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffpolicy.files import remove_leftovers, remove_owned
from diffpolicy.locks import WriterLock
from diffpolicy.settings import check_shape
from diffpolicy.training.checkpoint import Snapshots, write_bundle
from diffpolicy.training.diagnose import NO_GRADIENT, Movement, NonFiniteError, explain_non_finite
from diffpolicy.training.identity import check_same_run, describe, flatten, machine
from diffpolicy.training.process import (
    BackgroundWriter,
    GlobalNoise,
    Group,
    StopRequest,
    copied,
)
from diffpolicy.training.run_files import (
    MetricsFile,
    TensorBoard,
    check_resumable,
    clear_run,
    has_run,
    summary_writer,
)
from diffpolicy.training.settings import TrainerConfig, mix_seed
from diffpolicy.training.sources import Source
from diffpolicy.training.weights import (
    EMA,
    autocast,
    by_learning_rate,
    set_training,
    validation_losses,
)

Evaluate = Callable[[Path, int], Mapping[str, float]]
Export = Callable[[Mapping[str, Tensor]], Mapping[str, Any]]


class Running(TypedDict, total=False):
    """What callers of a ``fit`` may choose of a run; see :class:`Trainer`."""

    val_source: Source | None
    evaluate: Evaluate | None
    resume: bool
    overwrite: bool


@dataclass(frozen=True)
class TrainResult:
    """Outcome of a run: steps done, the averaged weights, whether it was interrupted."""

    step: int
    ema: Mapping[str, Tensor]
    interrupted: bool
    best_score: float | None
    train_s: float


class Trainer:
    """Train an objective on a source.

    Args:
        objective: ``forward(batch, generator)`` returns ``loss [B]`` and ``metrics``; if it has a
            method ``after_step()``, that is called after every optimiser step.
        source: the examples.
        config: settings.
        run_dir: receives ``metrics.csv`` and ``checkpoints/``.
        export: from the averaged state of the objective to the files of a deployable policy, stored
            with every checkpoint under ``policy/``.
        val_source: held-out examples; their loss is logged at every evaluation, with the same noise
            every time.
        evaluate: called with a policy directory and the step; its metrics are logged, and ``score``
            decides the best checkpoint; ``stop``, if it is not 0, ends the training there.
        identity: what else the result depends on, beside objective, source and settings, by name:
            the policy's spec, its normaliser.
        resume: continue the run in ``run_dir``. It must be the same run: only more steps and
            another learning rate are possible, and a warning says so.
        overwrite: replace it.

    Raises:
        ValueError: settings that cannot work, a run directory in use, or a run that was another.
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
        identity: Mapping[str, Any] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self.config, self.source, self.val_source = config, source, val_source
        self.objective, self.export, self.evaluate = objective, export, evaluate
        self.run_dir = Path(run_dir)
        self.snapshots = Snapshots(self.run_dir / "checkpoints", config.keep_last)
        self.group = Group()
        self.device = next(objective.parameters()).device
        self._check_settings()
        set_training(objective)
        about = {**(identity or {}), "objective": objective, "source": source}
        self.identity = flatten(describe(about, trained=objective))
        self._forward = self.group.wrap(objective, self.device)
        if config.compile:
            self._forward.compile()
        self.parameters = {n: p for n, p in objective.named_parameters() if p.requires_grad}
        groups = by_learning_rate(self.parameters, config)
        self.optimizer = torch.optim.AdamW(
            groups, config.lr, config.betas, weight_decay=config.weight_decay, fused=True
        )
        self.ema = EMA(objective, power=config.ema_power, max_decay=config.ema_max)
        self.step, self.train_s = 0, 0.0
        self.best_score: float | None = None
        self.logs: list[MetricsFile | TensorBoard] = []
        self._totals: dict[str, Tensor] = {}
        self._since = 0
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)
        self._stop, self._noise = StopRequest(), GlobalNoise(self.device)
        self._movement, self._writer = Movement(), BackgroundWriter()
        self._begin(resume, overwrite)

    def _check_settings(self) -> None:
        """Refuse settings that do not fit the source, the processes or the device."""
        size, parts = self.config.batch_size, self.group.size * self.config.accumulate
        if size > len(self.source):
            given = f"batch_size={size} is more than the {len(self.source)} examples"
            raise ValueError(f"{given}; make it smaller (trainer.batch_size=N), or give more data")
        if size % parts:
            raise ValueError(
                f"batch_size={size} must divide over {self.group.size} processes and "
                f"accumulate={self.config.accumulate} parts"
            )
        if self.config.tensorboard:
            summary_writer()

    def _begin(self, resume: bool, overwrite: bool) -> None:
        """Take the run's directory; all that can fail is checked before anything is removed."""
        self._lock = WriterLock(self.run_dir, "training")
        if self.group.first:
            self._lock.acquire()
        try:
            self._take(resume, overwrite)
        except BaseException:
            self._lock.release()
            raise

    def _take(self, resume: bool, overwrite: bool) -> None:
        exists = has_run(self.run_dir)
        if exists and not resume and not overwrite:
            raise ValueError(
                f"{self.run_dir} already holds a run; resume it, overwrite it or choose another"
            )
        if resume:
            every = (self.config.checkpoint_every, self.config.eval_every, self.config.steps)
            check_resumable(self.run_dir, min(n for n in every if n is not None))
        elif exists and self.group.first:
            clear_run(self.run_dir)
        self.group.barrier()
        if resume and self.snapshots.exist:
            self._load()
        if self.group.first:
            remove_leftovers(self.run_dir)
            self.logs.append(MetricsFile(self.run_dir / "metrics.csv", keep_until=self.step))
            if self.config.tensorboard:
                self.logs.append(TensorBoard(self.run_dir / "tb", self.step))

    # ---------------------------------------------------------------- the loop

    def fit(self) -> TrainResult:
        """Train to the last step, or until interrupted.

        Raises:
            NonFiniteError: a loss or gradient that is not finite, naming where it came from; no
                checkpoint is written from that state.
        """
        try:
            with self._stop, self._noise, self._writer:
                self._loop()
        finally:
            self._lock.release()
        stopped = self._stop.asked
        return TrainResult(self.step, self.ema.state, stopped, self.best_score, self.train_s)

    def _loop(self) -> None:
        config = self.config
        began = time.perf_counter()
        shown = config.progress and self.group.first
        look = {"desc": "train", "unit": "step", "mininterval": 1.0, "disable": not shown}
        with tqdm(total=config.steps, initial=self.step, **look) as bar:
            ended = False
            while self.step < config.steps and not self.group.any(self._stop.asked or ended):
                self._writer.check()
                self._train_step()
                bar.update()
                row: dict[str, float] = {}
                due = self._due(config.eval_every) or self.step == config.steps
                if self._due(config.log_every) or due:
                    seconds = time.perf_counter() - began
                    row = self._averages(seconds)
                    bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                    self.train_s += seconds
                    try:
                        row |= self._evaluate() if due else {}
                    except BaseException:  # a broken simulator must not take the weights with it
                        self._log(row)
                        self._save(alone=True)
                        raise
                    ended = bool(row.pop("stop", 0))
                    self._log(row)
                    began = time.perf_counter()
                if due or self._due(config.checkpoint_every):
                    self._save(row.get("score"))
            if self._stop.asked:
                self._save()

    def _log(self, row: Mapping[str, float]) -> None:
        for log in self.logs:
            log.append(self.step, row)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _train_step(self) -> None:
        config = self.config
        indices = self._indices(self.step)
        batch = {
            k: v.to(self.device, non_blocking=True) for k, v in self.source.gather(indices).items()
        }
        seed = mix_seed(config.seed, self.step, self.group.rank)
        generator = torch.Generator(self.device).manual_seed(seed)
        # Dropout draws from the global generator; reseeding makes it, too, a function of the step.
        self._noise.seed(mix_seed(config.seed, self.step, self.group.rank, 0xD0))
        self.optimizer.zero_grad(set_to_none=True)
        outs = [self._backward(part, generator) for part in _parts(batch, config.accumulate)]
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        losses = torch.cat([out.loss.detach() for out in outs])
        inputs = [v.sum() for v in batch.values() if v.is_floating_point()]
        if not math.isfinite(torch.stack([losses.mean(), norm, *inputs]).sum().item()):
            where = explain_non_finite(self.step, batch, indices, losses, self.objective)
            raise NonFiniteError(where)
        self._movement.check(self.step, norm)
        if config.grad_clip is not None:
            parameters = list(self.parameters.values())
            nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr_at(self.step) * group["scale"]
        self.optimizer.step()
        after: Callable[[], None] | None = getattr(self.objective, "after_step", None)
        if after is not None:  # target networks follow; they are part of the objective's state
            after()
        self.ema.update()
        self.step += 1
        self._count({"loss": losses.mean(), "grad_norm": norm})
        for out in outs:
            self._count({k: v.detach() / len(outs) for k, v in out.metrics.items()})

    def _backward(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> Any:
        """Add the gradient of one part of a batch."""
        with autocast(self.config, self.device):
            out = self._forward(batch, generator)
        check_shape("loss (one per example)", out.loss.shape, [len(next(iter(batch.values())))])
        if not out.loss.requires_grad:
            raise ValueError(NO_GRADIENT)
        (out.loss.mean() / self.config.accumulate).backward()
        return out

    def _count(self, values: Mapping[str, Tensor]) -> None:
        """Add to what the next row of metrics averages."""
        for name, value in values.items():
            self._totals[name] = self._totals.get(name, 0) + value.detach()

    def _indices(self, step: int) -> Tensor:
        """Rows of this process at ``step``; (seed, step) alone determine them."""
        size, count = self.config.batch_size, len(self.source)
        draw = getattr(self.source, "draw", None)
        if draw is not None:
            drawn: Tensor = draw(step, size, self.config.seed)
            return drawn[self.group.rank :: self.group.size]
        per_epoch = count // size
        epoch, position = divmod(step, per_epoch)
        if self._epoch != epoch:
            order = torch.Generator().manual_seed(mix_seed(self.config.seed, epoch, 0x0E))
            self._epoch, self._order = epoch, torch.randperm(count, generator=order)
        whole = self._order[position * size : (position + 1) * size]
        return whole[self.group.rank :: self.group.size]

    def _averages(self, seconds: float) -> dict[str, float]:
        """Means since the last row, which starts the next."""
        steps = self.step - self._since
        row = {name: (self.group.mean(v) / steps).item() for name, v in self._totals.items()}
        row["lr"] = self.config.lr_at(self.step - 1)
        row["samples_per_s"] = steps * self.config.batch_size / seconds
        self._totals, self._since = {}, self.step
        return row

    # ---------------------------------------------------------------- evaluation

    def _evaluate(self) -> dict[str, float]:
        row: dict[str, float] = {}
        if self.val_source is not None:
            row |= validation_losses(self.objective, self.ema.state, self.val_source, self.config)
        if self.evaluate is None or self.export is None or not self.group.first:
            return row
        folder = write_bundle(self.run_dir / ".candidate", self.export(self.ema.state))
        try:
            row |= {name: float(value) for name, value in self.evaluate(folder, self.step).items()}
        finally:
            remove_owned(folder)
        return row

    # ---------------------------------------------------------------- checkpoints

    def _save(self, score: float | None = None, *, alone: bool = False) -> None:
        best = -math.inf if self.best_score is None else self.best_score
        is_best = score is not None and math.isfinite(score) and score >= best
        self.best_score = score if is_best else self.best_score
        if self.group.first:
            policy = {} if self.export is None else self.export(self.ema.state)
            files = self.step, copied(self._state()), copied(policy)
            began = self.snapshots.exist
            self._writer.start(lambda: self.snapshots.save(*files, is_best=is_best))
            if not began:  # rows of metrics without any checkpoint would look like a lost one
                self._writer.wait()
        if not alone:
            self.group.barrier()

    def _state(self) -> dict[str, Any]:
        """Everything a resumed run needs to be the same run."""
        moments = {
            f"{name}/{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[parameter].items()
        }
        return {
            "params.safetensors": self.objective.state_dict(),
            "ema.safetensors": self.ema.state,
            "optimizer.safetensors": moments,
            "totals.safetensors": self._totals,
            "state.json": self._progress(),
        }

    def _progress(self) -> dict[str, Any]:
        """How far the run is, and which run it is."""
        return {
            "step": self.step,
            "since": self._since,
            "ema_updates": self.ema.updates,
            "best_score": self.best_score,
            "train_s": self.train_s,
            "examples": len(self.source),
            "processes": self.group.size,
            "config": asdict(self.config),
            "identity": self.identity,
            "machine": machine(self.device),
        }

    def _load(self) -> None:
        files = self.snapshots.load_last()
        state = files["state.json"]
        check_same_run(state, self._progress(), self.run_dir)
        self.objective.load_state_dict(files["params.safetensors"])
        self.ema.load(files["ema.safetensors"], state["ema_updates"])
        for key, value in files["optimizer.safetensors"].items():
            name, _, kind = key.rpartition("/")
            like = self.parameters[name]
            if value.shape == like.shape:  # in its memory order, which a fused step relies on
                value = torch.empty_like(like, dtype=value.dtype).copy_(value)
            self.optimizer.state[like][kind] = value.to(self.device)
        self._totals = {k: v.to(self.device) for k, v in files["totals.safetensors"].items()}
        self.step, self._since = state["step"], state["since"]
        self.best_score, self.train_s = state["best_score"], state["train_s"]


def _parts(batch: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """A batch cut into ``count`` equal ones."""
    pieces = {name: value.chunk(count) for name, value in batch.items()}
    return [{name: piece[i] for name, piece in pieces.items()} for i in range(count)]
