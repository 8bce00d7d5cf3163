"""The command line: `diffpolicy COMMAND key=value ...`.

Nothing heavy is imported until a command runs, so that help is immediate.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a policy on demonstrations, evaluate it and leave a run directory",
    "finetune": "tune a sequence model by a reward, or a policy by preferences, and report",
    "eval": "roll a trained policy out and score it",
    "resume": "continue an interrupted run exactly where it stopped",
    "rti": "give a policy warm starts (real-time iteration), their level chosen from data",
    "anchors": "give a policy truncated starts from anchors of the demonstrations",
    "data": "info, check, convert or collect episode stores",
    "generate": "make datasets in the HDF5 layout of D4RL",
    "export": "write a policy as ONNX files with a contract, for deployment",
    "serve": "answer observations with actions over TCP, for many clients at a time",
    "import-checkpoint": "turn a LeRobot or Diffusion Policy checkpoint into one of ours",
    "bench": "speed ratios against other libraries, measured side by side",
    "doctor": "versions, devices, rendering, and known-broken combinations with their fix",
}

USAGE = """\
diffpolicy: diffusion policies for reinforcement learning and robotics

usage: diffpolicy COMMAND [key=value ...]

commands:
{commands}

`diffpolicy COMMAND --help` explains each. A first run:

  diffpolicy train experiment=demo       # demonstrations, training, rollouts: minutes on a CPU
  diffpolicy eval checkpoint=runs/demo   # score it again
  diffpolicy train experiment=demo network=transformer trainer.steps=2000 run_dir=runs/mine
"""


def usage() -> str:
    """The text of `diffpolicy --help`."""
    width = max(map(len, COMMANDS))
    return USAGE.format(
        commands="\n".join(f"  {n:<{width}}  {text}" for n, text in COMMANDS.items())
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name (those of the process when absent).

    Returns:
        Exit status: 0 done, 1 the command failed with an explained error, 2 unusable arguments.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from diffpolicy import __version__

        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"diffpolicy: unknown command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    # Waiting threads must sleep rather than spin, or two processes on two cores starve each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    command = importlib.import_module(f"diffpolicy.commands.{name.replace('-', '_')}")
    if any(a in ("-h", "--help") for a in rest):
        print(command.help_text())
        return 0
    try:
        return int(command.run(rest) or 0)
    except (ValueError, OSError, ImportError) as error:  # our own errors explain themselves
        if os.environ.get("DIFFPOLICY_TRACEBACK"):
            raise
        print(f"diffpolicy {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ndiffpolicy {name}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
