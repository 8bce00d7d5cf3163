"""What does not go with policies that learned whole steps, or one number of steps."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffpolicy.core.processes import make_process
from diffpolicy.core.sampler import Sampler

if TYPE_CHECKING:
    from diffpolicy.policies.spec import PolicySpec


def check_steps(spec: PolicySpec) -> None:
    """Refuse what a network of steps is not trained for; warn of a student's other steps.

    Raises:
        ValueError: settings that do not go with prediction ``mean_velocity``, or starts at levels
            that a student of one number of steps does not know.
    """
    if spec.trained_steps is not None:
        _check_own_steps(spec, spec.trained_steps)
    if spec.prediction != "mean_velocity":
        return
    foreign = {
        "clip=True": spec.clip,
        f"process={spec.process.get('type')!r}": spec.process.get("type") != "flow",
        f"layout={spec.layout!r}": spec.layout != "action",
        f"level_law={spec.level_law!r}": spec.level_law != "row",
        f"value_scale={spec.value_scale}": spec.value_scale != 0,
    }
    found = [name for name, used in foreign.items() if used]
    if found:
        raise ValueError(
            "prediction 'mean_velocity' is of steps along straight paths, whose estimates are no "
            "clean plans: it needs process='flow', clip=False, layout='action', level_law='row' "
            f"and value_scale=0; got {', '.join(found)}"
        )


def own_levels(spec: PolicySpec) -> Tensor:
    """The levels ``[K + 1]`` that a student of K steps knows, falling to 0."""
    grid = Sampler(num_steps=spec.trained_steps or 1).grid(make_process(spec.process))
    return grid.flatten()


def _check_own_steps(spec: PolicySpec, count: int) -> None:
    """Warn of full solves, and refuse other starts, that leave the grid of a student's steps."""
    own, process = own_levels(spec), make_process(spec.process)
    near = max(1e-6, 1.5 * process.first_level)  # levels of discrete processes are rounded

    def taken(sampler: Sampler, start: Any = None) -> bool:
        if sampler.solver not in ("ddim", "euler") or sampler.make().stochastic:
            return False
        grid = sampler.grid(process, start).flatten(1)
        fits = len(grid) <= len(own)
        return fits and bool(((grid - own[-len(grid) :, None]).abs() <= near).all())

    if not taken(spec.sampler):
        warnings.warn(
            f"this policy is a student of {count} steps, whose estimates are for no others, and "
            f"draws plans in {spec.sampler.num_steps}: sampler.num_steps={count} "
            "sampler.solver=ddim sampler.spacing=t",
            stacklevel=5,
        )
    for name, start in (("rti", spec.rti), ("truncated", spec.truncated)):
        if start is None or (start.t_start is not None and taken(start, start.t_start)):
            continue
        fits = [f"t_start={own[-1 - n]:.4g} num_steps={n}" for n in range(1, min(count, 3) + 1)]
        raise ValueError(
            f"this policy is a student of {count} steps and knows the levels between these alone: "
            f"{name} takes ddim and {' or '.join(fits)}; got t_start={start.t_start}, "
            f"num_steps={start.num_steps}, solver={start.solver!r}"
        )


def renoises(spec: PolicySpec) -> bool:
    """Whether plans are drawn by estimating and noising in turns, as students by consistency do."""
    return spec.sampler.options.get("variance") == "renoise"


def check_follows_paths(spec: PolicySpec, what: str) -> None:
    """Refuse students whose estimates are no directions of a path that many steps could follow.

    Args:
        spec: of the policy.
        what: is done to it, ``"autotune searches the steps of"``.

    Raises:
        ValueError: a student of one number of steps, or by consistency.
    """
    known = "where paths end" if renoises(spec) else f"its {spec.trained_steps} steps"
    if renoises(spec) or spec.trained_steps is not None:
        raise ValueError(
            f"{what} the paths of a denoiser, and this policy is a student whose estimates are of "
            f"{known} alone: take the policy that it was distilled from"
        )
