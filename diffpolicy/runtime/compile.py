"""Compiled policies: the whole sampling loop of a policy under a faster runtime.

Every compiled loop is compared with eager PyTorch on random inputs when it is built, and refused if
it differs. It holds the weights of that moment.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffpolicy.data.observation import side_by_side
from diffpolicy.extras import need
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.plan_loop import PlanLoop
from diffpolicy.runtime.backends import BUILDERS, REQUIRES, Run, eager, missing
from diffpolicy.settings import check_choice, check_range, check_shape

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
# Building by torch.compile takes minutes where the others take seconds: on request only.
CANDIDATES = {"cpu": ("eager", "onnxruntime", "openvino"), "cuda": ("eager", "cuda_graph")}


class CompiledLoop:
    """A sampling loop under one backend for one batch size, checked against eager PyTorch.

    Other batch sizes work too: rows are cut into groups of ``batch_size`` and the last group is
    padded with copies of its last row, whose plans are dropped; so a single row costs as much as
    ``batch_size`` rows. More rows than that go through eager PyTorch at once where that is faster,
    which the first call with so many groups measures.

    Args:
        loop: the loop.
        backend: one of :data:`~diffpolicy.runtime.backends.BUILDERS`.
        batch_size: rows per call that it is built for, at least 1.
        threads: CPU threads of ``onnxruntime`` and ``openvino`` (PyTorch's number when absent); the
            other backends use PyTorch's.

    Attributes:
        backend: the backend's name.
        batch_size: see above.
        nfe: network evaluations.
        draws: R, slices of noise.
        uses_guess: whether the guess matters.
        error: largest absolute difference from eager when it was built.
        timings: median milliseconds of every backend tried, if :func:`fastest` chose this one.
        failed: backends that :func:`fastest` could not build, with their errors.

    Raises:
        ValueError: an unknown backend, one that cannot run on the loop's device, a batch size below
            1, or plans that differ from eager's by more than 1e-4 (see :meth:`verify`).
        ImportError: the backend's package is missing.
    """

    def __init__(
        self, loop: PlanLoop, backend: str, batch_size: int, *, threads: int | None = None
    ) -> None:
        check_choice("backend", backend, BUILDERS)
        check_range("[1, inf)", batch_size=batch_size, threads=threads)
        for package in REQUIRES.get(backend, ()):
            need(package)
        self.backend, self.batch_size = backend, batch_size
        self.nfe, self.draws, self.uses_guess = loop.nfe, loop.draws, loop.uses_guess
        self.obs_shape, self.device = loop.obs_shape, loop.device
        self.horizon, self.action_dim = loop.horizon, loop.action_dim
        self.timings: Mapping[str, float] = {}
        self.failed: Mapping[str, str] = {}
        self._loop = loop
        self._ways: dict[int, Run] = {}  # by number of groups
        example = example_inputs(loop, batch_size)
        threads = torch.get_num_threads() if threads is None else threads
        self._run: Run = BUILDERS[backend](loop, example, threads)
        self._eagerly = eager(loop, example, threads)
        self._made_of = loop.grid.weight_versions()
        self.error = self.verify()

    def __call__(self, history: Any, guess: Tensor, noise: Tensor) -> Tensor:
        """One plan per row.

        Args:
            history: raw observations ``[n, To, O]``, or such tensors by name; float32 as all.
            guess: normalised clean guess ``[n, H, A]``.
            noise: standard normal ``[R, n, H, A]``.

        Returns:
            Normalised plans ``[n, H, A]``.

        Raises:
            ValueError: other shapes or dtypes, or weights that changed since it was compiled.
        """
        if self._loop.grid.weight_versions() != self._made_of:
            raise ValueError("the weights changed since this policy was compiled: compile it again")
        inputs = side_by_side(history), guess, noise
        count = self._count(*inputs)
        if count == self.batch_size:
            return self._run(*inputs)
        groups = -(-count // self.batch_size)
        if groups < 2 or self.backend == "eager":
            return self._in_groups(*inputs)
        if groups not in self._ways:
            ways = {"groups": self._in_groups, "eager": self._eagerly}
            taken = measure(ways, inputs, seconds=0.0)
            self._ways[groups] = ways[min(taken, key=taken.__getitem__)]
        return self._ways[groups](*inputs)

    def _in_groups(self, history: Tensor, guess: Tensor, noise: Tensor) -> Tensor:
        count, size = len(history), self.batch_size
        plans = []
        for first in range(0, count, size):
            rows = torch.arange(first, first + size, device=history.device)
            rows = rows.clamp(max=count - 1)  # the last one fills its group up
            made = self._run(history[rows], guess[rows], noise[:, rows])
            plans.append(made[: count - first])
        return torch.cat(plans) if plans else guess.clone()

    def verify(self, trials: int = 3, *, seed: int = 0) -> float:
        """The largest absolute difference from eager on random inputs.

        Args:
            trials: batches to compare.
            seed: of the inputs.

        Raises:
            ValueError: it exceeds 1e-4 (times the largest entry of a plan, where that is above 1),
                and eight times what eager's own answer moves when the last bits of the inputs do: a
                single step from pure noise divides rounding by ``alpha(1)``, 5e-4 for some
                processes.
        """
        got, expected, nudged = [], [], []
        for trial in range(trials):
            inputs = example_inputs(self._loop, self.batch_size, seed=seed + trial)
            got.append(self._run(*inputs))
            expected.append(self._eagerly(*inputs))
            nudged.append(self._eagerly(*(value * (1 + 2**-22) for value in inputs)))
        answer = torch.cat(expected)
        rounding = min(float((torch.cat(nudged) - answer).abs().max()), 0.01)
        return check_close(torch.cat(got), answer, f"{self.backend!r}", rounding=rounding)

    def _count(self, history: Tensor, guess: Tensor, noise: Tensor) -> int:
        """Rows n of inputs whose shapes and types are checked."""
        n, plan = len(history), (self.horizon, self.action_dim)
        wanted = {
            "history": (history, (n, *self.obs_shape)),
            "guess": (guess, (n, *plan)),
            "noise": (noise, (self.draws, n, *plan)),
        }
        for name, (value, shape) in wanted.items():
            check_shape(name, value.shape, shape)
            if value.dtype != torch.float32:
                raise ValueError(f"{name} must be float32, got {value.dtype}")
        return n

    def __repr__(self) -> str:
        sizes = f"batch_size={self.batch_size}, nfe={self.nfe}, error={self.error:.1e}"
        return f"CompiledLoop({self.backend}, {sizes})"


def compile_loop(
    loop: PlanLoop, *, backend: str = "auto", batch_size: int = 1, threads: int | None = None
) -> CompiledLoop:
    """Build a loop under a backend and check it against eager.

    Args:
        loop: as ``policy.loop("cold")`` returns it.
        backend: ``"eager"``, ``"torch.compile"``, ``"cuda_graph"`` (CUDA only), ``"onnxruntime"``,
            ``"openvino"``, or ``"auto"``, the fastest of those at hand (measured).
        batch_size: see :class:`CompiledLoop`.
        threads: see :class:`CompiledLoop`.

    Raises:
        ValueError: see :class:`CompiledLoop`.
        ImportError: the backend's package is missing.
    """
    if backend == "auto":
        return fastest(loop, batch_size, threads=threads)
    return CompiledLoop(loop, backend, batch_size, threads=threads)


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """The backends that ``"auto"`` measures on ``device``: those whose packages are installed."""
    kind = torch.device(device).type
    return tuple(b for b in CANDIDATES.get(kind, ("eager",)) if not missing(b))


def fastest(
    loop: PlanLoop,
    batch_size: int,
    candidates: Sequence[str] | None = None,
    *,
    seconds: float = 1.0,
    threads: int | None = None,
) -> CompiledLoop:
    """The backend with the lowest median time here, each built and measured in turns.

    Eager PyTorch is among them, so that none is chosen that is slower at ``batch_size``; which one
    is fastest depends on it.

    Args:
        loop: the loop.
        batch_size: rows per call.
        candidates: backends to try; when absent those of :func:`available_backends`, of which one
            that fails is passed over with a warning.
        seconds: time to measure for, all backends together.
        threads: see :class:`CompiledLoop`.

    Returns:
        The winner; its ``timings`` hold every backend's median in milliseconds.

    Raises:
        ValueError: no candidate, or a named one that fails its check.
        ImportError: a named candidate's package is missing.
    """
    names = available_backends(loop.device) if candidates is None else tuple(candidates)
    if not names:
        raise ValueError("no backend to choose from; give candidates=('eager', ...)")
    built, failed = {}, {}
    for name in names:
        try:
            built[name] = CompiledLoop(loop, name, batch_size, threads=threads)
        except Exception as error:  # a runtime's own exceptions, of any type
            if candidates is not None or name == "eager":
                raise
            failed[name] = f"{type(error).__name__}: {error}"
            log.warning("backend %r is not used: %s", name, failed[name])
    timings = measure(built, example_inputs(loop, batch_size), seconds=seconds)
    best = built[min(timings, key=timings.__getitem__)]
    best.timings, best.failed = timings, failed
    return best


def measure(
    runs: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]],
    inputs: tuple[Tensor, Tensor, Tensor],
    *,
    seconds: float = 1.0,
) -> dict[str, float]:
    """Median milliseconds per call of each of ``runs``, measured in turns.

    Turns make a machine that is busy for a while slow all of them alike. At least 3 turns.
    """
    on_gpu = inputs[0].device.type == "cuda"
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(*inputs)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or min(map(len, times.values())) < 3:
        for name, run in runs.items():
            start = time.perf_counter()
            run(*inputs)
            if on_gpu:
                torch.cuda.synchronize(inputs[0].device)
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(taken) for name, taken in times.items()}


P = TypeVar("P", bound=DiffusionPlanner)


def compile_planner(
    planner: P, *, backend: str = "auto", batch_size: int = 1, threads: int | None = None
) -> P:
    """A copy of a policy whose loops run under ``backend``; the policy itself is unchanged.

    Args:
        planner: the policy.
        backend: see :func:`compile_loop`.
        batch_size: environments per call that it is built for; others work, padded.
        threads: CPU threads of ``onnxruntime`` and ``openvino``.

    Raises:
        ValueError: see :class:`CompiledLoop`.
        ImportError: the backend's package is missing.
    """
    truncated = planner.spec.truncated
    if truncated is not None and truncated.rank == "confidence":
        raise ValueError(
            "compiled loops return no confidence, and plans ranked by 'confidence' need more: "
            "export this policy (`diffpolicy export`), or rank by 'denoising' or 'prior'"
        )
    # The plans of one row that compete are solved in one batch.
    many = 1 if truncated is None else planner._candidates(deterministic=False).guess_count
    if planner.spec.value_scale > 0:
        raise ValueError("guidance by a value differentiates its network, compiled loops cannot")
    if planner.spec.selection is not None:
        batch_size *= planner.spec.selection.num_candidates
    loops = {}
    for kind in planner.kinds:
        rows = batch_size if kind == "draft" else batch_size * many
        loop = planner.loop(kind)
        loops[kind] = compile_loop(loop, backend=backend, batch_size=rows, threads=threads)
    return planner.with_loops(loops)


def example_inputs(loop: PlanLoop, batch: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random inputs on the loop's device: observations like the training data, a guess and noise.

    Args:
        loop: the loop.
        batch: n.
        seed: same seed, same inputs.

    Returns:
        ``history [n, To, O]`` raw, ``guess [n, H, A]`` in [-1, 1], ``noise [R, n, H, A]``.
    """
    generator = torch.Generator().manual_seed(seed)
    plan = (loop.horizon, loop.action_dim)
    # Normalised data lie about [-1, 1]; raw observations of arbitrary scale would saturate the net.
    observed = torch.randn(batch, *loop.obs_shape, generator=generator).to(loop.device)
    guess = 2 * torch.rand(batch, *plan, generator=generator) - 1
    noise = torch.randn(loop.draws, batch, *plan, generator=generator)
    history = loop.condition.unnormalize(observed)
    return history, guess.to(loop.device), noise.to(loop.device)


def check_close(got: Tensor, expected: Tensor, who: str, *, rounding: float = 0.0) -> float:
    """Largest absolute difference of plans from those of eager PyTorch.

    Raises:
        ValueError: a difference above 1e-4 (times the largest entry, where that is above 1) and
            above eight times ``rounding``, or entries that are not finite.
    """
    if got.shape != expected.shape:
        raise ValueError(f"{who} returns {list(got.shape)}, eager PyTorch {list(expected.shape)}")
    if not bool(expected.isfinite().all()):
        raise ValueError("eager PyTorch returns plans that are not finite: the weights are damaged")
    error = float((got - expected).abs().max())
    limit = max(TOLERANCE * max(1.0, float(expected.abs().max())), 8 * rounding)
    if not error <= limit:  # also refuses nan
        allowed = f"{limit:.0e} is allowed; use backend='eager'"
        raise ValueError(f"{who} differs from eager PyTorch by {error:.2e}: {allowed}")
    return error
