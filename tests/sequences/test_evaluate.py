import json

import numpy as np
import pytest
import torch

from diffpolicy.sequences import SequenceModel
from diffpolicy.sequences.evaluate import (
    Evaluation,
    evaluate_sequences,
    exact_kl,
    path_kl,
)
from diffpolicy.sequences.oracles import Oracles

P, Q = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6]
KL = 4 * sum(p * np.log(p / q) for p, q in zip(P, Q, strict=True))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("time_free", "num_steps"), [(True, None), (True, 3), (False, 3)])
def test_path_kl_of_constant_heads(constant, time_free, num_steps):
    model, reference = (constant(p, 4, time_free=time_free) for p in (P, Q))
    found = path_kl(model, reference, 300, num_steps=num_steps, generator=seeded())
    assert torch.allclose(found, torch.full((300,), float(KL)), atol=1e-4)
    assert not path_kl(model, model, 5, num_steps=num_steps).any()


def test_exact_kl_of_constant_heads(constant):
    assert exact_kl(constant(P, 4), constant(Q, 4)) == pytest.approx(KL, abs=1e-5)


def test_a_row(constant, table_task):
    model, reference = constant(P, 4), constant(Q, 4)
    tokens = model.draw(2000, generator=seeded())
    oracles = Oracles(table_task.reward, lambda x: x[..., 0].mean(1), {})
    row = evaluate_sequences(model, table_task, tokens, oracles=oracles, reference=reference)
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    assert row["count"] == 2000
    assert row["reward"]["mean"] == pytest.approx(0.3, abs=0.02)
    assert row["held_out"]["mean"] == pytest.approx(0.5, abs=0.02)
    assert row["held_out"]["median"] == 0.5
    assert row["kl"] == pytest.approx(KL, abs=1e-5)
    assert row["kl_kind"] == "exact"
    assert row["valid"] == pytest.approx(0.8, abs=0.03)
    assert row["entropy"] == pytest.approx(-sum(p * np.log(p) for p in P), abs=0.02)
    assert row["diversity"] == pytest.approx(4 * (1 - sum(p * p for p in P)), abs=0.05)
    expected = 4 * sum(p * np.log(q) for p, q in zip(P, Q, strict=True))
    assert row["log_likelihood"]["mean"] == pytest.approx(expected, abs=0.1)
    assert 0 < row["unique"] <= 81 / 2000


def test_a_row_of_a_measured_task(constant, measured_task):
    model, reference = constant([0.25] * 4, 6), constant([0.1, 0.2, 0.3, 0.4], 6)
    tokens = np.tile(measured_task.tokens[:1], (5, 1))
    oracles = Oracles(lambda x: x[:, 0, 0], lambda x: x[:, 0, 1], {})
    row = evaluate_sequences(
        model,
        measured_task,
        tokens,
        oracles=oracles,
        reference=reference,
        settings=Evaluation(chains=20, elbo_draws=2, top_fraction=0.1),
    )
    assert row["kl_kind"] == "path"
    assert row["kl"] > 0
    wild_type = np.array([0, 0, 1, 1, 2, 2])
    assert row["wild_type_distance"] == (tokens[0] != wild_type).sum()
    assert row["entropy"] == row["diversity"] == 0
    assert -1 <= row["kmer_correlation"] <= 1


def test_the_divergence_of_a_table_can_be_estimated(constant, table_task):
    oracles = Oracles(table_task.reward, table_task.reward, {})
    for settings, kind in [
        (Evaluation(exact=False, chains=8), "path"),
        (Evaluation(num_steps=2, chains=8), "path"),
        (Evaluation(), "exact"),
    ]:
        row = evaluate_sequences(
            constant(P, 4),
            table_task,
            table_task.tokens,
            oracles=oracles,
            reference=constant(Q, 4),
            settings=settings,
        )
        assert row["kl_kind"] == kind
        assert row["kl"] == pytest.approx(KL, abs=1e-4)


def test_conditional_models_are_compared_unconditionally(table_task, small):
    spec = {**small, "label_quantiles": [0.5], "cond_dropout": 0.1}
    model = SequenceModel.for_task(table_task, spec=spec)
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=seeded()))
    other = SequenceModel.for_task(table_task, spec=small)
    estimate = path_kl(model, other, 3000, generator=seeded())
    assert exact_kl(model, other) <= float(estimate.mean()) + 4 * float(estimate.std()) / 3000**0.5
    assert exact_kl(model, other) > 0
    top = model.class_cond(1)
    guided = path_kl(model, other, 50, cond=top, guidance=2.0, generator=seeded())
    assert bool((guided > -1e-6).all())


def test_a_method_without_a_model(constant, table_task):
    oracles = Oracles(table_task.reward, table_task.reward, {})
    same = table_task.tokens[:3]
    row = evaluate_sequences(None, table_task, same, oracles=oracles, reference=constant(Q, 4))
    assert row["kl"] is row["kl_kind"] is None


def test_bad_input(constant, table_task):
    oracles = Oracles(table_task.reward, table_task.reward, {})
    reference = constant(Q, 4)
    for call, message in [
        (lambda: Evaluation(kmer=0), "kmer must be at least 1"),
        (lambda: Evaluation(top_fraction=0), "top_fraction"),
        (lambda: path_kl(constant(P, 5), reference, 3), "the model has length=5, the reference 4"),
        (
            lambda: evaluate_sequences(
                None,
                table_task,
                np.zeros((0, 4), int),
                oracles=oracles,
                reference=reference,
            ),
            "sequences must be at least 1",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
