"""What a policy server allows, promises and accepts; values and checks without a socket."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffpolicy.policies.base import Array, ChunkedPolicy
from diffpolicy.runtime.wire_format import MAX_FRAME_BYTES, PROTOCOL, WireError

DEFAULT_PORT = 5555


@dataclass(frozen=True)
class Limits:
    """What a server puts up with.

    Args:
        max_clients: most clients at a time.
        max_batch: most rows in one policy call.
        max_frame_bytes: longest frame body that is read, in bytes.
        frame_timeout_s: seconds for the rest of a frame after its first byte, for the greeting
            after the connection, and for a peer to take a reply.
        idle_timeout_s: seconds without a request after which a client is hung up on; ``None``
            waits for ever (until its place is wanted, see ``reclaim_after_s``).
        reclaim_after_s: when every place is taken, a new client gets the place of the one that has
            asked nothing for longest, if that is at least so many seconds; ``None`` never.

    Raises:
        ValueError: a limit that is not positive.
    """

    max_clients: int = 16
    max_batch: int = 64
    max_frame_bytes: int = MAX_FRAME_BYTES
    frame_timeout_s: float = 5.0
    idle_timeout_s: float | None = 600.0
    reclaim_after_s: float | None = 30.0

    def __post_init__(self) -> None:
        for name in ("max_clients", "max_batch", "max_frame_bytes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        for name in ("frame_timeout_s", "idle_timeout_s", "reclaim_after_s"):
            value = getattr(self, name)
            optional = value is None and name != "frame_timeout_s"
            if not optional and not (_is_number(value) and value > 0):
                raise ValueError(f"{name} must be a positive number of seconds, got {value!r}")


@dataclass(frozen=True)
class ServeConfig:
    """Where a server listens and how it answers.

    Args:
        host: address to listen on; anything but loopback needs a token.
        port: TCP port; 0 takes a free one.
        token: shared secret that clients must send; ``None`` or at least 8 characters.
        batch_window_ms: how long a request waits for others to share a policy call, in
            milliseconds; it does not wait when every acting client has asked. 0 never waits.
        deterministic: fixed noise: the same observations give the same actions.
        limits: what the server puts up with.

    Raises:
        ValueError: a host beyond this machine without a token, or a value out of range.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    token: str | None = field(default=None, repr=False)
    batch_window_ms: float = 1.0
    deterministic: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if type(self.port) is not int or not 0 <= self.port <= 65535:
            raise ValueError(f"port must be from 0 (any free one) to 65535, got {self.port!r}")
        if self.token is not None and len(self.token) < 8:
            raise ValueError("a token needs at least 8 characters")
        if not (_is_number(self.batch_window_ms) and 0 <= self.batch_window_ms <= 1000):
            raise ValueError(
                f"batch_window_ms must be from 0 to 1000 milliseconds, got {self.batch_window_ms!r}"
            )
        if self.token is None and not is_loopback(self.host):
            raise ValueError(
                f"host={self.host!r} lets other machines drive this policy, which needs a token: "
                "give token_file=FILE (one line, at least 8 characters), or use host=127.0.0.1"
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only; other names than localhost no."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def contract(policy: ChunkedPolicy, config: ServeConfig) -> dict[str, Any]:
    """What the hello reply says of a policy: shapes, types, bounds; JSON-ready."""
    spec = getattr(policy, "spec", None)
    bounds = {n: _bound(getattr(spec, n, None)) for n in ("action_low", "action_high")}
    shapes = ("obs_dim", "action_dim", "horizon", "n_obs_steps", "n_action_steps")
    return {
        "version": PROTOCOL,
        **{name: int(getattr(policy, name)) for name in shapes},
        "obs_dtype": "float32",
        "action_dtype": "float32",
        **bounds,
        "deterministic": config.deterministic,
        "max_frame_bytes": config.limits.max_frame_bytes,
    }


def _bound(values: Any) -> list[float | None] | None:
    """A bound per action dimension, ``None`` for none: JSON has no infinity."""
    if values is None:
        return None
    return [float(v) if math.isfinite(v) else None for v in values]


def check_observation(obs: Array, policy: ChunkedPolicy, *, most: int) -> Array:
    """Observations as float32 ``[k, O]``, ``k <= most``; ``[O]`` counts as one.

    Raises:
        WireError: ``bad_dtype``, ``bad_shape`` or ``non_finite``.
    """
    if obs.dtype.kind != "f":
        raise WireError("bad_dtype", f"obs must be float32 or float64, got {obs.dtype.name}")
    single = (policy.obs_dim,)
    if obs.shape != single and not (
        most > 1 and obs.ndim == 2 and obs.shape[1:] == single and len(obs) <= most
    ):
        wanted = f"[{policy.obs_dim}]" + (f" or [1..{most}, {policy.obs_dim}]" if most > 1 else "")
        raise WireError("bad_shape", f"obs must have shape {wanted}, got {list(obs.shape)}")
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, and is refused below
        out = obs.astype(np.float32).reshape(-1, policy.obs_dim)
    if not np.isfinite(out).all():
        index = int(np.flatnonzero(~np.isfinite(out))[0]) % policy.obs_dim
        raise WireError("non_finite", f"obs is not finite (as float32) at index {index}")
    return out
