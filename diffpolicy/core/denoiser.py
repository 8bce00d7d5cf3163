"""Denoisers: whatever the network predicts, the answer is the clean sample ``x0_hat``.

No solver knows a parameterisation: noise, velocity, clean-sample and EDM predictions are all linear
in the network's output, ``x0_hat = c_x(t) x_t + c_out(t) F(c_in(t) x_t, time(t), cond)``, and that
line is the whole difference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffpolicy.core.noise import GaussianProcess
from diffpolicy.settings import check_choice

PREDICTIONS = ("eps", "v", "x0", "edm", "velocity", "mean_velocity")
MAX_SIGNAL = 0.2  # alpha / sigma at t = 1 above which a start from pure noise is noticeably wrong


class Denoised(NamedTuple):
    """A denoiser's answer: the clean estimate ``x0_hat`` ``[B, H, D]``, and what else it says.

    ``aux`` holds the answers of further heads (confidences, values) by name.
    """

    x0_hat: Tensor
    aux: Mapping[str, Tensor] = {}


GridDenoise = Callable[..., Denoised]  # (row, x, cond)


class DenoiserNetwork(Protocol):
    """What a denoiser asks of a network (see :mod:`diffpolicy.networks`)."""

    t_kinds: frozenset[str]

    def embed_time(self, t: Tensor, *s: Tensor) -> Tensor: ...

    def __call__(
        self, x: Tensor, t: Tensor, cond: Tensor | None = None, *, time_emb: Tensor | None = None
    ) -> Tensor: ...


class BaseDenoiser(nn.Module):
    """Maps ``(x_t [B, H, D], t, cond)`` to :class:`Denoised`.

    Guidance and constraints wrap it with the same face.
    """

    process: GaussianProcess

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Denoised:
        raise TypeError(f"{type(self).__name__} must define forward")

    def on_grid(self, t: Tensor, s: Tensor | None = None) -> GridDenoise:
        """A function ``(row, x, cond) -> Denoised`` for host levels ``t [R, ...]``.

        All that does not depend on the state is computed once. ``s``, of the same shape, are the
        levels that steps lead to, which denoisers of steps look at (see :class:`Denoiser`).
        """
        rows = t.unbind(0)
        return lambda row, x, cond: self.forward(x, rows[row].to(x, non_blocking=True), cond)

    def encode(self, obs: Any) -> Tensor:
        """The condition ``[B, C]`` of normalised observations ``[B, To, ...]``, one or by name.

        It is made once per batch or decision; candidates, draws and steps repeat it.
        """
        out: Tensor = obs.flatten(1)
        return out

    def check_t(self, t: Tensor) -> None:
        """Raise if levels of this shape cannot be taken (per row is always possible)."""

    def placed(self, host: Tensor) -> Tensor:
        """Host constants of a grid, float64, on the device and in the dtype of the parameters."""
        like = next(self.parameters(), None)
        return host if like is None else host.to(like.device, like.dtype, non_blocking=True)


class AnalyticDenoiser(BaseDenoiser):
    """A denoiser given as a function ``(x_t, t, cond) -> x0_hat``, such as an exact solution."""

    def __init__(
        self, process: GaussianProcess, x0_hat: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    ) -> None:
        super().__init__()
        self.process = process
        self._x0_hat = x0_hat

    def forward(self, x_t: Tensor, t: Tensor, cond: Tensor | None = None) -> Denoised:
        return Denoised(self._x0_hat(x_t, t.to(x_t), cond))


class Denoiser(BaseDenoiser):
    """A network with a parameterisation.

    A network of ``mean_velocity`` is also told the level ``s`` that a step leads to (it is a
    :class:`~diffpolicy.networks.flow_map.FlowMap`). Its ``x0_hat`` is then not clean data: it is
    the estimate with which one step of DDIM, which is Euler's here, goes from ``x_t`` to where the
    path is at ``s``. With ``s = 0`` it is the end of the path, and with ``s = t``, which is meant
    where ``s`` is left out, the usual clean estimate.

    Args:
        network: ``F(x, t, cond)``.
        process: noise process it is trained under.
        prediction: what ``F`` outputs: ``eps`` noise, ``v = (alpha eps - sigma x0)`` (Salimans & Ho
            2022), ``x0`` the clean sample, ``edm`` Karras et al. 2022 eq. 7, ``velocity = noise -
            x0`` of flow matching, ``mean_velocity`` its mean over a step (Geng et al. 2025, eq. 3).
        clip: clamp ``x0_hat`` to [-1, 1]; only right when the data are normalised to that range.
        data_std: standard deviation of the normalised data, used by ``edm``.
        encoder: from observations to ``cond``; default: one array, flattened.

    Raises:
        ValueError: unknown prediction, or one that the process cannot support.
    """

    def __init__(
        self,
        network: nn.Module,
        process: GaussianProcess,
        prediction: str = "eps",
        *,
        clip: bool = False,
        data_std: float = 0.5,
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_choice("prediction", prediction, PREDICTIONS)
        of_steps = prediction == "mean_velocity"
        if (of_steps or prediction == "velocity") and process.type != "flow":
            raise ValueError(
                f"prediction {prediction!r} needs process 'flow', got {process.type!r}; use "
                + ("process=flow" if of_steps else "'v'")
            )
        if of_steps and (clip or not getattr(network, "takes_steps", False)):
            raise ValueError(
                "prediction 'mean_velocity' needs clip=False, because estimates of a step are no "
                "clean data, and a network of type 'flow_map', which is told where a step leads; "
                f"got clip={clip} and {type(network).__name__}"
            )
        if prediction in ("eps", "edm") and process.alpha(torch.ones(1)).item() <= 0:
            raise ValueError(
                f"prediction {prediction!r} cannot recover x0 at t = 1, where {process.type!r} has "
                "alpha = 0; use 'velocity', 'v' or 'x0'"
            )
        _warn_of_signal(process)
        self.network = network
        self.encoder = nn.Flatten(1) if encoder is None else encoder
        self.process = process
        self.prediction = prediction
        self.clip = clip
        self.data_std = data_std

    def encode(self, obs: Any) -> Tensor:
        out: Tensor = self.encoder(obs)
        return out

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(c_x, c_out, c_in, network time)`` at levels ``t``, in the dtype of ``t``."""
        process = self.process
        alpha, sigma = process.alpha(t), process.sigma(t)
        time, c_in = process.network_time(t), process.input_scale(t)
        if self.prediction == "eps":
            return 1 / alpha, -sigma / alpha, c_in, time
        if self.prediction == "v":
            norm = alpha.square() + sigma.square()
            return alpha / norm, -sigma / norm, c_in, time
        if self.prediction == "x0":
            return torch.zeros_like(t), torch.ones_like(t), c_in, time
        if self.prediction in ("velocity", "mean_velocity"):
            return torch.ones_like(t), -sigma, c_in, time
        ratio, sd = sigma / alpha, self.data_std
        total = ratio.square() + sd**2
        return (
            sd**2 / total / alpha,
            ratio * sd * total.rsqrt(),
            total.rsqrt() / alpha,
            ratio.clamp_min(1e-5).log() / 4,
        )

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should output for ``x0`` noised to ``t``: the target of training.

        It is ``[B, H, D]`` and defined at both ends of the clock.
        """
        if self.prediction == "eps":
            return noise
        if self.prediction == "x0":
            return x0
        if self.prediction in ("velocity", "mean_velocity"):
            return noise - x0
        if self.prediction == "v":
            return self.process.alpha(t) * noise - self.process.sigma(t) * x0
        # edm: (x0 - c_x x_t) / c_out, divided out, because at t = 0 that is 0 / 0.
        ratio, sd = self.process.sigma(t) / self.process.alpha(t), self.data_std
        return (ratio / sd * x0 - sd * noise) * (ratio.square() + sd**2).rsqrt()

    def raw(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None
    ) -> Tensor:
        """The network's own output ``[B, H, D]`` at ``x_t``: what the denoising loss regresses.

        ``s`` is the level that a step leads to, of prediction ``mean_velocity``; None: ``t``.
        """
        _, _, c_in, time = self.coefficients(t)
        output: Tensor = self.network(c_in * x_t, time, cond, **self._told(time, s))
        return output

    def forward(
        self, x_t: Tensor, t: Tensor, cond: Tensor | None = None, s: Tensor | None = None
    ) -> Denoised:
        c_x, c_out, c_in, time = (c.to(x_t.dtype) for c in self.coefficients(t))
        output = self._run(c_in * x_t, time, cond, **self._told(time, s))
        return self._finish(x_t, c_x, c_out, output)

    def _told(self, time: Tensor, s: Tensor | None) -> dict[str, Tensor]:
        """What a network is told of a step beside its own time."""
        if s is None or self.prediction != "mean_velocity":
            return {}
        network: Any = self.network
        return {"time_emb": network.embed_time(time, self.process.network_time(s).to(time))}

    @property
    def _run(self) -> Callable[..., Tensor | tuple[Tensor, Mapping[str, Tensor]]]:
        """The network, with its further heads if it has any (confidences)."""
        run: Callable[..., Tensor | tuple[Tensor, Mapping[str, Tensor]]]
        run = getattr(self.network, "with_aux", self.network)
        return run

    def _finish(
        self,
        x_t: Tensor,
        c_x: Tensor,
        c_out: Tensor,
        output: Tensor | tuple[Tensor, Mapping[str, Tensor]],
    ) -> Denoised:
        output, aux = output if isinstance(output, tuple) else (output, {})
        x0_hat = torch.addcmul(c_x * x_t, c_out, output)
        return Denoised(x0_hat.clamp(-1, 1) if self.clip else x0_hat, aux)

    def on_grid(self, t: Tensor, s: Tensor | None = None) -> GridDenoise:
        network: DenoiserNetwork = self.network  # type: ignore[assignment]
        like = next(self.network.parameters())
        host = torch.stack(
            [*self.coefficients(t), self.process.network_time(t if s is None else s)]
        )
        scaled = bool((host[2] != 1).any())  # most processes leave the network's input alone
        constants = host.to(like.device, like.dtype, non_blocking=True)
        c_x, c_out, c_in, time, end = constants.unbind(0)
        steps = () if self.prediction != "mean_velocity" else (end.flatten(0, 1),)
        embedded = network.embed_time(time.flatten(0, 1), *steps)
        embedded = embedded.view(*t.shape[:2], *embedded.shape[1:])
        return _NetworkOnGrid(self, (c_x, c_out, c_in, time, embedded), scaled=scaled)

    def check_t(self, t: Tensor) -> None:
        kind = t_kind(t)
        kinds: frozenset[str] = self.network.t_kinds  # type: ignore[assignment]
        if kind not in kinds:
            does = f"mlp with t_kind={kind!r}" + (", or modalities" if kind == "dim" else "")
            raise ValueError(
                f"{type(self.network).__name__} takes levels per {sorted(kinds)}, not per {kind} "
                f"(t {tuple(t.shape)}); choose a network that does, such as {does}"
            )


def _warn_of_signal(process: GaussianProcess) -> None:
    """Say so where the prior is not what the process ends at."""
    one = torch.ones((), dtype=torch.float64)
    alpha, sigma = float(process.alpha(one)), float(process.sigma(one))
    if alpha > MAX_SIGNAL * sigma:
        warnings.warn(
            f"process {process.type!r} ends at alpha = {alpha:.2f}, sigma = {sigma:.2f}: plans are "
            "sampled from pure noise, which it never reaches, and will be biased towards 0. Let it "
            "go further (more or larger betas, smaller alpha_min, larger beta_max or sigma_max; "
            "ddpm_linear without beta_start and beta_end does), unless weights trained so are "
            "being imported",
            stacklevel=3,
        )


class _NetworkOnGrid:
    """A network at the levels of a grid; what does not depend on the state is computed once."""

    MAX_ROWS = 8192  # modulations kept at a time: levels times batch

    def __init__(self, denoiser: Denoiser, columns: tuple[Tensor, ...], *, scaled: bool) -> None:
        self._denoiser, self._network, self._columns = denoiser, denoiser.network, columns
        self._rows = list(zip(*(column.unbind(0) for column in columns), strict=True))
        self._scaled, self._run = scaled, denoiser._run

    def modulations(self, x: Tensor, cond: Tensor | None) -> Sequence[Tensor] | None:
        """The network's modulation by ``cond`` per level; None if it has no such part."""
        modulate = getattr(self._network, "modulate", None)
        if modulate is None or len(x) * len(self._rows) > self.MAX_ROWS:
            return None
        film: Tensor = modulate(self._columns[-1], cond)
        return film.unbind(0)

    def __call__(
        self, row: int | Tensor, x: Tensor, cond: Tensor | None, film: Tensor | None = None
    ) -> Denoised:
        if isinstance(row, Tensor):  # in a graph whose step is repeated
            constants: Sequence[Tensor] = [column[row] for column in self._columns]
        else:
            constants = self._rows[row]
        c_x, c_out, c_in, time, time_emb = constants
        given = {"time_emb": time_emb} if film is None else {"film": film}
        output = self._run(c_in * x if self._scaled else x, time, cond, **given)
        return self._denoiser._finish(x, c_x, c_out, output)


def t_kind(t: Tensor) -> str:
    """How finely a level tensor ``[B, H or 1, D or 1]`` varies: per row, position or dim."""
    if t.dim() != 3 or (t.shape[1] > 1 and t.shape[2] > 1):
        raise ValueError(
            f"a level tensor must be [B, 1, 1], [B, H, 1] or [B, 1, D], got {tuple(t.shape)}"
        )
    if t.shape[1] > 1:
        return "position"
    return "dim" if t.shape[2] > 1 else "row"
