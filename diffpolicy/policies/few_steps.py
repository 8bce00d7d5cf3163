"""What does not go with policies that learned whole steps, or one number of steps."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffpolicy.policies.spec import PolicySpec


def check_steps(spec: PolicySpec) -> None:
    """Refuse what a network of steps is not trained for; warn of a student's other steps.

    Raises:
        ValueError: settings that do not go with prediction ``mean_velocity``.
    """
    if spec.trained_steps not in (None, spec.sampler.num_steps):
        warnings.warn(
            f"this policy is a student of {spec.trained_steps} steps, whose estimates are for no "
            f"other number, and draws plans in {spec.sampler.num_steps}: "
            f"sampler.num_steps={spec.trained_steps}",
            stacklevel=4,
        )
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
