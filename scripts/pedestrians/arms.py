"""Pedestrian prediction on ETH/UCY: truncated diffusion beside vanilla diffusion, trained alike.

Both arms get the same network, data, steps and batches. The vanilla arm draws 20 samples of a full
diffusion; the truncated arm refines 20 anchors with 2 network evaluations. Everything is fitted to
the training scenes alone.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffpolicy.core.denoiser import Denoiser
from diffpolicy.core.processes import make_process
from diffpolicy.core.sampler import Sampler
from diffpolicy.core.sampling import sample
from diffpolicy.core.solvers import DDIM
from diffpolicy.core.starts import levels, prior_start, truncated_start
from diffpolicy.data.normalize import Normalizer
from diffpolicy.learn.cloning.anchored import AnchoredLoss
from diffpolicy.learn.cloning.denoising import DenoisingLoss
from diffpolicy.networks import make_network
from diffpolicy.policies.anchors import Anchors
from diffpolicy.training.settings import TrainerConfig, mix_seed
from diffpolicy.training.trainer import Trainer
from pedestrians.diversity import footprint_diversity, mean_pairwise_distance
from pedestrians.scenes import OBSERVED, PREDICTED, Trajectories

SAMPLES = 20
RADIUS = 0.3  # metres: half the width of a person, for the footprints
Predict = Callable[[Tensor, torch.Generator], Tensor]  # obs [n, 8, 2] -> plans [n, 20, 12, 2]


@dataclass(frozen=True)
class Settings:
    """What the arms share, and what was tuned for each on pedestrians held out of training scenes.

    Args:
        steps: optimiser steps.
        batch_size: examples a step.
        width: of the MLP.
        depth: of the MLP.
        vanilla_lr: learning rate.
        vanilla_prediction: what the network outputs.
        vanilla_steps: network evaluations per sample.
        truncated_lr: learning rate.
        anchors: clusters.
        top_m: of them offered per pedestrian (None: all, then there must be 20).
        t_start: level of the anchors (None: from their quantisation error).
        num_steps: network evaluations from there.
        class_weight: of the classification.
        reconstruction: ``l1`` or ``l2``.
        negatives: wrong anchors scored per example.
    """

    steps: int = 2500
    batch_size: int = 128
    width: int = 128
    depth: int = 3
    vanilla_lr: float = 1e-3
    vanilla_prediction: str = "x0"
    vanilla_steps: int = 20
    truncated_lr: float = 1e-3
    anchors: int = 20
    top_m: int | None = None
    t_start: float | None = None
    num_steps: int = 2
    class_weight: float = 1.0
    reconstruction: str = "l1"
    negatives: int = 1


@dataclass(frozen=True)
class Arm:
    """A trained predictor.

    Attributes:
        predict: raw observations ``[n, 8, 2]`` to 20 plans each in metres ``[n, 20, 12, 2]``.
        nfe: network evaluations.
        facts: numbers to report.
    """

    predict: Predict
    nfe: int
    facts: Mapping[str, float]


def normalizer_of(data: Trajectories) -> Normalizer:
    """Zero mean, unit variance per direction."""
    return Normalizer.fit(data.statistics(), {"obs": "gaussian", "action": "gaussian"})


def train_vanilla(data: Trajectories, settings: Settings, seed: int) -> dict[str, Arm]:
    """A diffusion policy on the pedestrians: arms ``ddim`` and ``ddpm`` of one network."""
    normalizer = normalizer_of(data)
    torch.manual_seed(mix_seed(seed, 0xE7))
    network = make_network(_mlp(settings))
    process = make_process("vp_cosine")
    denoiser = Denoiser(network, process, settings.vanilla_prediction)
    seconds = _train(DenoisingLoss(denoiser), data, normalizer, settings.vanilla_lr, settings, seed)

    def predictor(eta: float) -> Predict:
        def predict(obs: Tensor, generator: torch.Generator) -> Tensor:
            cond = normalizer.normalize("obs", obs).flatten(1).repeat_interleave(SAMPLES, 0)
            start = prior_start(process, torch.randn(len(cond), PREDICTED, 2, generator=generator))
            grid = levels(start, settings.vanilla_steps, process=process)
            x = sample(denoiser, DDIM(eta=eta), start, grid, cond=cond, generator=generator)
            assert isinstance(x, Tensor)  # what record=False returns
            return normalizer.unnormalize("action", x).view(-1, SAMPLES, PREDICTED, 2)

        return predict

    facts = {"train_s": seconds, "parameters": network.num_parameters()}
    return {
        name: Arm(predictor(eta), settings.vanilla_steps, facts)
        for name, eta in (("ddim", 0.0), ("ddpm", 1.0))
    }


def train_truncated(data: Trajectories, settings: Settings, seed: int) -> dict[str, Arm]:
    """An anchored diffusion policy: arm ``truncated``."""
    normalizer = normalizer_of(data)
    source = replace(data, normalizer=normalizer)
    began = time.perf_counter()
    anchors = Anchors.fit(
        source, normalizer, count=settings.anchors, top_m=settings.top_m, seed=seed
    )
    fit_s = time.perf_counter() - began
    if anchors.count != SAMPLES:
        raise ValueError(f"{anchors.count} anchors per pedestrian; the protocol needs {SAMPLES}")
    process = make_process("vp_cosine")
    t_start = anchors.default_t_start(process) if settings.t_start is None else settings.t_start
    torch.manual_seed(mix_seed(seed, 0xE7))
    mlp = _mlp(settings)
    sizes = {name: mlp.pop(name) for name in ("horizon", "dim", "cond_dim")}
    network = make_network({"type": "anchored", **sizes, "base": mlp})
    denoiser = Denoiser(network, process, "x0")

    def guesses(obs: Tensor, cond: Tensor | None) -> Tensor:
        return anchors.guesses_normalised(obs, normalizer)[0]

    loss = AnchoredLoss(
        denoiser,
        guesses,
        t_max=t_start,
        class_weight=settings.class_weight,
        recon_weight=1.0,
        classification="bce",
        reconstruction=settings.reconstruction,
        negatives=settings.negatives,
    )
    seconds = _train(loss, data, normalizer, settings.truncated_lr, settings, seed)

    def predict(obs: Tensor, generator: torch.Generator) -> Tensor:
        guess, _ = anchors.guesses(obs, normalizer)
        noise = torch.randn(guess.shape, generator=generator)
        cond = normalizer.normalize("obs", obs).flatten(1)
        start = truncated_start(denoiser.process, guess.flatten(0, 1), t_start, noise.flatten(0, 1))
        rows = cond.repeat_interleave(guess.shape[1], dim=0)
        plans = Sampler(num_steps=settings.num_steps).draw(denoiser, start, cond=rows)
        return normalizer.unnormalize("action", plans.view(guess.shape))

    facts = {
        "train_s": seconds,
        "anchors_s": fit_s,
        "parameters": network.num_parameters(),
        "quantisation_error": anchors.error,
        "t_start": t_start,
    }
    return {"truncated": Arm(predict, settings.num_steps, facts)}


TRAINERS = {"vanilla": train_vanilla, "truncated": train_truncated}


def _mlp(settings: Settings) -> dict[str, Any]:
    return {
        "type": "mlp",
        "horizon": PREDICTED,
        "dim": 2,
        "cond_dim": 2 * OBSERVED,
        "width": settings.width,
        "depth": settings.depth,
    }


def _train(
    objective: DenoisingLoss | AnchoredLoss,
    data: Trajectories,
    normalizer: Normalizer,
    lr: float,
    settings: Settings,
    seed: int,
) -> float:
    """Train, and leave the averaged weights in the objective; seconds."""
    config = TrainerConfig(
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=lr,
        warmup_steps=min(200, settings.steps // 10),
        seed=seed,
        checkpoint_every=None,
        log_every=500,
        progress=False,
    )
    with tempfile.TemporaryDirectory(prefix="eth_ucy-") as folder:
        source = replace(data, normalizer=normalizer)
        result = Trainer(objective, source, config, folder).fit()
    objective.load_state_dict(dict(result.ema))
    objective.eval()
    return result.train_s


@torch.inference_mode()
def score(arm: Arm, data: Trajectories, seed: int, *, chunk: int = 256) -> dict[str, float]:
    """Errors in metres, diversity and latency of an arm on held-out pedestrians.

    ``min_ade``: mean over examples of the least mean distance of 20 plans to the truth, and
    ``min_fde`` the least final distance. ``footprint_diversity`` is measured on at most 400
    examples; ``ms`` is one pedestrian's 20 plans.
    """
    generator = torch.Generator().manual_seed(mix_seed(seed, 0x5C0))
    plans = torch.cat([arm.predict(obs, generator) for obs in torch.split(data.observed, chunk)])
    distance = (plans - data.future[:, None]).norm(dim=-1)  # [n, 20, 12]
    few = torch.linspace(0, len(plans) - 1, min(400, len(plans))).long()
    one = data.observed[:1]
    times = []
    for _ in range(30):
        began = time.perf_counter()
        arm.predict(one, generator)
        times.append(time.perf_counter() - began)
    return {
        "min_ade": distance.mean(-1).amin(1).mean().item(),
        "min_fde": distance[..., -1].amin(1).mean().item(),
        "ade_mean": distance.mean().item(),
        "pairwise_m": (mean_pairwise_distance(plans) * math.sqrt(2)).mean().item(),
        "footprint_diversity": footprint_diversity(plans[few], radius=RADIUS).mean().item(),
        "nfe": arm.nfe,
        "ms": 1e3 * sorted(times)[len(times) // 2],
        "examples": len(plans),
    }
