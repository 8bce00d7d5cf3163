"""The levels that guesses are solved from, and what a policy needs to make them."""

from __future__ import annotations

import torch
from torch import Tensor

from diffpolicy.core.noise import GaussianProcess
from diffpolicy.core.starts import Start, levels, trained_level
from diffpolicy.policies.anchors import Anchors
from diffpolicy.policies.spec import PolicySpec
from diffpolicy.policies.truncated import Truncated


def truncated_grid(
    kind: str, settings: Truncated, anchors: Anchors | None, process: GaussianProcess
) -> tuple[Tensor, str]:
    """Levels and kind of start of a truncated policy's loops.

    A draft is the clean estimate at ``t = 1`` and a rank the one at ``rank_t``: one DDIM step each.
    """
    first, num_steps = {"draft": 1.0, "rank": settings.rank_t}.get(kind), 1
    if first is None:
        num_steps = settings.num_steps
        first = settings.t_start
        if first is None:
            assert anchors is not None
            first = anchors.default_t_start(process)
    t = trained_level(process, torch.full((1, 1, 1), first, dtype=torch.float64))
    grid = levels(
        Start(t, t), num_steps, spacing=settings.spacing, process=process, t_min=settings.t_min
    )
    return grid, "prior" if kind == "draft" else "noised"


def check_anchors(spec: PolicySpec, anchors: Anchors | None) -> None:
    """Raise ``ValueError`` unless truncated settings have the anchors they need."""
    settings = spec.truncated
    trained = spec.network.get("type") == "anchored"
    if trained and (settings is None or settings.rank != "confidence"):
        raise ValueError(
            "a network of type 'anchored' is trained near its anchors alone; set truncated with "
            "rank 'confidence'"
        )
    if settings is None:
        return
    if settings.rank == "confidence" and not trained:
        raise ValueError(
            "rank 'confidence' needs a network of type 'anchored'; use 'denoising' or 'prior'"
        )
    if spec.layout != "action" and (anchors is not None or "anchors" in settings.sources):
        raise ValueError(
            f"anchors are plans of actions; this policy's hold {spec.layout!r}. Use the sources "
            "'autoregressive', 'previous' or 'draft', and give t_start"
        )
    if anchors is None and ("anchors" in settings.sources or settings.t_start is None):
        raise ValueError(
            "truncated plans start from anchors; fit them with Anchors.fit(windows, normalizer) or "
            "`diffpolicy anchors`, or give t_start and other sources"
        )
    shape = (spec.horizon, spec.action_dim)
    if anchors is not None and tuple(anchors.plans.shape[1:]) != shape:
        raise ValueError(
            f"the anchors are plans of shape {list(anchors.plans.shape[1:])}, this policy's are "
            f"{list(shape)}"
        )
