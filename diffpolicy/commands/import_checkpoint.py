"""`diffpolicy import-checkpoint`: turn a published checkpoint into one of ours.

usage: diffpolicy import-checkpoint SOURCE TARGET [kind=auto]

SOURCE is a LeRobot diffusion policy (directory with config.json and model.safetensors) or a
Diffusion Policy checkpoint (.ckpt, 1-D U-Net), of vectors or of cameras too. TARGET becomes a
policy directory for `diffpolicy eval`. A .ckpt is a pickle: it is read in a process of its own by
an unpickler that builds tensors and plain containers and runs nothing else.
kind: auto, lerobot or diffusion_policy.
"""

from __future__ import annotations

from collections.abc import Sequence

from diffpolicy.commands.options import helped, parse


def help_text() -> str:
    """This module's own text."""
    return helped(__doc__)


def run(arguments: Sequence[str]) -> int:
    """Import one checkpoint."""
    from diffpolicy.policies.foreign.published import read_checkpoint
    from diffpolicy.training.checkpoint import write_bundle
    from diffpolicy.training.saved import policy_files

    options = parse(arguments, ["source", "target"], {"kind": "auto"})
    policy = read_checkpoint(options["source"], kind=options["kind"])
    write_bundle(options["target"], policy_files(*policy))
    print(f"wrote {options['target']}")
    return 0
