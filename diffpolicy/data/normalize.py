"""Normalisers: an affine map per field, fitted once and frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffpolicy.settings import check_choice, check_shape

Mode = Literal["minmax", "gaussian", "quantile", "identity"]
MODES: tuple[Mode, ...] = get_args(Mode)
# Dimensions whose values span less than this are constant: dividing by the span would only blow up
# sensor noise (the same threshold as Diffusion Policy's).
CONSTANT_RANGE = 1e-4
_AFFINE = ("scale", "offset")
_PARTS = ("min", "max", "mean", "std", "q01", "q99")
X = TypeVar("X", Tensor, NDArray[Any])


class Normalizer:
    """A frozen affine map per field: ``normalised = x * scale + offset``.

    Fields have the names that they have in stores, such as ``obs``, ``obs.joints``, ``action``.

    Modes:

    - ``minmax``: the data's minimum and maximum become -1 and 1.
    - ``quantile``: the 1 % and 99 % quantiles become -1 and 1; the tails lie outside. A dimension
      whose quantiles coincide although its range does not (a rare flag) is mapped as by ``minmax``.
    - ``gaussian``: mean 0, standard deviation 1.
    - ``identity``: unchanged.

    A dimension whose range is below 1e-4 is constant: its scale is 1 and its constant becomes 0.

    Build one with :meth:`fit`` or :meth:``from_parts`; nothing about it changes afterwards.

    Args:
        modes: The mode of each field.
        scale: Per field, float32, of the shape of one row; nowhere zero.
        offset: Per field, the same shapes.
        others: Normalisers of the same fields for other data, by name: those of each store that a
            policy was trained on, where each has its own. :meth:`named` chooses one.

    Raises:
        ValueError: Unknown mode, fields that differ, shapes that differ, or a scale or offset that
            is not finite or a scale that is zero.
    """

    def __init__(
        self,
        modes: Mapping[str, Mode],
        scale: Mapping[str, Tensor],
        offset: Mapping[str, Tensor],
        others: Mapping[str, Normalizer] | None = None,
    ) -> None:
        if not set(modes) == set(scale) == set(offset):
            got = f"{sorted(modes)}, {sorted(scale)} and {sorted(offset)}"
            raise ValueError(f"mode, scale and offset must be of the same fields; got {got}")
        for field, mode in modes.items():
            check_choice(f"mode of field {field!r}:", mode, MODES)
            _check_affine(field, scale[field], offset[field])
        self._modes, self.others = dict(modes), dict(others or {})
        self._scale = {k: scale[k].detach().to(torch.float32).contiguous() for k in modes}
        self._offset = {k: offset[k].detach().to(torch.float32).contiguous() for k in modes}
        # Environments speak numpy: keep the host copies, so that no call converts.
        self._numpy = {
            k: (self._scale[k].cpu().numpy(), self._offset[k].cpu().numpy()) for k in modes
        }

    @classmethod
    def fit(
        cls, statistics: Mapping[str, Mapping[str, Any]], modes: Mapping[str, Mode]
    ) -> Normalizer:
        """Fit to a store's statistics.

        Args:
            statistics: Per field ``min``, ``max``, ``mean``, ``std``, ``q01``, ``q99``, as
                ``EpisodeStore`` keeps them.
            modes: The fields to normalise, and how.

        Returns:
            The normaliser.

        Raises:
            ValueError: A field without statistics, an unknown mode, or statistics that are not
                finite.
        """
        scale, offset = {}, {}
        for field, mode in modes.items():
            if field not in statistics:
                known = sorted(statistics)
                raise ValueError(f"no statistics for field {field!r}; there are some for {known}")
            a, b = _fit_field(field, statistics[field], mode)
            scale[field], offset[field] = torch.from_numpy(a), torch.from_numpy(b)
        return cls(modes, scale, offset)

    @classmethod
    def from_parts(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Normalizer:
        """Rebuild from what :meth:`to_config`` and :meth:``to_tensors` returned.

        Args:
            config: ``{"fields": {name: {"mode": ..., "shape": [...]}}}``, and ``others`` by name.
            tensors: ``{"name.scale": ..., "name.offset": ...}``, of others after ``"OTHER/"``.

        Returns:
            The normaliser, on the tensors' device.

        Raises:
            ValueError: A tensor is missing, or its shape is not the config's.
        """
        fields = config["fields"]
        for key, part in ((f"{k}.{kind}", v) for k, v in fields.items() for kind in _AFFINE):
            got = list(tensors[key].shape) if key in tensors else "none"
            if got != list(part["shape"]):
                raise ValueError(
                    f"normaliser tensor {key!r} must have shape {list(part['shape'])}, as its "
                    f"config says; got {got}: the two files do not belong together"
                )
        scale, offset = ({k: tensors[f"{k}.{kind}"] for k in fields} for kind in _AFFINE)
        others = {
            name: cls.from_parts(
                part,
                {k[len(name) + 1 :]: v for k, v in tensors.items() if k.startswith(f"{name}/")},
            )
            for name, part in config.get("others", {}).items()
        }
        return cls({k: part["mode"] for k, part in fields.items()}, scale, offset, others)

    @classmethod
    def of_each(cls, normalizers: Mapping[str, Normalizer]) -> Normalizer:
        """Return the first of some normalisers, with all of them as its ``others``."""
        return cls({}, {}, {}, normalizers).named(next(iter(normalizers)))

    def named(self, name: str) -> Normalizer:
        """Return the normaliser of this name, with the same ``others``.

        Raises:
            ValueError: There is none.
        """
        check_choice("normalizer", name, self.others or ["(there is one for all data)"])
        chosen = copy.copy(self.others[name])
        chosen.others = dict(self.others)
        return chosen

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields it knows."""
        return tuple(self._modes)

    @property
    def modes(self) -> dict[str, Mode]:
        """The mode of each field (a copy)."""
        return dict(self._modes)

    def shape(self, field: str) -> tuple[int, ...]:
        """Return the shape of one row of ``field``."""
        return tuple(self._scale[self._known(field)].shape)

    def is_unit_range(self, field: str) -> bool:
        """Return whether fitted data lie in [-1, 1] once normalised: those of ``minmax``."""
        return self._modes[self._known(field)] == "minmax"

    def normalize(self, field: str, x: X) -> X:
        """Map from data units.

        Args:
            field: The field.
            x: ``[..., *shape]``, tensor or array, on the normaliser's device.

        Returns:
            ``x * scale + offset``, of x's kind.

        Raises:
            ValueError: An unknown field, or a shape that does not end in the field's.
        """
        scale, offset = self._parts(field, x)
        y: X = x * scale + offset
        return y

    def unnormalize(self, field: str, x: X) -> X:
        """Map back to data units: the inverse of :meth:`normalize`, with the same arguments."""
        scale, offset = self._parts(field, x)
        y: X = (x - offset) / scale
        return y

    def normalize_obs(self, obs: Any) -> Any:
        """Normalise an observation: one array by ``obs``, arrays by name each by ``obs.NAME``.

        What it was not fitted to (images) stays as it is.
        """
        return self._of_obs(self.normalize, obs)

    def unnormalize_obs(self, obs: Any) -> Any:
        """Map an observation back to data units: the inverse of :meth:`normalize_obs`."""
        return self._of_obs(self.unnormalize, obs)

    def _of_obs(self, how: Callable[[str, Any], Any], obs: Any) -> Any:
        if not isinstance(obs, Mapping):
            return obs if "obs" not in self._modes and _is_image(obs) else how("obs", obs)
        known = {name: f"obs.{name}" in self._modes for name in obs}
        return {name: how(f"obs.{name}", x) if known[name] else x for name, x in obs.items()}

    def scaled(self, field: str, dim: int, factor: float) -> Normalizer:
        """Return a normaliser with one dimension of a field's range multiplied by ``factor``.

        Args:
            field: A field whose rows are vectors.
            dim: The dimension.
            factor: In (0, 1], so that data in [-1, 1] stay there.

        Raises:
            ValueError: An unknown field, a dimension it does not have, or a factor out of range.
        """
        size = self.shape(field)
        if len(size) != 1 or not 0 <= dim < size[0] or not 0 < factor <= 1:
            raise ValueError(f"cannot scale dimension {dim} of {field!r} {list(size)} by {factor}")
        gain = torch.ones_like(self._scale[field])
        gain[dim] = factor
        scale, offset = (
            {**parts, field: parts[field] * gain} for parts in (self._scale, self._offset)
        )
        others = {name: other.scaled(field, dim, factor) for name, other in self.others.items()}
        return Normalizer(self._modes, scale, offset, others)

    def without(self, field: str) -> Normalizer:
        """Return a normaliser that does not know a field."""
        kept = {name: mode for name, mode in self._modes.items() if name != field}
        scale, offset = ({k: v[k] for k in kept} for v in (self._scale, self._offset))
        others = {name: other.without(field) for name, other in self.others.items()}
        return Normalizer(kept, scale, offset, others)

    def to(self, device: torch.device | str) -> Normalizer:
        """Return the same normaliser with its tensors on ``device``."""
        other = copy.copy(self)  # with its copies on the host, and checked already
        other._scale = {k: v.to(device) for k, v in self._scale.items()}
        other._offset = {k: v.to(device) for k, v in self._offset.items()}
        other.others = {name: one.to(device) for name, one in self.others.items()}
        return other

    def to_tensors(self) -> dict[str, Tensor]:
        """Return ``{"obs.scale": ..., "obs.offset": ..., ...}``, for a safetensors file."""
        scales = {f"{k}.scale": v for k, v in self._scale.items()}
        others = {
            f"{name}/{key}": value.clone()  # the chosen one's are its own, too: files hold no alias
            for name, one in self.others.items()
            for key, value in one.to_tensors().items()
        }
        return scales | {f"{k}.offset": v for k, v in self._offset.items()} | others

    def identity(self) -> dict[str, Any]:
        """Return what this normaliser is, for telling one training run from another."""
        return {**self._modes, **self.to_tensors()}

    def to_config(self) -> dict[str, Any]:
        """Return the JSON half: mode and shape of each field."""
        shapes = {k: list(v.shape) for k, v in self._scale.items()}
        own = {"fields": {k: {"mode": m, "shape": shapes[k]} for k, m in self._modes.items()}}
        others = {name: other.to_config() for name, other in self.others.items()}
        return {**own, **({"others": others} if others else {})}

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}: {m} {list(self._scale[k].shape)}" for k, m in self._modes.items())
        return f"Normalizer({inner})"

    def _known(self, field: str) -> str:
        if field not in self._modes:
            known = sorted(self._modes)
            raise ValueError(f"the normaliser has no field {field!r}; it was fitted to {known}")
        return field

    def _parts(self, field: str, x: Tensor | NDArray[Any]) -> tuple[Any, Any]:
        shape = self._scale[self._known(field)].shape
        if tuple(x.shape[x.ndim - len(shape) :]) != tuple(shape) or x.ndim < len(shape):
            fitted = f"field {field!r} was fitted to rows of shape {list(shape)}"
            raise ValueError(f"{fitted}; got an array of shape {list(x.shape)}")
        if isinstance(x, np.ndarray):
            return self._numpy[field]
        return self._scale[field], self._offset[field]


def _is_image(array: Any) -> bool:
    """Whether an array or tensor holds bytes."""
    return str(array.dtype).endswith("uint8")


def _check_affine(field: str, scale: Tensor, offset: Tensor) -> None:
    check_shape(f"the offset of field {field!r}", offset.shape, scale.shape)
    usable = torch.isfinite(scale) & torch.isfinite(offset) & (scale != 0)
    if not bool(usable.all()):
        raise ValueError(f"scale and offset of {field!r} must be finite and the scale not zero")


def _fit_field(
    field: str, statistics: Mapping[str, Any], mode: Mode
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    parts = [np.asarray(statistics[k], dtype=np.float64) for k in _PARTS]
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError(f"the statistics of {field!r} are not finite; run `diffpolicy data check`")
    low, high, mean, std, q01, q99 = parts
    if mode == "identity":
        return np.ones(low.shape, np.float32), np.zeros(low.shape, np.float32)
    constant = high - low < CONSTANT_RANGE
    if mode == "quantile":
        usable = q99 - q01 >= CONSTANT_RANGE
        low, high = np.where(usable, q01, low), np.where(usable, q99, high)
    center, half = (mean, std) if mode == "gaussian" else ((low + high) / 2, (high - low) / 2)
    scale = np.where(constant, 1.0, 1.0 / np.where(constant, 1.0, half))
    return np.asarray(scale, np.float32), np.asarray(-center * scale, np.float32)
