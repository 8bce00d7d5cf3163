"""`python scripts/bench.py gradients`: a reward's gradient against a plain implementation.

Both sides compute the same gradient, of a reward and the path divergence to a reference, through
the relaxed steps of a masked chain (DRAKES, Wang et al. 2025); it is checked before anything is
timed.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benches.sampling import interleaved, ratio
from diffpolicy.commands.options import parse
from diffpolicy.files import write_atomic
from diffpolicy.settings import ConfigError

VARIANTS = ("straightforward", "fast", "lean")
TOLERANCE = 1e-5
TARGET = (
    "fast >= 2 x faster than straightforward; lean >= 10 x less memory at no more time, all at "
    f"equal gradients ({TOLERANCE:g})"
)


@dataclass(frozen=True)
class Case:
    """What is measured; the defaults are a small version of DRAKES' DNA task."""

    length: int = 75
    vocab_size: int = 4
    width: int = 64
    stacks: int = 1
    batch: int = 32
    steps: int = 32
    relaxed: int = 12
    kl_weight: float = 0.1
    threads: int = 1


OPTIONS: dict[str, Any] = {**asdict(Case()), "rounds": 7, "json": None}


def help_text() -> str:
    """The text of `python scripts/bench.py gradients --help`."""
    return f"""\
usage: python scripts/bench.py gradients [json=FILE] [key=value] ...

One gradient of reward and path divergence through a masked chain (dilated CNN, joint=True):
straightforward (fresh evaluations of policy and reference for the divergence, all graphs kept),
fast (the library's) and lean (with checkpoint=true). Seconds in turn, and peak memory of each in a
process of its own: growth of its resident set, and bytes of tensors alive at a time.
    target: {TARGET}

    length=75 vocab_size=4    the sequences
    width=64 stacks=1         the network; DRAKES: width=128 stacks=4
    batch=32                  sequences per gradient
    steps=32 relaxed=12       of the chain; DRAKES: steps=128 relaxed=50
    kl_weight=0.1             of the divergence
    rounds=7 threads=1        repetitions, CPU threads
    json=FILE                 where the figures are written"""


def run(arguments: Sequence[str]) -> int:
    """Check that gradients are equal, measure, print, write the file."""
    options = parse(arguments, [], OPTIONS)
    names = Case.__dataclass_fields__
    case = Case(**{name: options[name] for name in names})
    _check(case, options["rounds"])
    torch.set_num_threads(case.threads)
    sides = gradients(case)
    wanted = sides[VARIANTS[0]]()
    differences = {name: difference(sides[name](), wanted) for name in VARIANTS[1:]}
    equal = max(differences.values()) <= TOLERANCE
    print(f"largest relative difference of gradients: {json.dumps(differences)}")
    if not equal:
        print(f"not equal to {TOLERANCE:g}: the two sides compute different things", flush=True)
    times, cpu = measured_in_turn(sides, int(options["rounds"]))
    memory = {name: measured_apart(name, case) for name in VARIANTS}
    report = {
        "case": asdict(case),
        "machine": _machine(case.threads),
        "gradient_difference": differences,
        "seconds": {name: round(statistics.median(v), 4) for name, v in times.items()},
        "cpu_seconds": {name: round(statistics.median(v), 4) for name, v in cpu.items()},
        "straightforward_over": {
            name: ratio(times[VARIANTS[0]], times[name]) for name in VARIANTS[1:]
        },
        "straightforward_over_cpu": {
            name: ratio(cpu[VARIANTS[0]], cpu[name]) for name in VARIANTS[1:]
        },
        "peak_mb": {
            name: {k: None if v is None else round(v / 1e6, 2) for k, v in found.items()}
            for name, found in memory.items()
        },
        "less_memory": {name: _less(memory, name) for name in VARIANTS[1:]},
    }
    print(table(report))
    print(f"    target: {TARGET}")
    if options["json"]:
        path = Path(options["json"])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(report, indent=1) + "\n")
    return 0 if equal else 1


def _check(case: Case, rounds: int) -> None:
    for name, value in {**asdict(case), "rounds": rounds}.items():
        if name != "kl_weight" and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} must be a whole number, at least 1; got {value!r}")
    if case.relaxed > case.steps:
        raise ConfigError(f"relaxed={case.relaxed} is more than the steps={case.steps} there are")
    if not case.kl_weight > 0:
        raise ConfigError(
            f"kl_weight must be above 0, got {case.kl_weight}: without a divergence there is no "
            "reference to compare"
        )


def _machine(threads: int) -> dict[str, Any]:
    from benches.latency import machine

    return machine(threads)


def measured_in_turn(
    sides: Mapping[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every side in every round, by the clock and of the processor.

    On a busy machine the second are the steadier; with one thread and nothing else they agree.
    """
    cpu: dict[str, list[float]] = {name: [] for name in sides}

    def metered(name: str) -> Callable[[], None]:
        def side() -> None:
            began = time.process_time()
            sides[name]()
            cpu[name].append(time.process_time() - began)

        return side

    times = interleaved({name: metered(name) for name in sides}, rounds)
    return times, {name: values[1:] for name, values in cpu.items()}  # less the warm-up


def _less(memory: Mapping[str, Mapping[str, float | None]], name: str) -> dict[str, float | None]:
    """How many times less memory than the straightforward one."""
    plain, ours = memory[VARIANTS[0]], memory[name]
    return {k: round(a / b, 2) if a and (b := ours[k]) else None for k, a in plain.items()}


def table(report: Mapping[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        "| variant | s per gradient | times faster (range) | CPU s | times faster (range) "
        "| tensors MB | less | RSS MB | less |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in VARIANTS:
        peak = report["peak_mb"][name]
        faster, cpu = (
            _said(report[key].get(name))
            for key in ("straightforward_over", "straightforward_over_cpu")
        )
        less = report["less_memory"].get(name, {"tensors": 1.0, "process": 1.0})
        lines.append(
            f"| {name} | {report['seconds'][name]:.3f} | {faster} "
            f"| {report['cpu_seconds'][name]:.3f} | {cpu} "
            f"| {peak['tensors']} | {less['tensors']} | {peak['process']} | {less['process']} |"
        )
    return "\n".join(lines)


def _said(found: Mapping[str, float] | None) -> str:
    return "1" if found is None else "{median} ({min} to {max})".format(**found)


# The three sides


def networks(case: Case) -> tuple[Any, Any, nn.Module]:
    """Denoiser, a reference that differs, and the reward's network."""
    from diffpolicy.core.masked_denoiser import MaskedDenoiser
    from diffpolicy.core.masking import LogLinear
    from diffpolicy.networks import make_network
    from diffpolicy.networks.sequence import SequenceRegressor

    config = {
        "type": "sequence_cnn",
        "horizon": case.length,
        "dim": case.vocab_size + 1,
        "width": case.width,
        "stacks": case.stacks,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = make_network(config)
        nn.init.normal_(network.outward.weight, std=0.1)  # type: ignore[union-attr, arg-type]
        denoiser = MaskedDenoiser(network, LogLinear(), case.vocab_size, time_free=True)
        reference = copy.deepcopy(denoiser)
        for parameter in reference.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        reward = SequenceRegressor(case.length, case.vocab_size).eval().requires_grad_(False)
    return denoiser.train(), reference.eval(), reward


def gradients(case: Case) -> dict[str, Callable[[], list[Tensor]]]:
    """By variant, a function that computes one gradient; the same in all three."""
    from diffpolicy.core.reveal import Relaxation
    from diffpolicy.learn.reference import frozen_copy
    from diffpolicy.learn.reward.pathwise import MaskedChain, RewardLoss

    denoiser, reference, reward = networks(case)

    def side(loss: Callable[[torch.Generator], Tensor]) -> Callable[[], list[Tensor]]:
        def gradient() -> list[Tensor]:
            for parameter in (*denoiser.parameters(), *reference.parameters()):
                parameter.grad = None
            loss(torch.Generator().manual_seed(1)).mean().backward()  # type: ignore[no-untyped-call]
            return [p.grad for p in denoiser.parameters() if p.grad is not None]

        return gradient

    def library(*, checkpoint: bool) -> Callable[[torch.Generator], Tensor]:
        chain = MaskedChain(
            num_steps=case.steps,
            relaxation=Relaxation(relaxed_steps=case.relaxed),
            joint=True,
            checkpoint=checkpoint,
        )
        frozen = frozen_copy(reference)
        objective = RewardLoss(denoiser, reward, chain, kl_weight=case.kl_weight, reference=frozen)
        batch = {"index": torch.arange(case.batch)}
        return lambda generator: objective(batch, generator).loss

    return {
        "straightforward": side(lambda g: straightforward(denoiser, reference, reward, case, g)),
        "fast": side(library(checkpoint=False)),
        "lean": side(library(checkpoint=True)),
    }


def straightforward(
    denoiser: Any, reference: Any, reward: nn.Module, case: Case, generator: torch.Generator
) -> Tensor:
    """The objective written down as it is defined, ``[B]``.

    As in the released code of DRAKES: the first steps are sampled with a graph that is thrown away,
    the divergence evaluates policy and reference anew at every state, the reference's parameters
    take gradients, and every graph is kept until the backward pass.
    """
    shape = (case.batch, case.length, case.vocab_size + 1)
    process = denoiser.process
    x = torch.zeros(shape)
    x[..., -1] = 1.0
    noise = process.draw_noise((case.steps, *shape), generator, x)
    grid = torch.linspace(1, 0, case.steps + 1, dtype=torch.float64)
    masked = process.mask_probability(grid)
    reveal = ((masked[:-1] - masked[1:]) / masked[:-1]).float()
    states = []
    for k in range(case.steps):
        states.append(x)
        log_p = denoiser.log_probs(x, grid[k].view(1, 1, 1))
        stay = torch.log1p(-reveal[k]).expand(*shape[:2], 1)
        scores = torch.cat([log_p + reveal[k].log(), stay], dim=-1) + noise[k]
        if k < case.steps - case.relaxed:
            drawn = one_hot(scores.argmax(-1), shape[-1]).float()
        else:
            drawn = scores.softmax(-1)
        mask = x[..., -1:]
        x = torch.cat([x[..., :-1], torch.zeros_like(mask)], dim=-1) + mask * drawn
    divergence = torch.zeros(case.batch)
    for k, state in enumerate(states):
        t = grid[k].view(1, 1, 1)
        log_p, log_q = denoiser.log_probs(state, t), reference.log_probs(state, t)
        inner = (log_p.exp() * (log_p - log_q)).sum(-1)
        divergence = divergence + reveal[k] * (state[..., -1] * inner).sum(-1)
    tokens = x[..., :-1]
    hard = one_hot(tokens.argmax(-1), case.vocab_size).float()
    value: Tensor = reward(hard + tokens - tokens.detach())
    return case.kl_weight * divergence - value


def difference(ours: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of two gradients, relative to each tensor's largest entry."""
    pairs = zip(ours, wanted, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs)


# Memory


def measured_apart(variant: str, case: Case) -> dict[str, float | None]:
    """Peak bytes of one gradient in a new process: see :func:`peaks`."""
    code = "import sys; from benches.reward_gradients import child; child(sys.argv[1])"
    given = json.dumps({"variant": variant, "case": asdict(case)})
    place = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, given], capture_output=True, text=True, check=False, env=place
    )
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {variant!r} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(given: str) -> None:
    """Entry point of the process in which a variant's memory is measured."""
    values = json.loads(given)
    case = Case(**values["case"])
    torch.set_num_threads(case.threads)
    print(json.dumps(peaks(values["variant"], case)))


def peaks(variant: str, case: Case) -> dict[str, float | None]:
    """``process``: growth of the resident set at its peak; ``tensors``: bytes alive at the peak.

    Beyond what is there after a gradient of one short sequence, which loads libraries and kernels.
    ``process`` is ``None`` where ``/proc`` does not tell it, and right in a new process alone.
    """
    small = Case(**{**asdict(case), "batch": 1, "steps": 2, "relaxed": 1})
    gradients(small)[variant]()
    gradient = gradients(case)[variant]
    before = _resident("VmRSS")
    gradient()
    after = _resident("VmHWM")
    with LiveBytes() as live:
        gradient()
    grown = None if before is None or after is None else float(after - before)
    return {"tensors": float(live.peak), "process": grown}


def _resident(field: str) -> int | None:
    """Bytes of a field of ``/proc/self/status``.

    Not ``getrusage``: its peak is inherited from the process that started this one.
    """
    status = Path("/proc/self/status")
    if os.name != "posix" or not status.is_file():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return None


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that operations made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {
            v.untyped_storage()._cdata for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)
        }
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), known)
        return out

    def _count(self, storage: Any, known: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in known:
            return
        self._seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
