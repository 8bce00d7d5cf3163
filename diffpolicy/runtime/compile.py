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

from diffpolicy.data.observation import to_fields
from diffpolicy.extras import need
from diffpolicy.policies.diffusion import DiffusionPlanner
from diffpolicy.policies.guided import check_closed_form
from diffpolicy.policies.plan_loop import Encoded, PlanLoop
from diffpolicy.runtime.backends import BUILDERS, REQUIRES, Run, eager, missing
from diffpolicy.runtime.graph import LoopGraph
from diffpolicy.runtime.ports import SEEN, in_groups, in_order
from diffpolicy.settings import check_choice, check_range

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
        part: of the loop, see :class:`~diffpolicy.runtime.graph.LoopGraph`.
        condition: encodes observations for the part ``"rest"``; default: in eager PyTorch.

    Attributes:
        backend: the backend's name.
        batch_size: see above.
        nfe: network evaluations.
        draws: R, slices of noise.
        uses_guess: whether the guess matters.
        takes_encoded: it takes encoded observations, and no others: the part ``"rest"``.
        error: largest absolute difference from eager when it was built.
        timings: median milliseconds of every backend tried, if :func:`fastest` chose this one.
        failed: backends that :func:`fastest` could not build, with their errors.

    Raises:
        ValueError: an unknown backend, one that cannot run on the loop's device, a batch size below
            1, or plans that differ from eager's by more than 1e-4 (see :meth:`verify`).
        ImportError: the backend's package is missing.
    """

    def __init__(
        self,
        loop: PlanLoop,
        backend: str,
        batch_size: int,
        *,
        threads: int | None = None,
        part: str = "whole",
        condition: Callable[[Any], Tensor] | None = None,
    ) -> None:
        check_choice("backend", backend, BUILDERS)
        check_range("[1, inf)", batch_size=batch_size, threads=threads)
        for package in REQUIRES.get(backend, ()):
            need(package)
        self.backend, self.batch_size = backend, batch_size
        self.nfe, self.draws, self.uses_guess = loop.nfe, loop.draws, loop.uses_guess
        self.horizon, self.action_dim = loop.horizon, loop.action_dim
        self.condition, self.takes_encoded = condition or loop.condition, part == "rest"
        self.timings: Mapping[str, float] = {}
        self.failed: Mapping[str, str] = {}
        self._loop, self._graph = loop, LoopGraph(loop, part).eval()
        self._ways: dict[int, Run] = {}  # by number of groups
        example = self._graph.example(batch_size)
        threads = torch.get_num_threads() if threads is None else threads
        self._run: Run = BUILDERS[backend](self._graph, example, threads)
        self._eagerly = eager(self._graph, example, threads)
        self._made_of = loop.grid.weight_versions()
        self.error = self.verify()

    def __call__(self, history: Any, *rest: Tensor) -> Tensor:
        """One plan per row.

        Args:
            history: raw observations ``[n, To, ...]``, or such tensors by name, float32 or bytes;
                :class:`~diffpolicy.policies.plan_loop.Encoded` for the part ``"rest"``.
            rest: normalised clean guess ``[n, H, A]`` and standard normal noise ``[R, n, H, A]``,
                float32; neither for the part ``"encoder"``.

        Returns:
            Normalised plans ``[n, H, A]``, or of the part ``"encoder"`` ``[n, C]``.

        Raises:
            ValueError: other shapes or dtypes, or weights that changed since it was compiled.
        """
        if self._loop.grid.weight_versions() != self._made_of:
            raise ValueError("the weights changed since this policy was compiled: compile it again")
        ports, encoded = self._graph.ports, isinstance(history, Encoded)
        seen = {"cond": history.cond} if encoded else to_fields(history, SEEN)
        names = [port.name for port in ports[len(seen) :]]
        inputs = in_order(ports, {**seen, **dict(zip(names, rest, strict=True))})
        count = inputs[-1].shape[ports[-1].axes.index("batch")]
        for port, value in zip(ports, inputs, strict=True):
            port.check(value, count)
        if count == self.batch_size:
            return self._run(*inputs)
        groups = -(-count // self.batch_size)
        if groups < 2 or self.backend == "eager":
            return self._eagerly(*inputs) if self.backend == "eager" else self._grouped(*inputs)
        if groups not in self._ways:
            ways = {"groups": self._grouped, "eager": self._eagerly}
            taken = measure(ways, inputs, seconds=0.0)
            self._ways[groups] = ways[min(taken, key=taken.__getitem__)]
        return self._ways[groups](*inputs)

    def _grouped(self, *inputs: Tensor) -> Tensor:
        count = inputs[-1].shape[self._graph.ports[-1].axes.index("batch")]
        if not count:
            return self._eagerly(*inputs)
        made = in_groups(self._run, self._graph.ports, inputs, count, self.batch_size)
        return torch.cat([plan[:wanted] for plan, wanted in made])

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
            inputs = self._graph.example(self.batch_size, seed=seed + trial)
            moved = [v * (1 + 2**-22) if v.is_floating_point() else v for v in inputs]
            got.append(self._run(*inputs))
            expected.append(self._eagerly(*inputs))
            nudged.append(self._eagerly(*moved))
        answer = torch.cat(expected)
        rounding = min(float((torch.cat(nudged) - answer).abs().max()), 0.01)
        return check_close(torch.cat(got), answer, f"{self.backend!r}", rounding=rounding)

    def __repr__(self) -> str:
        sizes = f"batch_size={self.batch_size}, nfe={self.nfe}, error={self.error:.1e}"
        return f"CompiledLoop({self.backend}, {sizes})"


def compile_loop(
    loop: PlanLoop, *, backend: str = "auto", batch_size: int = 1, **options: Any
) -> CompiledLoop:
    """Build a loop under a backend and check it against eager.

    Args:
        loop: as ``policy.loop("cold")`` returns it.
        backend: ``"eager"``, ``"torch.compile"``, ``"cuda_graph"`` (CUDA only), ``"onnxruntime"``,
            ``"openvino"``, or ``"auto"``, the fastest of those at hand (measured).
        batch_size: see :class:`CompiledLoop`.
        options: ``threads``, ``part`` and ``condition`` of :class:`CompiledLoop`.

    Raises:
        ValueError: see :class:`CompiledLoop`.
        ImportError: the backend's package is missing.
    """
    if backend == "auto":
        return fastest(loop, batch_size, **options)
    return CompiledLoop(loop, backend, batch_size, **options)


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
    **options: Any,
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
        options: ``threads``, ``part`` and ``condition`` of :class:`CompiledLoop`.

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
            built[name] = CompiledLoop(loop, name, batch_size, **options)
        except Exception as error:  # a runtime's own exceptions, of any type
            if candidates is not None or name == "eager":
                raise
            failed[name] = f"{type(error).__name__}: {error}"
            log.warning("backend %r is not used: %s", name, failed[name])
    graph = next(iter(built.values()))._graph
    runs = {name: one._run for name, one in built.items()}
    timings = measure(runs, graph.example(batch_size), seconds=seconds)
    best = built[min(timings, key=timings.__getitem__)]
    best.timings, best.failed = timings, failed
    return best


def measure(
    runs: Mapping[str, Run], inputs: Sequence[Tensor], *, seconds: float = 1.0
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
    spec, truncated = planner.spec, planner.spec.truncated
    if truncated is not None and truncated.rank == "confidence":
        raise ValueError(
            "compiled loops return no confidence, and plans ranked by 'confidence' need more: "
            "export this policy (`diffpolicy export`), or rank by 'denoising' or 'prior'"
        )
    if spec.value_scale > 0:
        raise ValueError("guidance by a value differentiates its network, compiled loops cannot")
    check_closed_form(planner)
    # The plans of one row that compete are solved in one batch.
    many = 1 if truncated is None else planner._candidates(deterministic=False).guess_count
    encoded_rows = batch_size
    if spec.selection is not None:
        batch_size *= spec.selection.num_candidates
    how: dict[str, Any] = {"backend": backend, "threads": threads}
    # An encoder with weights sees what several plans are made of once, and not with each of them.
    learned = next(planner.denoiser.encoder.parameters(), None) is not None
    parts: dict[str, Any] = {}
    if learned and (truncated or spec.selection) is not None:
        first = planner.loop(planner.kinds[0])
        encoder = compile_loop(first, batch_size=encoded_rows, part="encoder", **how)
        parts = {"part": "rest", "condition": encoder}
    loops = {}
    for kind in planner.kinds:
        rows = batch_size if kind == "draft" else batch_size * many
        loops[kind] = compile_loop(planner.loop(kind), batch_size=rows, **how, **parts)
    return planner.with_loops(loops)


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
