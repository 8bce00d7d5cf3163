"""What the files of D4RL's datasets look like, as far as it is known: more than their names.

D4RL publishes no digests. A file is taken for a dataset's if its name is and its rows have the
sizes of the dataset's environment; whether scores may stand beside published ones also asks for the
number of rows (Fu et al. 2020, table of datasets; the locomotion data of versions 1 and 2 as they
are published). Published files have up to one row in a hundred less than the round number.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffpolicy.data.d4rl.catalogue import DatasetInfo

# Sizes of a row of observations and of actions.
_SIZES = {
    "hopper": (11, 3),
    "halfcheetah": (17, 6),
    "walker2d": (17, 6),
    "ant": (111, 8),
    "maze2d": (4, 2),
    "antmaze": (29, 8),
    "pen": (45, 24),
    "hammer": (46, 26),
    "relocate": (39, 30),
    "door": (39, 28),
    "kitchen": (60, 9),
    "bullet-hopper": (15, 3),
    "bullet-halfcheetah": (26, 6),
    "bullet-walker2d": (22, 6),
    "bullet-ant": (28, 8),
    "bullet-maze2d": (4, 2),
}
# Rows of datasets, by a pattern of their ids; the first that matches counts.
_ROWS: tuple[tuple[str, int], ...] = (
    (r"pen-human-v\d", 5_000),
    (r"hammer-human-v\d", 11_310),
    (r"relocate-human-v\d", 9_942),
    (r"door-human-v\d", 6_729),
    (r"pen-(cloned|expert)-v\d", 500_000),
    (r"(hammer|relocate|door)-(cloned|expert)-v\d", 1_000_000),
    (r"kitchen-complete-v\d", 3_680),
    (r"kitchen-(partial|mixed)-v\d", 136_950),
    (r"antmaze-.*", 1_000_000),
    (r"maze2d-umaze(-dense)?-v1", 1_000_000),
    (r"maze2d-medium(-dense)?-v1", 2_000_000),
    (r"maze2d-large(-dense)?-v1", 4_000_000),
    (r"hopper-medium-replay-v0", 200_920),
    (r"halfcheetah-medium-replay-v0", 101_000),
    (r"walker2d-medium-replay-v0", 100_930),
    (r"hopper-medium-replay-v[12]", 402_000),
    (r"halfcheetah-medium-replay-v[12]", 202_000),
    (r"(walker2d|ant)-medium-replay-v[12]", 302_000),
    (r"(halfcheetah|walker2d)-medium-expert-v\d", 2_000_000),
    (r"(hopper|ant)-medium-expert-v[12]", 2_000_000),
    (r"(hopper|halfcheetah|walker2d|ant)-(random|medium|expert|full-replay)-v\d", 1_000_000),
)
_TOLERANCE = 0.01


def misfit(info: DatasetInfo, observation: tuple[int, ...], action: tuple[int, ...]) -> str | None:
    """Why rows of these shapes cannot be the dataset's; None if they can, or nothing is known."""
    family, _, rest = info.id.partition("-")
    sizes = _SIZES.get(f"bullet-{rest.partition('-')[0]}" if family == "bullet" else family)
    if sizes is None or (observation, action) == ((sizes[0],), (sizes[1],)):
        return None
    return (
        f"rows of observations {list(observation)} and actions {list(action)}, where {info.id!r} "
        f"has [{sizes[0]}] and [{sizes[1]}]"
    )


def doubts(info: DatasetInfo, rows: int | None) -> list[str]:
    """What speaks against data of so many rows being all of a dataset; empty if nothing does.

    Rows that nobody counted (``None``) do.
    """
    if rows is None:
        return ["the data are no longer there, so their rows were not counted"]
    known = next((n for pattern, n in _ROWS if re.fullmatch(pattern, info.id)), None)
    if known is None:
        return [f"how many rows D4RL's file of {info.id} has is not known here"]
    if abs(rows - known) > _TOLERANCE * known:
        return [f"the data have {rows} rows, D4RL's {info.id} has {known}"]
    return []
