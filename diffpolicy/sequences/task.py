"""Tasks on sequences: what a generator is trained on, and what its sequences are worth.

A task is reached through the id of a one-step Gymnasium environment, ``gymnasium.make(id)
.unwrapped.task``, so that a user's own task needs no entry in this library.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffpolicy.core.masking import one_hot

KINDS = ("table", "measured", "black_box")
MASK_LETTER = "_"

Tokens = npt.NDArray[Any]  # integers [N, L]
Labels = npt.NDArray[np.float32]  # [N]


@runtime_checkable
class SequenceTask(Protocol):
    """A task on sequences of ``length`` tokens out of ``alphabet``.

    Optional beside these: ``halves(seed)``, the row numbers of two disjoint halves of
    ``measurements()`` that share nothing, or ``split_pairs(fraction, seed)`` likewise; and
    ``wild_type``, a sequence as a string.

    Attributes:
        name: for reports.
        alphabet: one letter per token, in the order of tokens, e.g. ``"ACGT"``.
        length: L.
        kind: ``"table"``: ``reward`` is the truth, and differentiable in a soft ``x``;
            ``"measured"``: there are measurements alone, from which oracles are learned;
            ``"black_box"``: ``reward`` is the truth for hard ``x``, without gradient.
    """

    @property
    def name(self) -> str: ...

    @property
    def alphabet(self) -> str: ...

    @property
    def length(self) -> int: ...

    @property
    def kind(self) -> str: ...

    def training_data(self) -> tuple[Tokens, Labels | None]:
        """What a generator is trained on: int8 ``[N, L]``, and labels ``[N]`` if there are any."""

    def measurements(self) -> tuple[Tokens, Labels]:
        """Sequences int8 ``[N, L]`` with their measured activity ``[N]``."""

    def reward(self, x: Tensor) -> Tensor:
        """The reward ``[B]`` of one-hot sequences ``[B, L, V]``."""

    def valid(self, tokens: Tokens) -> npt.NDArray[np.bool_]:
        """Which sequences ``[N, L]`` obey the rules of the task, ``[N]``."""


def open_task(env_id: str, **options: Any) -> SequenceTask:
    """The task of a Gymnasium environment.

    Args:
        env_id: e.g. ``"diffpolicy_envs:diffpolicy/TFBind8-v0"``; the part before the colon is the
            module that registers it.
        options: keyword arguments of the environment.

    Raises:
        ValueError: an unknown id or module, or an environment that has no task on sequences.
    """
    try:
        env = gymnasium.make(env_id, disable_env_checker=True, **options)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        hint = "" if ":" in env_id else "; name the module that registers it, as in module:Name-v0"
        raise ValueError(f"cannot open the task {env_id!r}: {error}{hint}") from error
    task = getattr(env.unwrapped, "task", None)
    env.close()
    if task is None or not isinstance(task, SequenceTask):
        missing = [n for n in _members() if not hasattr(task, n)] if task is not None else ["task"]
        raise ValueError(
            f"{env_id!r} is no task on sequences: its environment lacks {', '.join(missing)} (see "
            "diffpolicy.sequences.SequenceTask)"
        )
    _check_sizes(task)
    return task


def check_task(task: SequenceTask) -> None:
    """Look at everything that a task offers, as a test of one's own.

    Raises:
        ValueError: the first thing that is not as :class:`SequenceTask` says.
    """
    _check_sizes(task)
    tokens, labels = task.training_data()
    check_tokens(tokens, task.alphabet, task.length, "training_data()")
    _check_labels(labels, len(tokens), "training_data()", optional=True)
    few = np.asarray(tokens[:4])
    valid = np.asarray(task.valid(few))
    if valid.dtype != np.bool_ or valid.shape != (len(few),):
        raise ValueError(
            f"{task.name}: valid(tokens) must give bool [{len(few)}], got {valid.dtype} "
            f"{list(valid.shape)}"
        )
    if task.kind == "measured":
        measured, activity = task.measurements()
        check_tokens(measured, task.alphabet, task.length, "measurements()")
        _check_labels(activity, len(measured), "measurements()", optional=False)
    else:
        _check_reward(task, few)


def check_tokens(tokens: Any, alphabet: str, length: int, what: str) -> None:
    """Raise ``ValueError`` unless ``tokens`` (array or tensor) are integers ``[N, L]`` below V."""
    found = tokens.cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    if found.ndim != 2 or found.shape[1] != length or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(
            f"{what} must be integers [N, {length}], got {found.dtype} {list(found.shape)}"
        )
    if found.size and (found.min() < 0 or found.max() >= len(alphabet)):
        raise ValueError(
            f"{what} must hold tokens 0..{len(alphabet) - 1} ({alphabet!r}), got "
            f"{int(found.min())}..{int(found.max())}"
        )


def check_alphabet(alphabet: str) -> None:
    """Raise ``ValueError`` unless there are two or more letters, all different, none the mask's."""
    if len(alphabet) < 2 or len(set(alphabet)) != len(alphabet) or MASK_LETTER in alphabet:
        raise ValueError(
            f"an alphabet needs at least two letters, all different and none {MASK_LETTER!r} "
            f"(which stands for a mask); got {alphabet!r}"
        )


def _members() -> list[str]:
    methods = ["training_data", "measurements", "reward", "valid"]
    return ["name", "alphabet", "length", "kind", *methods]


def _check_sizes(task: SequenceTask) -> None:
    check_alphabet(task.alphabet)
    if not isinstance(task.length, int) or task.length < 1:
        raise ValueError(f"{task.name}: length must be a positive integer, got {task.length!r}")
    if task.kind not in KINDS:
        raise ValueError(f"{task.name}: kind must be one of {KINDS}, got {task.kind!r}")


def _check_labels(labels: Any, count: int, what: str, *, optional: bool) -> None:
    if labels is None and optional:
        return
    found = None if labels is None else np.asarray(labels)
    if found is None or found.shape != (count,) or not np.isfinite(found).all():
        got = (
            "None" if found is None else f"{list(found.shape)}, some of them not finite or missing"
        )
        raise ValueError(f"the labels of {what} must be [{count}] finite numbers, got {got}")


def _check_reward(task: SequenceTask, few: Tokens) -> None:
    vocab_size = len(task.alphabet)
    x = one_hot(torch.from_numpy(few.astype(np.int64)), vocab_size)[..., :vocab_size]
    x.requires_grad_(task.kind == "table")
    reward = task.reward(x)
    if not isinstance(reward, Tensor) or reward.shape != (len(few),):
        got = list(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
        raise ValueError(f"{task.name}: reward(x) must be a tensor [{len(few)}], got {got}")
    if not bool(reward.detach().isfinite().all()):
        raise ValueError(f"{task.name}: reward(x) is not finite on the first training sequences")
    if task.kind == "table" and not reward.requires_grad:
        raise ValueError(
            f"{task.name}: the reward of a table must be differentiable in x; for one without "
            "gradient, set kind='black_box'"
        )


__all__ = ["KINDS", "MASK_LETTER", "SequenceTask", "check_task", "check_tokens", "open_task"]
