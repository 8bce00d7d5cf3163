"""What a run is: described by content, compared on resume."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from diffpolicy.learn.cloning.denoising import LossOutput
from diffpolicy.training import trainer as trainer_module
from diffpolicy.training.checkpoint import read_bundle, write_bundle
from diffpolicy.training.identity import ResumeWarning, array_digest, describe, differences, flatten
from diffpolicy.training.settings import TrainerConfig
from diffpolicy.training.trainer import Trainer

CONFIG = TrainerConfig(steps=6, batch_size=32, lr=1e-2, eval_every=3, progress=False)


def said(value, **options):
    return flatten(describe(value, **options))


def test_arrays_count_by_content_and_places_do_not(tmp_path):
    rows = torch.arange(1000.0)
    other = rows.clone()
    other[500] += 1e-3
    assert said({"rows": rows}) == said({"rows": rows.numpy()})
    assert differences(said({"rows": rows}), said({"rows": other}))
    assert said({"at": tmp_path / "a"}) == said({"at": tmp_path / "b"})
    assert said(rows.bfloat16()) == said(rows.bfloat16())
    assert said(torch.empty(0, 3)) != said(torch.empty(0, 2))


def test_functions_count_by_code_and_by_what_they_close_over():
    def reward(target):
        return lambda x: -(x - target).square().sum()

    def halved(target):
        return lambda x: -0.5 * (x - target).square().sum()

    assert said(reward(torch.ones(3))) == said(reward(torch.ones(3)))
    assert differences(said(reward(torch.ones(3))), said(reward(torch.zeros(3))))
    assert differences(said(reward(torch.ones(3))), said(halved(torch.ones(3))))
    model = nn.Linear(3, 1)
    before = said(model.forward)
    with torch.no_grad():
        model.weight += 1
    assert differences(before, said(model.forward))


def test_weights_that_are_trained_are_not_part_of_it_other_weights_are():
    class Objective(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.net, self.scale, self.judge = nn.Linear(2, 1), scale, [nn.Linear(2, 1)]

    torch.manual_seed(0)
    a, b = Objective(1.0), Objective(1.0)
    found = differences(said(a, trained=a), said(b, trained=b))
    assert found
    assert all("judge" in text for text in found)
    b.judge = a.judge
    assert said(a, trained=a) == said(b, trained=b)
    b.scale = 2.0
    assert differences(said(a, trained=a), said(b, trained=b)) == ["scale was 1.0, is 2.0"]


def test_cycles_end():
    found = {"name": "a"}
    found["self"] = found
    assert said(found) == {"name": "a", "self": "dict"}


@pytest.fixture
def run(make_objective, table, tmp_path):
    Trainer(make_objective(), table, CONFIG, tmp_path, identity={"policy": {"clip": True}}).fit()
    return tmp_path


def resumed(make_objective, table, run, config=CONFIG, **options):
    about = {"identity": {"policy": {"clip": True}}, **options}
    return Trainer(make_objective(seed=3), table, config, run, resume=True, **about)


def test_other_data_of_the_same_length_are_refused(make_objective, table, run):
    table.y[7] += 0.01
    with pytest.raises(ValueError, match=r"source\.y was .*, is .*start a new run"):
        resumed(make_objective, table, run)


def test_another_objective_or_policy_is_refused(make_objective, table, run):
    with pytest.raises(ValueError, match=r"another run: objective\.noise was 0\.1, is 0\.2"):
        resumed(lambda seed: make_objective(seed, noise=0.2), table, run)
    with pytest.raises(ValueError, match=r"policy\.clip was True, is False"):
        resumed(make_objective, table, run, identity={"policy": {"clip": False}})


def test_more_steps_and_another_rate_are_taken_and_said(make_objective, table, run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed(make_objective, table, run)
    longer = replace(CONFIG, steps=9, lr=5e-3)
    with pytest.warns(ResumeWarning) as said_so:
        trainer = resumed(make_objective, table, run, longer)
    text = " ".join(str(warning.message) for warning in said_so)
    assert "from step 6 with steps=9 (it was 6)" in text
    assert "lr=0.005 (it was 0.01)" in text
    assert trainer.fit().step == 9
    assert trainer.logs[0].rows[-1]["lr"] == str(longer.lr_at(8))
    with pytest.raises(ValueError, match="has done 9 steps already; steps=6 is fewer"):
        resumed(make_objective, table, run)


def test_another_number_of_threads_is_said(make_objective, table, run, monkeypatch):
    machine = trainer_module.machine
    changed = lambda device: {**machine(device), "threads": 64}  # noqa: E731
    monkeypatch.setattr(trainer_module, "machine", changed)
    with pytest.warns(ResumeWarning, match=r"last bits: threads was \d+, is 64"):
        resumed(make_objective, table, run)


def test_a_checkpoint_of_before_goes_on_with_a_warning(make_objective, table, run):
    folder = run / "checkpoints" / "0000006"
    files = read_bundle(folder)
    state = files["training/state.json"]
    del state["identity"], state["machine"]
    state["config"]["warmup_steps"] = 0  # what is given counts as what it amounts to
    write_bundle(folder, files)
    with pytest.warns(ResumeWarning, match="of an old version: only settings"):
        resumed(make_objective, table, run)


class Flat(nn.Module):
    """An objective whose loss does not follow its weights."""

    def __init__(self, *, detach: bool) -> None:
        super().__init__()
        self.net, self.detach = nn.Linear(3, 1), detach

    def forward(self, batch, generator):
        loss = self.net(batch["x"])[:, 0]
        return LossOutput(loss.detach() if self.detach else 0 * loss, {})


def test_an_objective_without_a_gradient_is_refused(table, tmp_path):
    with pytest.raises(ValueError, match="does not depend on the trainable weights"):
        Trainer(Flat(detach=True), table, CONFIG, tmp_path / "a").fit()
    with pytest.warns(RuntimeWarning, match="gradient of the first 3 steps is exactly zero"):
        Trainer(Flat(detach=False), table, CONFIG, tmp_path / "b").fit()


def test_dropout_leaves_the_callers_generator_alone(make_objective, table, tmp_path):
    objective = make_objective()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    Trainer(objective, table, CONFIG, tmp_path).fit()
    assert torch.equal(torch.rand(3), expected)


def test_short_runs_warm_up_in_proportion_and_long_ones_as_before():
    short, long = TrainerConfig(steps=100, lr=1.0), TrainerConfig(steps=5000, lr=1.0)
    rates = np.array([short.lr_at(step) for step in range(100)])
    assert rates.max() == pytest.approx(1.0)
    assert rates.argmax() == 9
    assert rates[-1] < 0.01
    before = replace(long, warmup_steps=500)
    assert [long.lr_at(s) for s in range(5000)] == [before.lr_at(s) for s in range(5000)]
    assert TrainerConfig(steps=100, warmup_steps=500).warmup == 50  # half of all at most


def test_the_digest_of_an_array_is_that_of_its_values():
    whole = torch.arange(6).reshape(3, 2)
    for part in (whole[:1, 0], whole[:, 1], whole.T, torch.zeros(0, 2)):
        assert array_digest(part) == array_digest(part.clone(memory_format=torch.contiguous_format))
    assert array_digest(whole[:1, 0]) != array_digest(whole[1:2, 0])
