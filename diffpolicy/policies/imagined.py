"""What a policy imagines beside its actions: later observations, as entries of its plans.

Prediction with action (PAD, Guo et al. 2024, "Prediction with Action: Visual Policy Learning via
Joint Denoising Process"): one denoiser draws what will be seen together with what is done. Each of
the two has a noise level of its own (Bao et al. 2023, UniDiffuser), so that episodes without
actions teach it too, and the actions can be drawn alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffpolicy.data.blocks import row_blocks
from diffpolicy.data.fields import FieldSpec, check_has
from diffpolicy.data.normalize import Normalizer
from diffpolicy.data.store import EpisodeStore
from diffpolicy.guidance.layout import Layout
from diffpolicy.policies.base import Array
from diffpolicy.settings import check_choice, check_range, named_settings

if TYPE_CHECKING:
    from diffpolicy.policies.spec import PolicySpec

PREDICTS = ("action", "joint")
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: what of red, green and blue makes grey


@named_settings
@dataclass(frozen=True)
class Imagined:
    """The observations in plans of layout ``"joint"``.

    Of images small copies are imagined, of vectors the normalised values. ``frames`` of them are
    spread over the plan: with H positions, frame i is the one of position ``(i + 1) H / frames -
    1``, and its entries lie on that position and the ``H / frames - 1`` before it.

    Args:
        field: of the store: ``"obs"``, ``"obs.NAME"``, or any other field, which the policy then
            does not observe.
        size: of images: pixels of a side.
        grey: of images: one channel in place of three.
        frames: how many observations a plan holds, a divisor of H; None: one per position.
        predict: when acting: ``"action"`` holds what is imagined at pure noise and draws the
            actions alone; ``"joint"`` draws both, and films show the images.
        shape: of one row of the field; taken from the store.

    Raises:
        ValueError: a value out of range, or a field that is neither a vector nor images of bytes.
    """

    field: str = "obs"
    size: int = 24
    grey: bool = False
    frames: int | None = None
    predict: str = "action"
    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("imagined.predict", self.predict, PREDICTS)
        check_range("[1, inf)", **{"imagined.size": self.size, "imagined.frames": self.frames})
        if self.shape is not None:
            sides, colours = len(self.shape), (*self.shape, 1, 1)[2]
            if sides not in (1, 2, 3) or (sides == 3 and colours not in (1, 3)):
                raise ValueError(
                    f"imagined are vectors, or images [height, width] or [height, width, 1 or 3]; "
                    f"imagined.field={self.field!r} has rows of shape {list(self.shape)}"
                )

    @property
    def is_image(self) -> bool:
        """Whether images are imagined."""
        return self.shape is not None and len(self.shape) > 1

    @property
    def vectors(self) -> tuple[str, ...]:
        """The field, where it is of vectors: it is normalised as the store's statistics say."""
        return () if self.is_image else (self.field,)

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Of one imagined observation: ``(size, size, channels)``, or a vector's own."""
        assert self.shape is not None
        if not self.is_image:
            return self.shape
        colours = 1 if self.grey or len(self.shape) == 2 else self.shape[2]
        return self.size, self.size, colours

    def stride(self, horizon: int) -> int:
        """Positions that one frame's entries lie on.

        Raises:
            ValueError: frames that do not divide the horizon.
        """
        frames = horizon if self.frames is None else self.frames
        if horizon % frames:
            raise ValueError(f"imagined.frames={frames} must divide horizon={horizon}")
        return horizon // frames

    def dim(self, horizon: int) -> int:
        """Entries of one position; 1 while there is no store to tell.

        Raises:
            ValueError: a frame whose entries cannot be spread evenly.
        """
        stride = self.stride(horizon)
        if self.shape is None:
            return 1
        entries = math.prod(self.frame_shape)
        if entries % stride:
            raise ValueError(
                f"a frame of {entries} entries cannot be spread over {stride} positions evenly; "
                "choose another imagined.size or imagined.frames"
            )
        return entries // stride

    def rows(self, store: EpisodeStore, normalizer: Normalizer) -> Array:
        """All rows of the field as they are imagined.

        Returns:
            float32 ``[T, F]``, normalised; or of images uint8 ``[T, size, size * channels]``.
        """
        check_has(store.name, [self.field], store.fields, ": imagined.field names one that it has")
        if not self.is_image:
            values = torch.from_numpy(store.read(self.field).astype(np.float32, copy=False))
            vectors: Array = normalizer.normalize(self.field, values).numpy()
            return vectors
        blocks = (store.read(self.field, *ends) for ends in row_blocks(store, self.field))
        return np.concatenate([self._small(torch.from_numpy(block)).numpy() for block in blocks])

    def _small(self, images: Tensor) -> Tensor:
        """Images ``[n, h, w(, c)]``, averaged over areas: uint8 ``[n, size, size * channels]``."""
        colour = images.unsqueeze(-1) if images.dim() == 3 else images
        planes = colour.permute(0, 3, 1, 2).float()
        if self.frame_shape[2] == 1 and planes.shape[1] == 3:
            planes = (planes * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
        small = F.adaptive_avg_pool2d(planes, self.size).round().to(torch.uint8)
        return small.permute(0, 2, 3, 1).flatten(2)

    def entries(self, window: Tensor) -> Tensor:
        """Plan entries ``[B, H, F]`` of a window ``[B, H, ...]`` of :meth:`rows`."""
        count, horizon = window.shape[:2]
        stride = self.stride(horizon)
        frames = window[:, stride - 1 :: stride]
        if not frames.is_floating_point():
            frames = frames.float() / 127.5 - 1
        return frames.reshape(count, horizon, -1)

    def held(self, grid: Tensor, layout: Layout) -> Tensor:
        """The levels ``[K + 1, 1, 1, 1]`` of a plan, or by entry where its parts' differ."""
        if self.predict == "joint":
            return grid
        imagined, action = layout.parts
        noise = torch.ones(*grid.shape[:-1], imagined, dtype=grid.dtype)
        return torch.cat([noise, grid.expand(*grid.shape[:-1], action)], dim=-1)

    def picture(self, plan: Array, position: int) -> Array:
        """The first frame of a plan at a position or later, uint8 ``[size, size, 3]``.

        Args:
            plan: normalised ``[H, F + A]``.
            position: 0..H; past the last frame it is that one.
        """
        horizon = len(plan)
        frames = plan[:, : self.dim(horizon)].reshape(-1, *self.frame_shape)
        frame = frames[min(position // self.stride(horizon), len(frames) - 1)]
        pixels = ((frame + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def check_imagined(spec: PolicySpec) -> None:
    """Raise ``ValueError`` for what goes without, or not with, imagined observations."""
    if (spec.imagined is None) != (spec.layout != "joint"):
        raise ValueError(
            f"layout 'joint' and imagined belong together (imagined={{field: obs}}); got layout="
            f"{spec.layout!r}, imagined={spec.imagined}"
        )
    if spec.imagined is None:
        return
    rti, joint = spec.rti, spec.imagined.predict == "joint"
    other = rti is not None and (isinstance(rti.t_start, tuple) or not rti.renoise)
    if spec.truncated is not None or other:
        raise ValueError(
            "plans of layout 'joint' start from noise, or by rti noised to one level: leave out "
            "truncated, give rti.t_start as one number, and rti.renoise=true"
        )
    if spec.temperature != 1 and not joint:
        raise ValueError(
            "what is held at pure noise must have its standard deviation: temperature=1, or "
            "imagined.predict=joint"
        )
    if rti is not None and joint and spec.imagined.stride(spec.horizon) > 1:
        raise ValueError(
            "the entries of a frame lie on several positions, so that a plan cannot be shifted: "
            "with rti set imagined.predict=action, or leave out imagined.frames"
        )
    network, (entries, _) = spec.network, spec.plan_layout.parts
    width = network.get("width", 64)
    if network.get("type") == "modalities" and spec.prediction != "x0" and entries > width:
        raise ValueError(
            f"noise of {entries} imagined entries does not pass through network.width={width}: set "
            f"prediction=x0, or network.width={entries}"
        )


def picture_of(policy: Any, state: Any, row: int) -> Array | None:
    """What a policy imagines that a row sees next, uint8 ``[h, w, 3]``: black if it has no plan.

    None: a policy that draws no images.
    """
    imagined = getattr(getattr(policy, "spec", None), "imagined", None)
    if imagined is None or not imagined.is_image or imagined.predict != "joint":
        return None
    seen: Array = imagined.picture(state.plan[row], int(state.cursor[row]))
    return seen if state.warm[row] else np.zeros_like(seen)


def shaped(imagined: dict[str, object], store: EpisodeStore) -> dict[str, object]:
    """Settings with the shape of their field, from the store.

    Raises:
        ValueError: no such field, or one that is neither a vector nor images of bytes.
    """
    name = str(imagined.get("field", Imagined.field))
    check_has(store.name, [name], store.fields, ": imagined.field names one that it has")
    if name == "action":
        raise ValueError("imagined.field is of what is seen, such as obs; a plan has the actions")
    spec: FieldSpec = store.fields[name]
    if not spec.is_image and len(spec.shape) != 1:
        raise ValueError(
            f"imagined are vectors or images of bytes; {name!r} of {store.name} has rows "
            f"{list(spec.shape)} of {spec.dtype}"
        )
    return {**imagined, "shape": spec.shape}
