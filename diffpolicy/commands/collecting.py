"""How pairs are collected from rollouts: what `data prefs collect` and `finetune` share."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from diffpolicy.config import ConfigError, build

if TYPE_CHECKING:
    from diffpolicy.rollout.record.branches import Branching, Repeats

KINDS = ("branches", "episodes")
OF_KIND = {
    "branches": ("points", "every", "branches", "lookahead", "common_noise"),
    "episodes": ("repeats",),
}


@dataclass
class Collecting:
    """Options by their names; `diffpolicy data prefs --help` says what they do."""

    kind: str = "branches"
    episodes: int = 50
    seed: int = 50_000
    noise_seed: int | None = None
    repeats: int = 4
    points: int = 4
    every: int | None = None
    branches: int = 6
    lookahead: int = 40
    common_noise: bool = True
    score: str = "return"
    discount: float = 1.0
    after_end: str = "zero"
    pairs: str = "best_worst"
    min_gap: float = 0.0
    span: int | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "") -> Collecting:
        """From plain values, checked.

        Args:
            values: options by name.
            where: before their names in messages; of a configuration's section, not empty.

        Raises:
            ConfigError: an unknown option, a value of a wrong type, or an option of another kind.
        """
        made = build(cls, values, where)
        if made.kind not in KINDS:
            raise ConfigError(f"{where}kind must be one of {list(KINDS)}, got {made.kind!r}")
        if made.episodes < 1 or made.seed < 0:
            raise ConfigError(
                f"{where}episodes must be at least 1 and {where}seed 0 or more, got "
                f"{made.episodes} and {made.seed}"
            )
        for kind, names in OF_KIND.items():
            given = [n for n in names if getattr(made, n) != getattr(cls, n)]
            if given and kind != made.kind:
                raise ConfigError(f"{', '.join(where + n for n in given)}: only for kind={kind}")
        if where and ":" in made.score:
            raise ConfigError(
                f"{where}score must be a name: a configuration imports no code. For a function of "
                "your own run `diffpolicy data prefs collect ... score=MODULE:FUNCTION` and give "
                "preferences=FILE"
            )
        made.settings(0)
        return made

    def settings(self, noise_seed: int) -> Branching | Repeats:
        """How rollouts are made and compared.

        Args:
            noise_seed: of the policy, where the options leave it open.

        Raises:
            ValueError: a value out of its range, or a score that cannot be imported.
        """
        from diffpolicy.rollout.record.branches import Branching, Repeats
        from diffpolicy.rollout.record.pairing import Scoring

        values = {f.name: getattr(self, f.name) for f in fields(Scoring)}
        scoring = Scoring(**{**values, "score": score_function(self.score)})
        seed = noise_seed if self.noise_seed is None else self.noise_seed
        if self.kind == "episodes":
            return Repeats(self.repeats, seed, scoring)
        names = {name: getattr(self, name) for name in OF_KIND["branches"]}
        return Branching(**names, seed=seed, scoring=scoring)


def score_function(text: str) -> Any:
    """A named score, or the function of a module that can be imported.

    Raises:
        ConfigError: no such function.
    """
    module, colon, name = text.partition(":")
    if not colon:
        return text
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"score={text}: {error}; write MODULE:FUNCTION") from error


__all__ = ["Collecting", "score_function"]
