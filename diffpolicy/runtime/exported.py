"""Run an exported policy with NumPy and ONNX Runtime alone: no PyTorch where the robot is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from diffpolicy.data.observation import to_fields
from diffpolicy.extras import need
from diffpolicy.runtime.ports import SEEN, Port, in_groups, in_order
from diffpolicy.settings import check_shape

Array = npt.NDArray[Any]
History = Array | Mapping[str, Array]
FORMAT, VERSIONS = "diffpolicy-export", (1, 2)  # 1: vectors by name travel side by side
CONTRACT = "contract.json"


class ExportedPlan(NamedTuple):
    """A plan for each row.

    Attributes:
        plan: ``[n, H, A]`` normalised.
        actions: ``[n, Ta, A]`` to execute, in environment units within bounds; the first belongs to
            the step of the newest observation.
        buffer: ``[n, H, A]`` of a streaming policy, else ``None``.
    """

    plan: Array
    actions: Array
    buffer: Array | None = None


class ExportedPolicy:
    """A policy written by ``diffpolicy export``.

    Rows are cut and padded to the batch size of the file, unless that is free.

    Example:
        >>> policy = load_exported("exported/pusht")
        >>> actions = policy.plan(history).actions[0]  # history [1, To, O]
        >>> later = policy.plan(history, executed=4)  # warm, four actions on

    Args:
        path: the directory.
        threads: CPU threads.
        seed: of the noise that is drawn where the caller gives none.

    Attributes:
        contract: what ``contract.json`` says.

    Raises:
        ValueError: not an export, one of another version, or a file that is missing or was changed.
        ImportError: the package ``onnxruntime`` is missing.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int = 1, seed: int = 0) -> None:
        folder = Path(path)
        self.contract = read_contract(folder)
        loops = self.contract["loops"].items()
        self._sessions = {kind: _session(folder, entry, threads) for kind, entry in loops}
        self._ports = {
            kind: [Port(*(entry[name] for name in Port._fields)) for entry in loop["inputs"]]
            for kind, loop in loops
        }
        self._generator = np.random.default_rng(seed)
        self._last: Array | None = None
        self._warm: npt.NDArray[np.bool_] = np.zeros(0, bool)

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget the last plan of ``rows`` (of all when absent): their next plan is cold."""
        self._warm[slice(None) if rows is None else list(rows)] = False

    def plan(
        self, history: History, *, executed: int | Array | None = None, noise: Array | None = None
    ) -> ExportedPlan:
        """Plan for every row: warm where the row has a plan since :meth:`reset`, else cold.

        Args:
            history: raw observations ``[n, To, O]``, or such arrays by name, oldest first, images
                as bytes; the same rows at every call.
            executed: steps executed since the last plan, one number or ``[n]`` (Ta when absent).
                A policy that plans anew when its observation jumps looks for jumps within
                ``history`` here; call :meth:`reset` for jumps between two calls.
            noise: standard normal ``[R, n, H, A]`` with R at least what the loops need; drawn from
                ``seed`` when absent.

        Raises:
            ValueError: wrong shapes or values that are not finite.
        """
        seen = self._checked(history)
        count = len(next(iter(seen.values())))
        if len(self._warm) != count or "warm" not in self._sessions:
            self._warm, self._last = np.zeros(count, bool), None
        sizes = self.contract["policy"]
        shift = np.full(count, sizes["n_action_steps"] if executed is None else executed)
        warm = self._usable(seen, shift)
        parts: list[tuple[Array, ExportedPlan]] = []
        for kind, rows in (("cold", np.flatnonzero(~warm)), ("warm", np.flatnonzero(warm))):
            if len(rows):
                last = None if self._last is None else self._last[rows]
                given = None if noise is None else np.asarray(noise)[: self.draws(kind), rows]
                told = {name: array[rows] for name, array in seen.items()}
                parts.append((rows, self._solved(kind, told, last, shift[rows], given)))
        solved = _joined(parts)
        carried = solved.buffer if solved.buffer is not None else solved.plan
        self._last, self._warm = carried.copy(), np.ones(count, bool)
        return solved

    def _usable(self, seen: Mapping[str, Array], shift: Array) -> npt.NDArray[np.bool_]:
        """Rows to be planned warm; limits ``shift`` to what the warm loop takes."""
        warm = self._warm.copy()
        if "warm" not in self._sessions:
            return warm
        entry, limits = self._entry("warm"), self.contract["cold_if_step_exceeds"]
        if entry["carries"] == "buffer":
            warm &= shift <= entry["max_shift"]  # its levels belong to that many steps
        np.minimum(shift, entry["max_shift"], out=shift)
        if limits is not None:
            steps = np.abs(np.diff(seen[SEEN], axis=1))
            warm &= ~(steps > np.asarray(limits, np.float32)).any((1, 2))
        return warm

    def draws(self, kind: str) -> int:
        """Slices of noise R that the loop of this kind needs."""
        return int(self._entry(kind)["draws"])

    def solve(
        self,
        kind: str,
        history: History,
        last: Array | None = None,
        shift: Array | None = None,
        noise: Array | None = None,
    ) -> ExportedPlan:
        """One call of a loop; remembers nothing.

        Args:
            kind: ``"cold"`` or ``"warm"``.
            history: raw observations ``[n, To, O]``.
            last: the last plan, or buffer, as returned ``[n, H, A]`` (warm only).
            shift: steps executed since it was made ``[n]`` (warm only).
            noise: standard normal ``[R, n, H, A]``; drawn when absent.

        Raises:
            ValueError: an unknown kind, a missing input, wrong shapes or values not finite.
        """
        return self._solved(kind, self._checked(history), last, shift, noise)

    def _solved(
        self,
        kind: str,
        seen: Mapping[str, Array],
        last: Array | None,
        shift: Array | None,
        noise: Array | None,
    ) -> ExportedPlan:
        entry = self._entry(kind)
        count, ports = len(next(iter(seen.values()))), self._ports[kind]
        drawn = next((port for port in ports if port.name == "noise"), None)
        if noise is None and drawn is not None:
            noise = self._generator.standard_normal(drawn.shape(count), np.float32)
        given = {**seen, f"last_{entry['carries']}": last, "shift": shift, "noise": noise}
        values = []
        for port in ports:
            if given.get(port.name) is None:
                raise ValueError(f"the {kind} loop of this policy needs {port.name!r}")
            values.append(port.fitted(given[port.name], count))
        names, session = [port.name for port in ports], self._sessions[kind]

        def run(*inputs: Array) -> list[Array]:
            feed = {n: np.ascontiguousarray(v) for n, v in zip(names, inputs, strict=True)}
            out: list[Array] = session.run(None, feed)
            return out

        size = max(
            count if self.contract["batch"]["dynamic"] else self.contract["batch"]["size"], 1
        )
        groups = list(in_groups(run, ports, values, count, size))
        columns = zip(*(outputs for outputs, _ in groups), strict=True)
        return ExportedPlan(*(np.concatenate(column)[:count] for column in columns))

    def _entry(self, kind: str) -> Mapping[str, Any]:
        loops: Mapping[str, Mapping[str, Any]] = self.contract["loops"]
        if kind not in loops:
            raise ValueError(f"this export has no {kind!r} loop; it has {sorted(loops)}")
        return loops[kind]

    def _checked(self, history: History) -> dict[str, Array]:
        """Observations by the names of their ports; those of the first version side by side."""
        ports = [port for port in self._ports["cold"] if port.name.split(".")[0] == SEEN]
        given, fields = to_fields(history, SEEN), self.contract["policy"].get("observations")
        if fields:
            ports = [
                ports[0]._replace(name=f"{SEEN}.{k}", axes=(*ports[0].axes[:2], n))
                for k, n in fields.items()
            ]
        arrays = {
            p.name: np.asarray(one) for p, one in zip(ports, in_order(ports, given), strict=True)
        }
        for port in ports:
            check_shape(port.name, arrays[port.name].shape, ("n", *port.axes[1:]))
        count = len(arrays[ports[0].name])
        if not count:
            raise ValueError("history holds no rows")
        arrays = {port.name: port.fitted(arrays[port.name], count) for port in ports}
        return {SEEN: np.concatenate(list(arrays.values()), -1)} if fields else arrays


def load_exported(
    path: str | os.PathLike[str], *, threads: int = 1, seed: int = 0
) -> ExportedPolicy:
    """Read an exported policy, verifying every hash; see :class:`ExportedPolicy`."""
    return ExportedPolicy(path, threads=threads, seed=seed)


def read_contract(folder: Path) -> dict[str, Any]:
    """The contract of an export.

    Raises:
        ValueError: there is none, it is of another version, or it was changed after the export.
    """
    file = folder / CONTRACT
    if not file.is_file():
        raise ValueError(f"{folder} is not an exported policy: it has no {CONTRACT}")
    try:
        contract = json.loads(file.read_text(encoding="utf-8"))
        known = contract["format"] == FORMAT
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ValueError(f"{file} is not the contract of an exported policy; export it anew")
    if contract.get("version") not in VERSIONS:
        got, read = contract.get("version"), " and ".join(map(str, VERSIONS))
        raise ValueError(f"{file} has version {got!r}; this diffpolicy reads {read}")
    if contract.get("checksum") != checksum(contract):
        raise ValueError(f"{file} was changed after the export; export the policy anew")
    return dict(contract)


def checksum(contract: Mapping[str, Any]) -> str:
    """SHA-256 of a contract without its own ``checksum``."""
    rest = {k: v for k, v in contract.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _session(folder: Path, entry: Mapping[str, Any], threads: int) -> Any:
    """A session on a file that is what the contract says.

    Raises:
        ValueError: the file is missing or was changed.
    """
    name = entry["file"]
    file = folder / name
    if Path(name).name != name or not file.is_file():
        raise ValueError(f"the contract names {name!r}, which is not a file in {folder}")
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ValueError(f"{file} is damaged or was changed (its SHA-256 is not the contract's)")
    session = cpu_session(content, threads)
    have = sorted(port.name for port in session.get_inputs())
    want = sorted(port["name"] for port in entry["inputs"])
    if have != want:
        raise ValueError(f"{file} takes {have}, the contract says {want}")
    return session


def cpu_session(model: bytes, threads: int) -> Any:
    """An ONNX Runtime session on the CPU that leaves cores alone while it waits.

    Raises:
        ImportError: the package ``onnxruntime`` is missing.
    """
    onnxruntime = need("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _joined(parts: Sequence[tuple[Array, ExportedPlan]]) -> ExportedPlan:
    """Plans of several groups of rows in the order of the rows."""
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    columns = [c for c in zip(*(plans for _, plans in parts), strict=True) if c[0] is not None]
    return ExportedPlan(*(np.concatenate(column)[order] for column in columns))
