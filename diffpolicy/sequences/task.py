"""Tasks on sequences: what a generator is trained on, and what its sequences are worth.

A task is reached through the id of a one-step Gymnasium environment, ``gymnasium.make(id)
.unwrapped.task``, so that a user's own task needs no entry in this library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import gymnasium
import numpy as np
import numpy.typing as npt
from torch import Tensor

from diffpolicy.networks.base import check_positive
from diffpolicy.settings import check_choice

KINDS = ("table", "measured", "black_box")
_NEEDED = ("name", "alphabet", "length", "kind", "training_data")
_OF_KIND = {"table": ("reward",), "measured": ("measurements",), "black_box": ("reward",)}
MASK_LETTER = "_"

Tokens = npt.NDArray[Any]  # integers [N, L]
Labels = npt.NDArray[np.float32]  # [N]


@runtime_checkable
class SequenceTask(Protocol):
    """A task on sequences of ``length`` tokens out of ``alphabet``: all that one may have.

    Needed are the attributes below and ``training_data()``; ``reward(x)`` unless the kind is
    ``"measured"``, and ``measurements()`` if it is. What else may be there:

    - ``measurements()``: of other kinds; the top of them is what designs are compared with
      (otherwise the training data).
    - ``valid(tokens)``: which sequences may be proposed (otherwise all).
    - ``halves(seed)``: row numbers of two halves of the measurements that share nothing, or
      ``split_pairs(fraction, seed)`` likewise (otherwise halves that share no sequence).
    - ``held_out``: a second reward ``[B, L, V] -> [B]``, which only judges; None: ``reward`` is an
      oracle that may be wrong and there is nothing to judge it by, but for an oracle learned from
      ``measurements()`` if they hold labels (otherwise ``reward`` is the truth and judges itself).
    - ``fixed``: letters that every design has (see :func:`~diffpolicy.sequences.spec.template`).
    - ``lengths``: ``(length, weight)`` pairs, of sequences that differ in length: the last letter
      of the alphabet is then a pad, which fills up to ``length``.
    - ``wild_type``: a sequence as a string; designs are compared with it.

    :class:`~diffpolicy.sequences.own.FileTask` is such a task made of a file.

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


def measured(task: SequenceTask) -> tuple[Tokens, Labels | None]:
    """The measurements of a task ``[N, L]`` with their labels, or else what it is trained on."""
    known: tuple[Tokens, Labels | None]
    known = getattr(task, "measurements", task.training_data)()
    return known


def valid_rows(task: SequenceTask, tokens: Tokens) -> npt.NDArray[np.bool_]:
    """Which of the sequences ``[N, L]`` a task lets be proposed, bool ``[N]``."""
    if not hasattr(task, "valid"):
        return np.ones(len(tokens), dtype=bool)
    return np.asarray(task.valid(tokens), dtype=bool)


def reward_of(task: SequenceTask) -> Callable[[Tensor], Tensor]:
    """The reward ``[B, L, V] -> [B]`` of a task that has one."""
    found: Callable[[Tensor], Tensor] = task.reward  # type: ignore[attr-defined]
    return found


def pad_of(task: SequenceTask) -> int | None:
    """The token that fills up sequences of different lengths; None: all have the same."""
    return len(task.alphabet) - 1 if getattr(task, "lengths", ()) else None


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
    task: Any = getattr(env.unwrapped, "task", None)
    env.close()
    if task is None:
        raise ValueError(f"{env_id!r} is no task on sequences: its environment lacks task")
    return check_task(task, repr(env_id))


def check_task(task: Any, what: str) -> SequenceTask:
    """The task, if it has all that a :class:`SequenceTask` needs.

    Raises:
        ValueError: it lacks something, or what it says cannot be.
    """
    needed = [*_NEEDED, *_OF_KIND.get(getattr(task, "kind", ""), ())]
    missing = [name for name in needed if not hasattr(task, name)]
    if missing:
        raise ValueError(f"{what} is no task on sequences: it lacks {', '.join(missing)}")
    check_alphabet(task.alphabet)
    check_positive(length=task.length)
    check_choice("kind of task", task.kind, KINDS)
    found: SequenceTask = task
    return found


def check_tokens(tokens: Any, alphabet: str, length: int, what: str) -> None:
    """Raise ``ValueError`` unless ``tokens`` (array or tensor) are integers ``[N, L]`` below V."""
    found = tokens.cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    if found.ndim != 2 or found.shape[1] != length or not np.issubdtype(found.dtype, np.integer):
        got = f"{found.dtype} {list(found.shape)}"
        raise ValueError(f"{what} must be integers [N, {length}], got {got}")
    low, high = (int(found.min()), int(found.max())) if found.size else (0, 0)
    if low < 0 or high >= len(alphabet):
        known = f"tokens 0..{len(alphabet) - 1} ({alphabet!r})"
        raise ValueError(f"{what} must hold {known}, got {low}..{high}")


def check_alphabet(alphabet: str) -> None:
    """Raise ``ValueError`` unless there are two or more letters, all different, none the mask's."""
    if len(alphabet) < 2 or len(set(alphabet)) != len(alphabet) or MASK_LETTER in alphabet:
        rule = f"at least two letters, all different and none {MASK_LETTER!r}, the mask's"
        raise ValueError(f"an alphabet needs {rule}; got {alphabet!r}")
