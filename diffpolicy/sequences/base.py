"""Models whose logits stand on guidance by a reward: how they are made, saved and made plain."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self, Unpack, cast

from torch import Tensor, nn

from diffpolicy.core.masked_denoiser import MaskedDenoiser
from diffpolicy.guidance.residual import ResidualDenoiser
from diffpolicy.guidance.reward import RewardGuidance
from diffpolicy.learn.distill.path import PathDistillation
from diffpolicy.learn.material import SequenceMaterial
from diffpolicy.learn.reference import frozen_copy
from diffpolicy.networks.registry import check_stored_code, construct
from diffpolicy.rollout.env_spec import stored_env_id
from diffpolicy.sequences.oracles import Oracle, Reward
from diffpolicy.sequences.own import FileTask, as_reward, open_oracle
from diffpolicy.sequences.spec import Draws, SequenceSpec
from diffpolicy.sequences.task import open_task, reward_of
from diffpolicy.settings import check_settings, ranged, settings_of
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.trainer import Running

FILE = "base.safetensors"  # beside model.safetensors: the frozen model, and the reward's weights


@dataclass(frozen=True)
class Base:
    """The reward guidance that a model's logits stand on, as plain values.

    Args:
        scale: of the guidance; ``1 / kl_weight`` aims at the optimum of tuning.
        mode: of :class:`~diffpolicy.guidance.RewardGuidance`.
        order: 2 asks for twice the rewards and is closer to the optimum.
        stored: how the reward is made again when a model is loaded: ``{"type": "oracle",
            "network": ...}``, ``{"type": "task", "id": ..., "kwargs": ...}``, ``{"type": "own",
            "oracle": "package.module:Name"}`` (of a task of a file) or ``{"type":
            "package.module:Class", **its arguments}``; ``None``: it cannot be.

    Raises:
        ValueError: a value out of range.
    """

    scale: float = ranged("(0, inf)", 10.0)
    mode: str = "clean"
    order: int = 2
    stored: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    def guidance(self, denoiser: Any, reward: Reward) -> RewardGuidance:
        """The guidance itself, around a frozen denoiser."""
        return RewardGuidance(denoiser, reward, self.scale, mode=self.mode, order=self.order)


class OnBase:
    """What a sequence model does with a base."""

    spec: SequenceSpec
    denoiser: MaskedDenoiser

    def with_base(self, reward: Reward, **settings: Any) -> Self:
        """A copy whose logits stand on its guidance by a reward, to be tuned from there.

        Untuned it is the guided model exactly. It is saved with its reward where that is an
        :class:`~diffpolicy.sequences.oracles.Oracle`, the reward of a task that the setting
        ``stored`` names, or a ``torch.nn.Module`` of a package, whose attribute ``config`` is
        the mapping of its arguments. Any other is given again after loading: :meth:`with_reward`.

        Args:
            reward: ``[B, L, V] -> [B]`` of soft one-hots, with gradient unless ``mode="exact"``.
            **settings: those of :class:`Base`.

        Example:
            >>> guided = model.with_base(oracle, scale=1 / 0.1)  # kl_weight 0.1

        Raises:
            ValueError: settings out of range, or a model that has a base already.
        """
        model: Any = self
        if self.spec.base is not None:
            raise ValueError("this model has a base already: tune it as it is, or make it plain")
        base = settings_of(Base, settings, "base")
        base = replace(base, stored=_named(reward) or base.stored)
        plain = model.copy().denoiser
        denoiser = ResidualDenoiser(plain, base.guidance(frozen_copy(plain), reward))
        spec = replace(self.spec, base=asdict(base))
        return type(self)(spec, denoiser, device=model.device)  # type: ignore[call-arg]

    def with_reward(self, reward: Reward) -> Self:
        """The same model on a base of another reward, or of one that its files could not hold.

        Raises:
            ValueError: it has no base.
        """
        if not isinstance(self.denoiser, ResidualDenoiser):
            raise ValueError("this model has no base: with_base(reward) gives it one")
        denoiser, device = self.denoiser.with_reward(reward), cast("Any", self).device
        return type(self)(self.spec, denoiser, device=device)  # type: ignore[call-arg]

    def distilled(
        self, config: TrainerConfig, run_dir: str | os.PathLike[str], **run: Unpack[Running]
    ) -> Self:
        """A plain network that learns this model's conditionals: no base, no reward any more.

        It begins at the tuned network and learns from this model's own chains
        (:class:`~diffpolicy.learn.distill.path.PathDistillation`). How close it comes is
        measured, not promised: a small network holds a rugged reward badly.

        Args:
            config: of the trainer; ``batch_size`` sequences are drawn for every update.
            run_dir: metrics and checkpoints.
            **run: ``resume`` and ``overwrite`` as of :meth:`SequenceModel.fit`.

        Raises:
            ValueError: ``run_dir`` holds another run.
        """
        teacher: Any = cast("Any", self).copy()
        spec = replace(self.spec, base=None)
        plain = spec.make_denoiser()
        plain.load_state_dict(self.denoiser.state_dict())
        student: Any = type(self)(spec, plain, device=teacher.device)  # type: ignore[call-arg]
        material = SequenceMaterial(_missing, teacher.denoiser, config.batch_size)
        num_steps = None if spec.time_free else spec.length
        objective = PathDistillation(num_steps=num_steps).objective(student.denoiser, material)
        blank = teacher.expand_cond(None, 1)
        source = Draws(max(65_536, config.batch_size), None if blank is None else blank[0].cpu())
        done: Self = student.fit(objective.to(teacher.device), source, config, run_dir, **run)
        return done


def base_files(spec: SequenceSpec, denoiser: MaskedDenoiser) -> dict[str, Any]:
    """What a model's files hold of its base: the frozen model, and a reward that is named."""
    if spec.base is None or not isinstance(denoiser, ResidualDenoiser):
        return {}
    held = denoiser.base.state_dict()
    unnamed = spec.base["stored"] is None
    return {FILE: {k: v for k, v in held.items() if not (unnamed and k.startswith("reward."))}}


def made_denoiser(spec: SequenceSpec, files: Mapping[str, Any]) -> MaskedDenoiser:
    """A denoiser with the weights of a model's files, on its base if it has one.

    Raises:
        ValueError: the reward's class or module is not there.
    """
    denoiser = replace(spec, base=None).make_denoiser()
    denoiser.load_state_dict(files["model.safetensors"])
    if spec.base is None:
        return denoiser
    base = settings_of(Base, spec.base, "base")
    guidance = base.guidance(frozen_copy(denoiser), _made(base.stored))
    guidance.load_state_dict(files[FILE])
    return ResidualDenoiser(denoiser, guidance)


def _named(reward: Reward) -> dict[str, Any] | None:
    """How a reward that is a module, or what a file's task names, is made again; else ``None``."""
    if isinstance(reward, Oracle):
        return {"type": "oracle", "network": reward.config}
    task = getattr(reward, "__self__", None)
    if isinstance(task, FileTask) and isinstance(task.oracle, str):
        return {"type": "own", "oracle": task.oracle}
    kind = type(reward)
    found = getattr(sys.modules.get(kind.__module__), kind.__qualname__, None)
    config: Any = getattr(reward, "config", None)
    here = found is kind and kind.__module__ != "__main__"
    if not (isinstance(reward, nn.Module) and isinstance(config, Mapping) and here):
        return None
    return {"type": f"{kind.__module__}:{kind.__qualname__}", **config}


def _made(config: Mapping[str, Any] | None) -> Reward:
    if config is None:
        return _missing
    if config.get("type") == "task":
        return _Later(lambda: _of_task(str(config["id"]), config.get("kwargs", {})))
    if config.get("type") == "own":
        return _Later(lambda: _of_oracle(str(config["oracle"])))
    made: Any = construct({"oracle": Oracle}, config, "reward", nn.Module)
    return made  # type: ignore[no-any-return]


def _missing(x: Tensor) -> Tensor:
    raise ValueError(
        "the reward that this model stands on is a function, which files cannot hold: give it "
        "again by model = model.with_reward(reward), or save model.distilled(...) in its place"
    )


def _of_task(env_id: str, kwargs: Mapping[str, Any]) -> Reward:
    return reward_of(open_task(stored_env_id(env_id, "the model's base", instead=""), **kwargs))


def _of_oracle(name: str) -> Reward:
    check_stored_code({"type": name}, "the model's base")
    found = as_reward(open_oracle(name, "oracle"), "")  # a module: it takes no letters
    assert found is not None
    return found


class _Later:
    """A reward that is made when it is first asked for."""

    def __init__(self, make: Callable[[], Reward]) -> None:
        self.make = make
        self.reward: Reward | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.reward is None:
            self.reward = self.make()
        return self.reward(x)
