import numpy as np
import pytest
import torch

from diffpolicy.sequences.oracles import Oracle, score, split_measurements, train_oracles
from diffpolicy.training import train as training

NETWORK = {"type": "sequence_regressor", "width": 8, "depth": 1, "dropout": 0.0}
HEAD = {**NETWORK, "length": 6, "vocab_size": 4}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Where the oracles of a task are once trained."""
    return tmp_path_factory.mktemp("oracles")


def learn(task, folder, config, **options):
    return train_oracles(task, folder, config, network=NETWORK, **options)


def test_two_oracles_of_disjoint_halves(kept, measured_task, quick):
    found = learn(measured_task, kept, quick(120, lr=2e-2))
    for name in ("reward", "held_out"):
        assert found.report[name]["test"]["pearson"] > 0.9
        assert found.report[name]["test"]["spearman"] > 0.9
    x = torch.nn.functional.one_hot(torch.from_numpy(measured_task.tokens).long(), 4).float()
    prediction = found.reward(x)
    assert abs(float(prediction.mean()) - 5) < 0.3  # in units of the labels
    assert not torch.equal(prediction, found.held_out(x))
    soft = x[:3].requires_grad_()
    found.reward(soft).sum().backward()
    assert float(soft.grad.abs().sum()) > 0
    assert not any(p.requires_grad for p in found.reward.parameters())


def test_kept_oracles_are_loaded(kept, measured_task, quick, monkeypatch):
    first = learn(measured_task, kept, quick(120, lr=2e-2))

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "Trainer", refuse)
    second = learn(measured_task, kept, quick(120, lr=2e-2, log_every=7))
    assert second.report == first.report
    x = torch.rand(5, 6, 4)
    assert torch.equal(first.reward(x), second.reward(x))
    with pytest.raises(ValueError, match="other settings or data"):
        learn(measured_task, kept, quick(121, lr=2e-2))
    with pytest.raises(ValueError, match="other settings or data"):
        learn(measured_task, kept, quick(120, lr=2e-2), seed=1)
    assert torch.equal(Oracle.load(kept / "reward")(x), first.reward(x))


def test_an_interrupted_training_goes_on(tmp_path, measured_task, quick, monkeypatch):
    config = quick(20, checkpoint_every=10)
    whole = learn(measured_task, tmp_path / "a", config)
    steps = []

    class Stopping(training.Trainer):
        def _train_step(self) -> None:
            super()._train_step()
            steps.append(self.step)
            self._stop.asked = self.step == 10

    with monkeypatch.context() as patch:
        patch.setattr(training, "Trainer", Stopping)
        with pytest.raises(KeyboardInterrupt, match="run again"):
            learn(measured_task, tmp_path / "b", config)
    again = learn(measured_task, tmp_path / "b", config)
    x = torch.rand(5, 6, 4)
    assert torch.equal(again.reward(x), whole.reward(x))
    assert steps[-1] == 10


def test_overwriting(tmp_path, measured_task, quick):
    learn(measured_task, tmp_path, quick(5))
    found = learn(measured_task, tmp_path, quick(6), overwrite=True)
    assert set(found.report) == {"reward", "held_out"}
    assert learn(measured_task, tmp_path, quick(6)).report == found.report


def test_tables_are_their_own_oracles(tmp_path, table_task, quick):
    found = learn(table_task, tmp_path, quick())
    x = torch.rand(5, 4, 3)
    assert torch.equal(found.reward(x), table_task.reward(x))
    assert torch.equal(found.held_out(x), table_task.reward(x))
    assert not list(tmp_path.iterdir())


def test_a_surrogate_of_a_table(tmp_path, table_task, quick):
    found = learn(table_task, tmp_path, quick(40, batch_size=16), surrogate=True)
    assert isinstance(found.reward, Oracle)
    x = torch.rand(5, 4, 3)
    assert torch.equal(found.held_out(x), table_task.reward(x))
    assert found.report["reward"]["test"]["count"] in (40, 41)


def test_halves_do_not_share_a_sequence(measured_task):
    first, second = split_measurements(measured_task, 0)
    assert len(first) + len(second) == len(measured_task.tokens)
    rows = [{tuple(r) for r in measured_task.tokens[i].tolist()} for i in (first, second)]
    assert not rows[0] & rows[1]
    assert abs(len(first) - len(second)) < 0.2 * len(measured_task.tokens)


def test_a_task_may_split_itself(table_task):
    table_task.split_pairs = lambda fraction, seed: (np.arange(3), np.arange(3, 81))
    assert len(split_measurements(table_task, 0)[0]) == 3
    table_task.halves = lambda seed: (np.arange(50), np.arange(40, 81))
    with pytest.raises(ValueError, match="overlap or are empty"):
        split_measurements(table_task, 0)


def test_scores_of_integers(table_task):
    values = score(table_task.reward, table_task.tokens, 3)
    assert values == pytest.approx(table_task.measurements()[1])
    assert score(Oracle(HEAD), np.zeros((2, 6), np.int8), 4).shape == (2,)


def test_round_trip(tmp_path):
    oracle = Oracle(HEAD, mean=3.0, std=2.0).frozen()
    x = torch.rand(4, 6, 4)
    assert torch.equal(Oracle.load(oracle.save(tmp_path / "o"))(x), oracle(x))
    assert torch.allclose(oracle(x), 3 + 2 * oracle.network(x))
    with pytest.raises(ValueError, match="no oracle in"):
        Oracle.load(tmp_path)
    with pytest.raises(ValueError, match="std_of_labels must be positive"):
        Oracle(HEAD, std=0.0)
