"""The loss of PSO as a function of log-probabilities of moves, whoever made them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.learn.preferences.few_step import FewStep, Moves
from diffpolicy.learn.preferences.formulas import check_anchor

COMPARED = ("step", "path")


@dataclass(frozen=True, kw_only=True)
class Pairwise(FewStep):
    """PSO and the sampler whose moves it compares.

    With ``l_k = log p(x_next | x) - log p_ref(x_next | x)`` of step k, summed over the scored
    entries of an item, the loss of a pair is the mean over k of ``-log sigmoid(kl_beta (l_k(chosen)
    - l_k(rejected)))``, each ``l_k`` clamped. Released code takes the mean of log-probabilities
    over the D entries of a state instead: its ``beta = 50`` is ``kl_beta = 50 / D`` here (1.6 for
    16 actions of 2 numbers).

    ``compare="path"`` adds up ``l_k`` over steps first: the loss is then that of DPO on whole
    chains. With items labelled by a Bradley-Terry model of a reward r, which prefers 1 to 2 with
    chance ``sigmoid((r_1 - r_2) / s)``, its optimum is ``p_ref(chain) exp(r / (s kl_beta)) / Z``,
    with one Z per start and order of reveals, which the chains of a pair share. If Z depends on
    neither, as for a masked reference that is one law in every order, then the items have the law
    ``p_ref exp(r / (s kl_beta)) / Z``. Comparing steps has no such closed form. Where policy and
    reference agree its gradient is that of the chance to win against another draw of the policy
    (by REINFORCE), and it ends where clamps and ``kl_beta`` hold it. If the greater reward always
    wins, they alone do.

    Args:
        online: pairs are drawn from the policy and judged by a reward, rather than given.
        kl_beta: in sum units, positive; larger stays closer to the reference.
        clip: in (0, 1): ``exp(l_k / D)``, the ratio per scored entry (number or token; the
            geometric mean), is clamped to ``1 -+ clip``, and beyond it has no gradient. None: not
            clamped. That of released code, for any D.
        compare: ``"step"`` (as published) or ``"path"``.
        label_scale: online: None: the greater reward wins. A number s, in units of the reward: the
            loss is the expected one for labels with chance ``sigmoid((r_1 - r_2) / s)``.
        shared_start: online, of plans: both chains begin in the same noise.
        anchor_weight: of the behaviour-cloning error at the sampler's own levels that is added:
            mean squared error per entry (nats per token of sequences).
        anchor: what it is the error of: ``"demonstrations"`` (the chosen items, or those of the
            batch, where there are none), ``"chosen"``, or ``"both"``, the sum of what is there; the
            latter two of given pairs.

    Raises:
        ValueError: values out of range, unknown names.
    """

    online: bool = False
    kl_beta: float = 1.0
    clip: float | None = 0.1
    compare: str = "step"
    label_scale: float | None = None
    shared_start: bool = True
    anchor_weight: float = 0.0
    anchor: str = "demonstrations"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_anchor(self.anchor, self.anchor_weight)
        if self.online and self.anchor != "demonstrations":
            raise ValueError(
                "online PSO has no chosen items to clone but its own chains; set "
                "anchor='demonstrations'"
            )
        for name, holds, expected in (
            ("kl_beta", self.kl_beta > 0, "positive"),
            ("clip", self.clip is None or 0 < self.clip < 1, "in (0, 1), or None"),
            ("compare", self.compare in COMPARED, f"one of {COMPARED}"),
            ("label_scale", self.label_scale is None or self.label_scale > 0, "positive, or None"),
            ("anchor_weight", self.anchor_weight >= 0, "0 or more"),
        ):
            value = getattr(self, name)
            if not holds or (isinstance(value, float) and not math.isfinite(value)):
                raise ValueError(f"{name} must be {expected}, got {value!r}")
        if not self.online and self.label_scale is not None:
            raise ValueError(
                f"label_scale={self.label_scale} is of rewards, and given pairs are labelled; "
                "leave it None, or set online=True"
            )
        if not self.online and not self.shared_start:
            raise ValueError(
                "shared_start=False has no effect on given pairs, which share their noise; leave "
                "it True, or set online=True"
            )


def pairwise_loss(
    settings: Pairwise, policy: Moves, reference: Moves, chance: Tensor | None = None
) -> LossOutput:
    """The loss of pairs from log-probabilities of their moves.

    Args:
        settings: which loss.
        policy: of what is tuned, ``[2 B, K]``: the chosen chains, then the rejected ones.
        reference: the same of the reference.
        chance: that the chosen one is the better, ``[B]``; None: 1.

    Returns:
        ``loss [B]`` and the metrics that do not need rewards; see :class:`PairwiseLoss`.
    """
    ratio, entries = policy.log_p - reference.log_p, policy.entries
    if settings.compare == "path":
        ratio, entries = ratio.sum(1, keepdim=True), entries.sum(1, keepdim=True)
    clamped = ratio
    if settings.clip is not None:
        low, high = (entries * math.log(1 + side * settings.clip) for side in (-1, 1))
        clamped = ratio.clamp(low, high)
    chosen, rejected = clamped.chunk(2)
    logit = settings.kl_beta * (chosen - rejected)
    chance = logit.new_ones(len(logit)) if chance is None else chance.to(logit)
    each = F.softplus(-logit) + (1 - chance).unsqueeze(1) * logit
    counts = (entries.chunk(2)[0] > 0) & (entries.chunk(2)[1] > 0)
    loss = (each * counts).sum(1) / counts.sum(1).clamp_min(1)
    metrics = _metrics(policy, reference, logit.detach(), counts & (chance != 0.5).unsqueeze(1))
    moved = entries > 0
    beyond = (ratio.detach() != clamped.detach()) & moved
    metrics["saturated"] = beyond.sum() / moved.sum().clamp_min(1)
    return LossOutput(loss, metrics)


def _metrics(policy: Moves, reference: Moves, logit: Tensor, counts: Tensor) -> dict[str, Tensor]:
    log_p = policy.log_p.detach()
    ratio = (log_p - reference.log_p).sum(1)
    chosen, rejected = ratio.chunk(2)
    right = (0.5 + 0.5 * logit.sign()) * counts
    metrics = {
        "accuracy": right.sum() / counts.sum().clamp_min(1),
        "gap": (chosen - rejected).mean(),
        "log_ratio": ratio.mean(),
    }
    entries = policy.entries.sum(1).clamp_min(1)
    for values, suffix in ((log_p, ""), (reference.log_p, "_reference")):
        errors = (-values.sum(1) / entries).chunk(2)
        for name, error in zip(("chosen", "rejected"), errors, strict=True):
            metrics[f"error_{name}{suffix}"] = error.mean()
    return metrics


__all__ = ["Pairwise", "pairwise_loss"]
