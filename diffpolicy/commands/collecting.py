"""How pairs are collected from rollouts: what `data prefs collect`, `tune` and `prefer` share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from diffpolicy.settings import ConfigError, check_choice, check_range, load_named
from diffpolicy.settings import from_values as build

if TYPE_CHECKING:
    from diffpolicy.rollout.record.branches import Branching, Repeats

KINDS = ("branches", "episodes")


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
        """Make it from plain values, checked.

        Args:
            values: options by name.
            where: before their names in messages; of a configuration's section, not empty.

        Raises:
            ConfigError: an unknown option, or a value of a wrong type.
            ValueError: a value out of its range.
        """
        made = build(cls, values, where)
        check_choice(f"{where}kind", made.kind, KINDS)
        check_range("[1, inf)", **{f"{where}episodes": made.episodes})
        check_range("[0, inf)", **{f"{where}seed": made.seed})
        if where and ":" in made.score:
            raise ConfigError(
                f"{where}score must be a name: a configuration imports no code. For a function of "
                "your own run `diffpolicy data prefs collect ... score=MODULE:FUNCTION` and give "
                "preferences=FILE"
            )
        made.settings(0)
        return made

    def settings(self, noise_seed: int) -> Branching | Repeats:
        """Return how rollouts are made and compared.

        Args:
            noise_seed: of the policy, where the options leave it open.

        Raises:
            ValueError: a value out of its range, or a score that cannot be imported.
        """
        from diffpolicy.rollout.record.branches import Branching, Repeats
        from diffpolicy.rollout.record.pairing import Scoring

        given = asdict(self) | {"score": score_function(self.score)}
        scoring = Scoring(**{f.name: given[f.name] for f in fields(Scoring)})
        seed = noise_seed if self.noise_seed is None else self.noise_seed
        if self.kind == "episodes":
            return Repeats(self.repeats, seed, scoring)
        names = ("points", "every", "branches", "lookahead", "common_noise")
        return Branching(**{name: given[name] for name in names}, seed=seed, scoring=scoring)


def score_function(text: str) -> Any:
    """Return a named score, or the function of a module that can be imported.

    Raises:
        ConfigError: no such function.
    """
    return load_named("score", text) if ":" in text else text
