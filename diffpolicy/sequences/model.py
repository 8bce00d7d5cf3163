"""The facade of masked sequence models: learn, draw, edit, score, save and load."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, Self, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from diffpolicy.core.denoiser import BaseDenoiser
from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.core.masking import one_hot
from diffpolicy.core.reveal import Scheduled, blank_start, reveals
from diffpolicy.core.sampling import Trajectory, sample
from diffpolicy.core.starts import truncated_start
from diffpolicy.guidance.cfg import ClassifierFreeGuidance
from diffpolicy.learn.cloning.masked import MaskedDenoisingLoss, elbo
from diffpolicy.networks.base import described
from diffpolicy.sequences.base import OnBase, base_files, made_denoiser
from diffpolicy.sequences.spec import (
    ROWS,
    Chain,
    Drawing,
    Letters,
    SequenceExamples,
    SequenceSpec,
    at_most,
    tokens_of,
)
from diffpolicy.sequences.task import SequenceTask, check_tokens
from diffpolicy.settings import check_range, settings_of
from diffpolicy.training.process import seeded
from diffpolicy.training.saved import Device, Saved, part_of
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.sources import Source
from diffpolicy.training.train import train
from diffpolicy.training.trainer import Running, TrainResult


class SequenceModel(Letters, OnBase, Saved):
    """A masked diffusion model of sequences (MDLM, Sahoo et al. 2024).

    Example:
        >>> task = open_task("diffpolicy_envs:diffpolicy/TFBind8-v0")
        >>> pretrained = SequenceModel.for_task(task, spec={"network": {"type": "mlp"}})
        >>> pretrained.learn(task.training_data()[0], TrainerConfig(steps=4000), "runs/tfbind8")
        >>> pretrained.decode(pretrained.draw(4))

    Args:
        spec: sizes and settings.
        denoiser: with weights; ``None``: freshly initialised.
        device: where the weights go.
    """

    FORMAT, WHAT = "diffpolicy-sequences", "sequence model"
    last_training: TrainResult | None = None

    def __init__(
        self, spec: SequenceSpec, denoiser: MaskedDenoiser | None = None, *, device: Device = "cpu"
    ) -> None:
        self.spec = spec
        self.denoiser = (spec.make_denoiser() if denoiser is None else denoiser).to(device).eval()

    def __repr__(self) -> str:
        types = f"{self.spec.network.get('type')}, {self.spec.process.get('type')}"
        what = f"{self.spec.length} of {self.spec.alphabet!r}, {types}"
        return described(self, what, self.denoiser)

    @classmethod
    def for_task(
        cls,
        task: SequenceTask,
        *,
        spec: Mapping[str, Any] | None = None,
        seed: int = 0,
        device: Device = "cpu",
    ) -> Self:
        """An untrained model of a task's alphabet and length.

        Args:
            task: says the two.
            spec: further entries of :class:`SequenceSpec`.
            seed: of the initial weights.
            device: where the weights live.

        Raises:
            ValueError: settings that do not fit together.
        """
        sizes: dict[str, Any] = {"alphabet": task.alphabet, "length": task.length}
        lengths = getattr(task, "lengths", ())
        if lengths:
            sizes["lengths"] = lengths
        given = sorted(set(sizes) & set(spec or {}))
        if given:
            raise ValueError(f"the task says {', '.join(given)}: leave out of spec")
        full = settings_of(SequenceSpec, {**(spec or {}), **sizes}, cls.WHAT)
        return cls(full, seeded(seed, full.make_denoiser), device=device)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return next(self.denoiser.parameters(), torch.zeros(())).device

    def pinned(self, fixed: Mapping[int, str] | str) -> Self:
        """The same model with letters that every draw, edit and tuning of it holds.

        Exact conditioning: what is fixed is revealed before anything else, and never changes. The
        weights are shared; ``pinned({})`` takes the fixed letters away.

        Args:
            fixed: letters by their position from 0, negative from the end, a ``.`` for a free one;
                or one text of all L positions.

        Example:
            >>> model.pinned({0: "GGATCC", 30: "TATAAT"}).draw(16)

        Raises:
            ValueError: letters outside the alphabet, or positions outside the sequence.
        """
        spec = self.spec.pinned(fixed)
        denoiser = copy.copy(self.denoiser)
        denoiser.process = spec.make_process()
        return type(self)(spec, denoiser, device=self.device)

    def copy(self) -> Self:
        """The same model with weights of its own, e.g. to be tuned beside its reference."""
        return type(self)(self.spec, copy.deepcopy(self.denoiser), device=self.device)

    # ---------------------------------------------------------------- learning

    def learn(
        self,
        tokens: Any,
        config: TrainerConfig,
        run_dir: str | os.PathLike[str],
        *,
        labels: Any = None,
        cond: Tensor | None = None,
        val_fraction: float = 0.02,
        **run: Unpack[Running],
    ) -> Self:
        """Train on sequences by masked cross-entropy; ends with the averaged (EMA) weights.

        Args:
            tokens: integers ``[N, L]``, array or tensor.
            config: steps, batch size (at most the number of sequences), learning rate, ...
            run_dir: where metrics and checkpoints go.
            labels: ``[N]``, from which ``spec.label_quantiles`` make the condition.
            cond: the condition ``[N, C]`` itself.
            val_fraction: fraction of the sequences held out for the validation loss.
            **run: ``evaluate``, ``resume`` and ``overwrite`` as of :meth:`fit`.

        Returns:
            self; ``last_training`` tells the steps done, seconds, and whether it was interrupted.

        Raises:
            ValueError: sequences or conditions that do not fit the model.
        """
        check_tokens(tokens, self.spec.alphabet, self.spec.length, "tokens")
        check_range("[0, 1)", val_fraction=val_fraction)
        held = torch.as_tensor(np.asarray(tokens), dtype=torch.int16)
        given = self.spec.training_cond(len(held), labels, cond)
        order = torch.randperm(len(held), generator=torch.Generator().manual_seed(config.seed))
        val_count = int(val_fraction * len(held))
        held_out, training = (
            SequenceExamples(held[rows], None if given is None else given[rows])
            for rows in (order[:val_count], order[val_count:])
        )
        objective = MaskedDenoisingLoss(self.denoiser, cond_dropout=self.spec.cond_dropout)
        run["val_source"] = held_out if val_count else None
        return self.fit(objective, training, at_most(config, training), run_dir, **run)

    def fit(
        self,
        objective: nn.Module,
        source: Source,
        config: TrainerConfig,
        run_dir: str | os.PathLike[str],
        **run: Unpack[Running],
    ) -> Self:
        """Train with any objective that holds this model's denoiser as ``objective.denoiser``.

        Reward tuning, for instance; the model ends with the averaged (EMA) weights.

        Args:
            objective: ``forward(batch, generator) -> LossOutput``.
            source: examples for it; :class:`Draws` for objectives that draw their own.
            config: settings of the trainer.
            run_dir: where metrics and checkpoints go.
            **run: ``val_source``, ``evaluate``, ``resume`` and ``overwrite`` of
                :class:`~diffpolicy.training.trainer.Trainer`.

        Raises:
            ValueError: an objective that trains another denoiser.
        """
        if getattr(objective, "denoiser", None) is not self.denoiser:
            name = type(objective).__name__
            raise ValueError(f"{name} must train this model's own denoiser, model.denoiser")
        own: dict[str, Any] = {"export": lambda state: self._files(part_of(state, "denoiser"))}
        own["identity"] = {"model": self.spec}
        self.last_training = train(objective, source, config, run_dir, **own, **run)
        return self

    # ---------------------------------------------------------------- drawing and scoring

    @torch.no_grad()
    def draw(self, size: int, **how: Unpack[Drawing]) -> Tensor:
        """Draw sequences from the model's law.

        Args:
            size: how many.
            **how: ``num_steps``, ``cond``, ``generator`` and ``guidance``, see
                :class:`~diffpolicy.sequences.spec.Drawing`.

        Returns:
            Tokens int64 ``[size, L]``.

        Raises:
            ValueError: a size below 1, or settings that the model was not trained for.
        """
        check_range("[1, inf)", size=size)
        return tokens_of(self.chains(self.masked(size), **how))

    @torch.no_grad()
    def edit(self, tokens: Tensor, t_start: float, **how: Unpack[Drawing]) -> Tensor:
        """Draw part of the positions of given sequences anew (a truncated start).

        Args:
            tokens: ``[N, L]``.
            t_start: level in (0, 1] that they are noised to: each position is masked with
                probability ``m(t_start)``.
            **how: as of :meth:`draw`; ``num_steps`` are those from ``t_start``.

        Raises:
            ValueError: as :meth:`draw`; tokens of another size; a level outside (0, 1].
        """
        given = self._checked(tokens)
        check_range("[1, inf)", sequences=len(given))
        check_range("(0, 1]", t_start=t_start)
        return tokens_of(self.chains(given, t_start=t_start, **how))

    def _checked(self, tokens: Any) -> Tensor:
        """Tokens as int64 ``[N, L]`` on the model's device."""
        check_tokens(tokens, self.spec.alphabet, self.spec.length, "tokens")
        return torch.as_tensor(tokens).to(self.device).long()

    def masked(self, size: int) -> Tensor:
        """Make tokens ``[size, L]`` that are all masks."""
        return torch.full((size, self.spec.length), self.spec.vocab_size, device=self.device)

    def chains(
        self,
        tokens: Tensor,
        *,
        t_start: float | None = None,
        denoiser: BaseDenoiser | None = None,
        rows: int = ROWS,
        record: bool = False,
        **how: Unpack[Drawing],
    ) -> Iterator[Chain]:
        """Reveal the masks of sequences by hard draws, some rows at a time.

        Rows of a ``time_free`` model advance on their own, in at most ``min(num_steps, L)``
        evaluations.

        Args:
            tokens: int64 ``[N, L]``.
            t_start: level that they are noised to; ``None``: they are all masks.
            denoiser: what reveals them, in place of this model's own, guided or not.
            rows: how many at a time.
            record: keep the transitions.
            **how: as of :meth:`draw`.
        """
        guidance, generator = how.get("guidance"), how.get("generator")
        denoiser = self.guided(guidance) if denoiser is None else denoiser
        given = self.expand_cond(how.get("cond"), len(tokens), guided=guidance is not None)
        process = self.denoiser.process
        for part in torch.split(torch.arange(len(tokens), device=self.device), rows):
            x = one_hot(tokens[part], self.spec.vocab_size)
            if t_start is None:
                start = blank_start(process, x, generator)
            else:
                noise = process.draw_noise(x.shape, generator, x)
                start = truncated_start(process, x, t_start, noise)
            order: dict[str, Any] = {"time_free": self.spec.time_free, "generator": generator}
            groups, grid = reveals(process, start, how.get("num_steps"), **order)
            noise_of: dict[str, Any] = {"generator": generator, "record": record}
            own = None if given is None else given[part]
            out = sample(denoiser, Scheduled(groups), start, grid, cond=own, **noise_of)
            found = (out.x0, out.transitions) if isinstance(out, Trajectory) else (out, ())
            yield Chain(found[0], groups, found[1])

    def guided(self, guidance: float | None) -> BaseDenoiser:
        """The denoiser, or classifier-free guidance around it.

        Raises:
            ValueError: guidance of a model that was not trained for it.
        """
        if guidance is None:
            return self.denoiser
        if not (self.spec.cond_dropout and self.spec.cond_dim):
            needs = "a model trained with cond_dropout > 0 and a condition"
            raise ValueError(f"guidance={guidance} needs {needs}; this one was trained without")
        return ClassifierFreeGuidance(self.denoiser, guidance)

    def expand_cond(
        self, cond: Tensor | None, count: int, *, guided: bool = False
    ) -> Tensor | None:
        """The condition of ``count`` rows ``[count, C]``; zeros stand for none.

        Raises:
            ValueError: a condition of another size, or none where one is needed.
        """
        size = self.spec.cond_dim
        if cond is None:
            if not size:
                return None
            if guided or not self.spec.cond_dropout:
                why = "guidance" if guided else "this model"
                raise ValueError(f"{why} needs cond [C={size}], e.g. class_cond({size - 1})")
            return torch.zeros(count, size, device=self.device)
        if not size or cond.shape[-1] != size or cond.dim() > 2:
            raise ValueError(f"cond must be [{size}] or [{count}, {size}], got {list(cond.shape)}")
        return cond.to(self.device, torch.float32).expand(count, size)

    def class_cond(self, index: int) -> Tensor:
        """The condition ``[C]`` of a class of ``label_quantiles``, 0 the lowest."""
        size = self.spec.cond_dim
        check_range(f"[0, {size})", class_index=index)
        return torch.eye(size, device=self.device)[index]

    @torch.no_grad()
    def log_likelihood(
        self,
        tokens: Tensor,
        *,
        draws: int = 16,
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """An unbiased estimate of a lower bound of the log-likelihood, in nats, ``[N]``.

        Args:
            tokens: ``[N, L]``.
            draws: sets of masks per sequence.
            cond: ``[C]`` or ``[N, C]``.
            generator: of the masks, on the model's device; ``None``: one seeded with 0, so that
                two models are scored under the same masks.

        Raises:
            ValueError: tokens or condition of another size.
        """
        given = self._checked(tokens)
        conds = self.expand_cond(cond, len(given))
        if generator is None:
            generator = torch.Generator(self.device).manual_seed(0)
        parts = [torch.zeros(0, device=self.device)]
        for rows in torch.split(torch.arange(len(given), device=self.device), ROWS):
            known = None if conds is None else conds[rows]
            parts.append(elbo(self.denoiser, given[rows], generator, draws=draws, cond=known))
        return torch.cat(parts)

    def _files(self, weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
        return {
            "config.json": self._config(**asdict(self.spec)),
            "model.safetensors": dict(weights or self.denoiser.state_dict()),
            **base_files(self.spec, self.denoiser),
        }

    @classmethod
    def _made_of(cls, config: dict[str, Any], files: Mapping[str, Any], device: Device) -> Self:
        spec = settings_of(SequenceSpec, config, cls.WHAT)
        return cls(spec, made_denoiser(spec, files), device=device)
