import numpy as np
import pytest
import torch

from diffpolicy.learn.reward.pathwise import MaskedChain, RewardLoss
from diffpolicy.sequences import (
    Draws,
    SequenceExamples,
    SequenceModel,
    SequenceSpec,
    activity_classes,
)
from diffpolicy.training.checkpoint import CheckpointError

P = [0.5, 0.3, 0.2]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("time_free", "num_steps"), [(True, None), (True, 3), (True, 50), (False, 1), (False, 3)]
)
def test_draws_follow_a_constant_head_at_any_number_of_steps(constant, time_free, num_steps):
    tokens = constant(P, 5, time_free=time_free).draw(4000, num_steps=num_steps, generator=seeded())
    assert tokens.shape == (4000, 5)
    assert tokens.dtype == torch.int64
    frequency = torch.stack([(tokens == v).float().mean(0) for v in range(3)])  # no mask is left
    expected = torch.tensor(P)[:, None].expand(3, 5)
    assert torch.allclose(frequency, expected, atol=4 * 0.5 / 4000**0.5)
    # Positions are independent.
    pair = ((tokens[:, 0] == 0) & (tokens[:, 4] == 0)).float().mean()
    assert abs(pair - 0.25) < 4 * 0.5 / 4000**0.5


def test_evaluations_are_as_few_as_reveals(constant):
    model = constant(P, 5)
    network = model.denoiser.network
    model.draw(8, generator=seeded())
    assert network.calls == 5
    model.draw(8, num_steps=100, generator=seeded())
    assert network.calls <= 10
    model.edit(model.draw(8, num_steps=1), 1e-9, generator=seeded())
    assert network.calls <= 12  # nothing was masked


def test_chains_say_when_each_position_was_revealed(constant):
    model = constant(P, 5)
    (chain,) = model.chains(model.masked(6), generator=seeded(), record=True)
    assert len(chain.transitions) == 5
    for step, transition in enumerate(chain.transitions):
        revealed = (transition.x[..., -1] == 1) & (transition.x_next[..., -1] == 0)
        assert torch.equal(revealed, chain.groups == step)


@pytest.mark.parametrize(("time_free", "num_steps"), [(True, None), (True, 4), (False, 4)])
def test_edits_keep_what_was_not_masked(constant, time_free, num_steps):
    model = constant(P, 5, time_free=time_free)
    given = torch.full((4000, 5), 2)
    edited = model.edit(given, 0.4, num_steps=num_steps, generator=seeded())
    kept = (edited == given).float().mean(0)
    # Unmasked with probability 1 - t, else drawn the same with probability p(2).
    assert torch.allclose(kept, torch.full((5,), 0.6 + 0.4 * P[2]), atol=4 * 0.5 / 4000**0.5)


def test_the_same_generator_draws_the_same(constant):
    model = constant(P, 5)
    assert torch.equal(model.draw(9, generator=seeded(1)), model.draw(9, generator=seeded(1)))


def test_log_likelihood_of_a_constant_head(constant):
    model = constant(P, 5)
    same = torch.tensor([[v] * 5 for v in range(3)])
    expected = 5 * torch.tensor(P).log()
    assert torch.allclose(model.log_likelihood(same, draws=2), expected, atol=1e-5)
    mixed = torch.tensor([[0, 1, 2, 0, 1]]).expand(600, 5)  # more than one piece
    exact = torch.tensor(P).log()[mixed[0]].sum()
    assert abs(model.log_likelihood(mixed).mean() - exact) < 0.05


def test_letters(constant):
    model = constant(P, 4)
    tokens = model.encode(["ABCA", "CCCC"])
    assert tokens.tolist() == [[0, 1, 2, 0], [2, 2, 2, 2]]
    assert model.decode(tokens) == ["ABCA", "CCCC"]
    assert model.decode(torch.tensor([[0, 3, 3, 1]])) == ["A__B"]


def test_learning_finds_the_law_of_the_data(tmp_path, quick, small, table_task):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (1000, 4), dtype=np.int8)
    tokens[:, 0] = 2
    tokens[:, 3] = tokens[:, 1]  # a dependence that only the state can tell
    model = SequenceModel.for_task(table_task, spec=small)
    model.learn(tokens, quick(200, lr=1e-2), tmp_path / "run", val_fraction=0.1)
    assert model.last_training.step == 200
    drawn = model.draw(500, generator=seeded())
    assert (drawn[:, 0] == 2).float().mean() > 0.95
    assert (drawn[:, 3] == drawn[:, 1]).float().mean() > 0.9
    assert model.log_likelihood(torch.from_numpy(tokens[:100])).mean() > 2 * np.log(1 / 3) - 0.5
    assert "val_loss" in (tmp_path / "run" / "metrics.csv").read_text()
    again = SequenceModel.from_pretrained(tmp_path / "run")
    assert torch.equal(again.draw(20, generator=seeded()), model.draw(20, generator=seeded()))


def test_guidance_moves_draws_to_a_class(tmp_path, quick, small, table_task):
    tokens = np.tile(table_task.tokens, (8, 1))
    labels = np.tile(table_task.measurements()[1], 8)
    spec = {**small, "label_quantiles": [0.5], "cond_dropout": 0.2}
    model = SequenceModel.for_task(table_task, spec=spec)
    model.learn(tokens, quick(200, lr=1e-2), tmp_path / "run", labels=labels)

    def share(**options) -> float:
        drawn = model.draw(400, generator=seeded(), **options)
        return float((drawn == 1).float().mean())

    high = model.class_cond(1)
    assert share(cond=model.class_cond(0)) < share() < share(cond=high)
    assert share(cond=high) < share(cond=high, guidance=3.0)
    assert share(cond=high) == share(cond=high, guidance=1.0)


def test_tuning_with_an_objective_that_draws(tmp_path, quick, small, table_task):
    model = SequenceModel.for_task(table_task, spec=small)
    before = model.copy()
    loss = RewardLoss(model.denoiser, table_task.reward, MaskedChain(), kl_weight=0.01)
    model.fit(loss, Draws(), quick(40, ema_power=None), tmp_path / "run")
    rewards = [(m.draw(500, generator=seeded()) == 1).float().mean() for m in (before, model)]
    assert rewards[1] > rewards[0] + 0.3
    again = SequenceModel.from_pretrained(tmp_path / "run")
    state = again.denoiser.state_dict()  # without the reference, which the objective holds as well
    assert all(torch.equal(v, state[k]) for k, v in model.denoiser.state_dict().items())


def test_draws_are_rows_with_a_number():
    batch = Draws(5, torch.tensor([0.0, 1.0])).gather(torch.tensor([3, 1]))
    assert batch["index"].tolist() == [3, 1]
    assert batch["cond"].tolist() == [[0, 1], [0, 1]]
    assert set(Draws().gather(torch.arange(2))) == {"index"}
    with pytest.raises(ValueError, match="at least 1"):
        Draws(0)
    with pytest.raises(ValueError, match=r"cond must be \[C\]"):
        Draws(5, torch.zeros(2, 2))


def test_round_trip(tmp_path, small, table_task):
    spec = {**small, "process": {"type": "masked_cosine"}, "time_free": False}
    model = SequenceModel.for_task(table_task, spec=spec, seed=3)
    other = SequenceModel.load(model.save(tmp_path / "m"))
    assert other.spec == model.spec
    for name, value in model.denoiser.state_dict().items():
        assert torch.equal(other.denoiser.state_dict()[name], value)
    assert not list((tmp_path / "m").glob("*.p*"))  # nothing pickled
    SequenceModel.for_task(table_task, spec=small).save(tmp_path / "m")  # replaced
    assert SequenceModel.load(tmp_path / "m").spec.time_free


def test_the_seed_decides_the_weights_and_leaves_the_global_generator(small, table_task):
    before = torch.random.get_rng_state()
    first, second, third = (
        SequenceModel.for_task(table_task, spec=small, seed=s).denoiser.state_dict()
        for s in (0, 0, 1)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], third[k]) for k in first)


def test_copies_have_weights_of_their_own(constant):
    model = constant(P, 5)
    copied = model.copy()
    with torch.no_grad():
        copied.denoiser.network.logits.zero_()
    assert model.denoiser.network.logits.abs().sum() > 0


def test_damage_is_noticed(tmp_path, small, table_task):
    SequenceModel.for_task(table_task, spec=small).save(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        SequenceModel.load(tmp_path / "m")


def test_activity_classes():
    classes = activity_classes([3.0, 1.0, 2.0, 4.0], (0.5,))
    assert classes.argmax(1).tolist() == [1, 0, 0, 1]
    assert classes.sum(1).tolist() == [1, 1, 1, 1]
    assert activity_classes(np.arange(100), (0.5, 0.9)).sum(0).tolist() == [50, 40, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphabet": "A"}, "at least two letters"),
        ({"length": 0}, "positive integer"),
        ({"label_quantiles": [0.9, 0.5]}, "must rise"),
        ({"label_quantiles": [0.5], "cond_dim": 3}, "unknown cond_dim 3; expected one of 0, 2"),
        ({"cond_dropout": 1.0, "cond_dim": 2}, r"\[0, 1\)"),
    ],
)
def test_bad_specs(options, message):
    with pytest.raises(ValueError, match=message):
        SequenceSpec(**{"alphabet": "AB", "length": 3, **options})


def test_settings_that_belong_to_the_task(table_task):
    with pytest.raises(ValueError, match="the task says length: leave out"):
        SequenceModel.for_task(table_task, spec={"length": 3})
    with pytest.raises(ValueError, match="dim of this network are given otherwise"):
        SequenceModel.for_task(table_task, spec={"network": {"type": "mlp", "dim": 3}})
    with pytest.raises(ValueError, match=r"has no setting 'net'; .*did you mean 'network'"):
        SequenceModel.for_task(table_task, spec={"net": "mlp"})


def test_bad_draws(constant):
    model, timed = constant(P, 5), constant(P, 5, time_free=False)
    for call, message in [
        (lambda: timed.draw(2), "give one, such as"),
        (lambda: model.draw(0), "at least 1"),
        (lambda: model.draw(2, guidance=2.0), "cond_dropout > 0"),
        (lambda: model.draw(2, cond=torch.ones(2)), r"cond must be \[0\]"),
        (lambda: model.edit(torch.zeros(2, 5, dtype=torch.long), 0.0), "t_start"),
        (lambda: model.edit(torch.full((2, 5), 3), 0.5), r"tokens 0\.\.2"),
        (
            lambda: model.edit(torch.zeros(0, 5, dtype=torch.long), 0.5),
            "sequences must be at least 1",
        ),
        (lambda: model.log_likelihood(torch.zeros(2, 4, dtype=torch.long)), r"\[N, 5\]"),
        (lambda: model.encode(["ABCAX"]), "'X'"),
        (lambda: model.encode(["AB"]), "expected 5"),
        (lambda: model.class_cond(0), "class_index must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_learning(tmp_path, quick, small, table_task, constant):
    model = SequenceModel.for_task(table_task, spec=small)
    tokens, labels = table_task.measurements()
    conditional = SequenceModel.for_task(table_task, spec={**small, "label_quantiles": [0.5]})
    with pytest.raises(ValueError, match="label_quantiles"):
        model.learn(tokens, quick(), tmp_path, labels=labels)
    with pytest.raises(ValueError, match="give labels or cond"):
        conditional.learn(tokens, quick(), tmp_path)
    with pytest.raises(ValueError, match=r"condition must be \[81, 2\]"):
        conditional.learn(tokens, quick(), tmp_path, labels=labels[:5])
    with pytest.raises(ValueError, match="val_fraction"):
        model.learn(tokens, quick(), tmp_path, val_fraction=1.0)
    with pytest.raises(ValueError, match="own denoiser"):
        model.fit(torch.nn.Linear(2, 2), SequenceExamples(torch.zeros(3, 4)), quick(), tmp_path)
    with pytest.raises(ValueError, match=r"cond of the sequences must be \[3\]"):
        SequenceExamples(torch.zeros(3, 4), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="no sequence model in"):
        SequenceModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs cond"):
        conditional.draw(3)
