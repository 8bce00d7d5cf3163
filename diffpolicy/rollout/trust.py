"""Which environments that a file names may be run without the user having named them.

``module:Name-v0`` imports ``module``, which is running its code. An id that came with a checkpoint,
a run or a data set is therefore run only if its package is known, or if the user says so.
"""

from __future__ import annotations

import os

from diffpolicy.rollout.env_spec import EnvSpecError

VARIABLE = "DIFFPOLICY_TRUST_ENVS"
KNOWN = ("diffpolicy_envs", "gymnasium", "gymnasium_robotics", "gym_pusht", "gym_aloha", "gym_xarm")
# Gymnasium's adapters, whose arguments name, and import, an environment of another library.
_ADAPTERS = ("GymV21Environment", "GymV26Environment")


def stored_env_id(env_id: str, source: object, *, instead: str = "env.id=") -> str:
    """The id of an environment that was read from a file, if it may be run.

    Args:
        env_id: what the file says.
        source: the file, for the message.
        instead: the argument by which the user can name it; empty: there is none.

    Returns:
        ``env_id``.

    Raises:
        EnvSpecError: it imports a package that is not known and that the user does not trust (the
            variable ``DIFFPOLICY_TRUST_ENVS`` names packages, or is ``true`` for all; on the
            command line ``trust_env=`` sets it).
    """
    module, colon, name = env_id.rpartition(":")
    package = module.split(".")[0]
    trusted = {name.strip() for name in os.environ.get(VARIABLE, "").split(",")} - {""}
    safe = package in KNOWN if colon else True
    if (safe and not name.startswith(_ADAPTERS)) or package in trusted or "true" in trusted:
        return env_id
    name_it = f"{instead}{env_id}, or " if instead else ""
    raise EnvSpecError(
        f"{source} names the environment {env_id!r}, which imports {package or name!r}: code that "
        f"you did not choose. If you know it, say {name_it}trust_env={package or 'true'} (from "
        f"Python: {VARIABLE}={package or 'true'} in the environment)"
    )


__all__ = ["KNOWN", "VARIABLE", "stored_env_id"]
