"""What a stranger adds: a class, a registry line, a YAML; then every command has it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from diffpolicy import DiffusionPolicy, cli
from diffpolicy.data.preferences.records import Pair, Span
from diffpolicy.data.preferences.set import PreferenceSet
from diffpolicy.data.store import EpisodeStore
from diffpolicy.learn import METHODS, LossOutput, Method
from diffpolicy.learn.method import plan_shape

QUICK = [
    *("trainer.progress=false", "trainer.batch_size=8", "trainer.warmup_steps=1", "threads=1"),
    *("trainer.steps=3", "evaluation.episodes=0", "evaluation.val_episodes=0"),
]


@dataclass(frozen=True)
class Centred(Method):
    """A preference loss that is no function of four scores: it looks at all plans of a batch."""

    command: ClassVar[str] = "prefer"
    pull: float = 1.0

    def reads(self) -> frozenset[str]:
        return frozenset({"pairs"})

    def objective(self, denoiser: Any, material: Any) -> nn.Module:
        return CentredLoss(denoiser, self.pull)


class CentredLoss(nn.Module):
    def __init__(self, denoiser: Any, pull: float) -> None:
        super().__init__()
        self.denoiser, self.pull = denoiser, pull

    def forward(self, batch: Any, generator: torch.Generator) -> LossOutput:
        chosen = batch["chosen_action"].flatten(0, 1)
        cond = batch["chosen_obs"].flatten(0, 1).flatten(1)
        t = torch.full((len(chosen), 1, 1), 0.5, dtype=torch.float64)
        found = self.denoiser(torch.zeros_like(chosen), t, cond).x0_hat
        others = chosen.mean(0, keepdim=True)  # of the whole batch
        error = (found - chosen).square() + self.pull * (found - others).square()
        rows = error.flatten(1).mean(1).view(len(batch["chosen_action"]), -1).mean(1)
        return LossOutput(rows, {})


@dataclass(frozen=True)
class Straight(Method):
    """A reward method for plans: the reward of the clean estimate from pure noise."""

    command: ClassVar[str] = "tune"
    scale: float = 1.0

    def objective(self, denoiser: Any, material: Any) -> nn.Module:
        return StraightLoss(denoiser, material.reward, self.scale)


class StraightLoss(nn.Module):
    def __init__(self, denoiser: Any, reward: Any, scale: float) -> None:
        super().__init__()
        self.denoiser, self.reward, self.scale = denoiser, reward, scale

    def forward(self, batch: Any, generator: torch.Generator) -> LossOutput:
        cond = batch["cond"]
        noise = torch.randn(len(cond), *plan_shape(self.denoiser), generator=generator)
        t = torch.ones(len(cond), 1, 1, dtype=torch.float64)
        plan = self.denoiser(noise, t, cond).x0_hat
        return LossOutput(-self.scale * self.reward(plan, cond), {})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a policy, its demonstrations, and comparisons of their segments."""
    folder = tmp_path_factory.mktemp("strangers")
    rng = np.random.default_rng(0)
    fields = {"obs": rng.uniform(-1, 1, (120, 3)), "action": rng.uniform(-1, 1, (120, 1))}
    fields["reward"] = rng.uniform(-1, 1, 120)
    fields = {name: rows.astype(np.float32) for name, rows in fields.items()}
    store = EpisodeStore.from_arrays(fields, range(20, 121, 20), path=folder / "demos.zarr")
    pairs = PreferenceSet.create(folder / "pairs.jsonl", store)
    for episode in range(5):
        better, worse = (Span(episode, 0, 8),), (Span(episode + 1, 4, 8),)
        pairs.append(Pair(better, worse, source="me"))
    env = ["env.id=Pendulum-v1", "env.name=pendulum", "env.score=return"]
    shape = ["policy.prediction=v", "policy.horizon=6", "policy.n_action_steps=4"]
    small = ["network.width=16", "network.depth=1", "data=store"]
    where = [f"data.path={folder / 'demos.zarr'}", f"run_dir={folder / 'run'}"]
    assert cli.main(["train", *env, *shape, *small, *QUICK, *where]) == 0
    return folder


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return DiffusionPolicy.from_pretrained(path).denoiser.state_dict()


@pytest.mark.parametrize("kind", [Centred, Straight])
def test_a_method_of_a_stranger_has_every_door(kind, trained, tmp_path, monkeypatch, capsys):
    name = kind.__name__.lower()
    monkeypatch.setitem(METHODS, name, kind)
    (tmp_path / "method").mkdir()
    setting = "pull" if kind is Centred else "scale"
    text = f"# Of a stranger.\nname: {name}\ntype: {name}\n{setting}: 0.5\n"
    (tmp_path / "method" / f"{name}.yaml").write_text(text)
    run = tmp_path / "run"
    where = [f"pretrained={trained / 'run'}", f"run_dir={run}", "--config-dir", str(tmp_path)]
    judge = "judge={lookahead: 5, members: 1, width: 8, trainer: {steps: 3, batch_size: 8}}"
    data = [f"preferences={trained / 'pairs.jsonl'}", *([judge] if kind is Straight else [])]
    command = [kind.command, f"method={name}", *data, *QUICK, "nfe=[1]"]
    assert cli.main([*command, *where]) == 0
    assert json.loads((run / "report.json").read_text())["method"] == name
    before, after = weights_of(trained / "run"), weights_of(run)
    assert any(not torch.equal(before[key], after[key]) for key in before)
    capsys.readouterr()
    assert cli.main([*command, *where, f"method.{setting}s=1", "overwrite=true"]) == 1
    assert f"did you mean '{name}.{setting}'" in capsys.readouterr().err
    assert cli.main([kind.command, "--help", "--config-dir", str(tmp_path)]) == 0
    assert "Of a stranger." in capsys.readouterr().out
