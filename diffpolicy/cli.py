"""The command line: `diffpolicy COMMAND key=value ...`.

Nothing heavy is imported until a command runs, so that help is immediate.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

COMMANDS = {
    "train": "train a policy on demonstrations, evaluate it and leave a run directory",
    "tune": "tune a policy or a sequence model by a reward, and report",
    "prefer": "tune a policy or a sequence model by comparisons, and report",
    "distill": "make a student of a policy that needs one or a few evaluations a plan, and report",
    "eval": "roll a trained policy out and score it",
    "resume": "continue an interrupted run exactly where it stopped, or train one for longer",
    "rti": "give a policy warm starts (real-time iteration), their level chosen from data",
    "autotune": "search a sampler of a few evaluations for a policy, from recorded observations",
    "anchors": "give a policy truncated starts from anchors of the demonstrations",
    "data": "make, check, convert or collect episode stores",
    "export": "write a policy as ONNX files with a contract, for deployment",
    "serve": "answer observations with actions over a WebSocket, for many clients at a time",
    "import-checkpoint": "turn a LeRobot or Diffusion Policy checkpoint into one of ours",
    "doctor": "versions, devices, rendering, and known-broken combinations with their fix",
}

MOVED = {
    "finetune": "it is `tune` (by a reward) and `prefer` (by comparisons), with method=...",
    "bench": "it is python scripts/bench.py of a checkout",
    "generate": "it is python scripts/generate.py of a checkout",
}
"""What is to be said of commands that there were."""

EVERYWHERE = {"config_dir": "DIFFPOLICY_CONFIG_DIR", "trust_env": "DIFFPOLICY_TRUST_ENVS"}
"""Arguments of every command, with the variable of the environment that says the same."""

USAGE = """\
diffpolicy: diffusion policies for reinforcement learning and robotics

usage: diffpolicy COMMAND [key=value ...]

commands:
{commands}

`diffpolicy COMMAND --help` explains each. Of every command:

  --config-dir DIR       your own YAML choices (DIR/experiment/mine.yaml, DIR/env/robot.yaml, ...);
                         ./configs unless given, or the variable DIFFPOLICY_CONFIG_DIR
  trust_env=PACKAGE      let files name environments, encoders, ... of this package, which is
                         running its code (true: of any); or the variable DIFFPOLICY_TRUST_ENVS
  --traceback            where an error comes from (or the variable DIFFPOLICY_TRACEBACK=1)

A first run:

  diffpolicy train experiment=demo       # demonstrations, training, rollouts: minutes on a CPU
  diffpolicy eval runs/demo              # score it again
  diffpolicy train experiment=demo network=transformer trainer.steps=2000 run_dir=runs/mine
"""


def usage() -> str:
    """The text of `diffpolicy --help`."""
    width = max(map(len, COMMANDS))
    return USAGE.format(
        commands="\n".join(f"  {n:<{width}}  {text}" for n, text in COMMANDS.items())
    )


class Terminated(KeyboardInterrupt):
    """SIGTERM: what runs is unwound as by Ctrl-C, so that workers end and files are whole."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name (those of the process when absent).

    Returns:
        Exit status: 0 done, 1 the command failed with an explained error, 2 unusable arguments, 130
        stopped by Ctrl-C, 143 by SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[-1] == "--config-dir":
        print("diffpolicy: --config-dir needs a directory", file=sys.stderr)
        return 2
    arguments, variables = _everywhere(arguments)
    # Waiting threads must sleep rather than spin, or two processes on two cores starve each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        with _terminable():
            name = f"diffpolicy {arguments[0] if arguments else ''}"
            return _guarded(name, _dispatch, arguments)
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _everywhere(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments that every command takes, as variables of the environment, and the others."""
    rest, variables, waiting = [], {}, ""
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if waiting:
            variables[waiting], waiting = argument, ""
        elif argument == "--traceback":
            variables["DIFFPOLICY_TRACEBACK"] = "1"
        elif argument == "--config-dir":
            waiting = EVERYWHERE["config_dir"]
        elif equals and key in EVERYWHERE:
            variables[EVERYWHERE[key]] = value
        else:
            rest.append(argument)
    return rest, variables


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind what runs, where nobody else handles it."""

    def stop(_number: int, _frame: object) -> None:
        raise Terminated

    try:
        ours = signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        previous = signal.signal(signal.SIGTERM, stop) if ours else None
    except ValueError:  # not the main thread
        ours = False
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, previous)


def guarded(
    name: str,
    run: Callable[[Sequence[str]], int],
    help_text: Callable[[], str],
    arguments: Sequence[str] | None = None,
) -> int:
    """Run a script as the commands are run: its help, and its errors as one line.

    Args:
        name: what its messages begin with.
        run: the script, of its arguments.
        help_text: what ``--help`` prints.
        arguments: those of the process when absent.

    Returns:
        Exit status, as of :func:`main`.
    """
    rest = list(sys.argv[1:] if arguments is None else arguments)

    def command(given: Sequence[str]) -> int:
        if any(a in ("-h", "--help") for a in given):
            print(help_text())
            return 0
        return int(run(given) or 0)

    with _terminable():
        return _guarded(name, command, rest)


def _guarded(name: str, run: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """The exit status of ``run``; whatever goes wrong in it becomes a line on standard error."""
    try:
        status = run(arguments)
        sys.stdout.flush()  # a reader that has gone shows here rather than at the very end
        return status
    except KeyboardInterrupt as stopped:
        terminated = isinstance(stopped, Terminated)
        said = "terminated" if terminated else "interrupted"
        print(f"\n{name}: {said}", file=sys.stderr)
        return 143 if terminated else 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141  # as `head` and the like leave any program: not an error of ours
        if os.environ.get("DIFFPOLICY_TRACEBACK"):
            raise
        print(f"{name}: {_said(error)}", file=sys.stderr)
        return 1


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from diffpolicy import __version__

        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        from diffpolicy.settings import near_miss

        hint = f": {MOVED[name]}" if name in MOVED else near_miss(name, COMMANDS)
        print(f"diffpolicy: unknown command {name!r}{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    command = importlib.import_module(f"diffpolicy.commands.{name.replace('-', '_')}")
    if any(a in ("-h", "--help") for a in rest):
        of_part = getattr(command, "help_for", None)  # where a subcommand has help of its own
        print(command.help_text() if of_part is None else of_part(rest))
        return 0
    return int(command.run(rest) or 0)


def _said(error: Exception) -> str:
    """An error as one line; our own explain themselves, of others the kind is said."""
    text = str(error).strip()
    if isinstance(error, ImportError):
        return text if "pip install" in text else f"{text}{_how_to_install(text)}"
    if isinstance(error, ValueError | OSError) and text:
        return text
    first = text.splitlines()[0] if text else "no reason is given"
    return f"{type(error).__name__}: {first} (--traceback shows where)"


def _how_to_install(text: str) -> str:
    """What to say of a package that a message names; empty if it is none of ours."""
    from diffpolicy.extras import pip_hint
    from diffpolicy.rollout.declared import install_hint

    hint = pip_hint(text) or install_hint(text)
    return f".{hint}" if hint else ""


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader has gone; if so, nothing more goes there."""
    try:
        number = sys.stdout.fileno()
        poll = select.poll()
        poll.register(number, select.POLLOUT)
        gone = any(event & select.POLLERR for _, event in poll.poll(0))
        if gone:  # or the interpreter complains when it flushes at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        return gone
    except (OSError, ValueError, AttributeError):  # no pipe, or a system without poll
        return False


if __name__ == "__main__":
    sys.exit(main())
