"""Known positions: the law over (length, tokens) enumerated, and what is fixed never changes."""

import itertools

import pytest
import torch

from diffpolicy.core.masking import LogLinear
from diffpolicy.core.templated import Templated
from diffpolicy.learn.material import SequenceMaterial
from diffpolicy.learn.methods import method_of
from diffpolicy.sequences import SequenceModel, SequenceSpec
from diffpolicy.sequences.exact import ExactLaw, StateSpace
from diffpolicy.sequences.guided import draw_guided
from diffpolicy.sequences.spec import template

LENGTHS = ((2, 0.25), (4, 0.75))


def toy(**changes) -> SequenceModel:
    torch.manual_seed(0)
    spec = SequenceSpec("ABC-", 4, network={"type": "mlp", "width": 16, "depth": 1}, **changes)
    model = SequenceModel(spec)
    for p in model.denoiser.parameters():
        p.data.normal_(0, 0.5)
    return model


def held(model: SequenceModel, tokens: torch.Tensor) -> bool:
    """Whether sequences have what is fixed, pads behind their ends alone, and a known length."""
    fixed = {i: "ABC-".index(c) for i, c in enumerate(model.spec.fixed) if c != "."}
    pads = tokens == 3
    lengths = (~pads).sum(1)
    behind = torch.arange(4) >= lengths[:, None]
    known = torch.tensor([n for n, _ in model.spec.lengths] or [4])
    fixed_held = all(bool((tokens[:, i] == token).all()) for i, token in fixed.items())
    return fixed_held and bool((pads == behind).all()) and bool(torch.isin(lengths, known).all())


def test_the_law_over_lengths_and_tokens_is_the_enumerated_one():
    model = toy(lengths=LENGTHS, fixed="B...")
    law = ExactLaw.of(model.denoiser).p.detach()
    space = StateSpace(4, 4)
    tokens = space.states[space.sequences]
    possible = law > 0
    # By hand: p(length) times the mean over orders of products of the network's own answers.
    by_hand = torch.zeros_like(law)
    for length, weight in LENGTHS:
        free = range(1, length)
        orders = list(itertools.permutations(free))
        for letters in itertools.product(range(3), repeat=length - 1):
            full = torch.tensor([1, *letters, *[3] * (4 - length)])
            for order in orders:
                state, log_p = full.clone(), 0.0
                state[list(free)] = 4
                for i in order:
                    answer = model.denoiser.log_probs(state[None], torch.zeros(1, 1, 1))
                    log_p += answer[0, i, full[i]].detach().double()
                    state[i] = full[i]
                by_hand[space.index(full[None])] += weight / len(orders) * log_p.exp()
    assert torch.allclose(law, by_hand, atol=1e-6)
    assert held(model, tokens[possible])
    assert possible.sum() == 3 + 27
    drawn = model.draw(20_000, generator=torch.Generator().manual_seed(0))
    share = torch.bincount(space.index(drawn), minlength=256) / len(drawn)
    assert (share - law).abs().max() < 5 * (law.max() / len(drawn)) ** 0.5
    bound = model.log_likelihood(tokens[possible], draws=100)
    gap = law[possible].log() - bound
    assert 0 < gap.mean() < 0.3


@pytest.mark.parametrize("process", ["masked_loglinear", "masked_cosine"])
@pytest.mark.parametrize("num_steps", [None, 3, 30])
def test_draws_and_edits_hold_what_is_known(process, num_steps):
    model = toy(lengths=LENGTHS, process={"type": process}).pinned({0: "B"})
    drawn = model.draw(64, num_steps=num_steps)
    assert held(model, drawn)
    for level in (0.5, 1.0):
        edited = model.edit(drawn, level, num_steps=num_steps)
        assert held(model, edited)
        assert torch.equal(edited == 3, drawn == 3)  # every row keeps its length


METHODS = [
    {"type": "pathwise"},
    {"type": "pathwise", "num_steps": 6, "relaxation": {"relaxed_steps": 2}, "joint": True},
    {"type": "policy_gradient"},
    {"type": "policy_gradient", "num_steps": 3, "kl": "reward", "grad_states": 2},
    {"type": "weighted", "buffer": 32, "refresh": 16},
    {"type": "weighted", "target": "soft_value", "buffer": 32, "refresh": 16},
    {"type": "stepwise", "buffer": 32, "refresh": 16},
]


@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_tuning_never_changes_what_is_known_nor_moves_lengths(settings):
    model = toy(lengths=LENGTHS).pinned({0: "B"})
    seen = []

    def reward(x):
        seen.append(x.detach().argmax(-1))
        return 3 * x[..., 2].sum(1) - x[..., 3].sum(1)  # C, and few pads: longer would be better

    tuned = model.copy()
    material = SequenceMaterial(reward, model.copy().denoiser, 16)
    method = method_of({**settings, "kl_weight": 0.1}, items="sequences")
    objective = method.objective(tuned.denoiser, material)
    optimiser = torch.optim.Adam(tuned.denoiser.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        loss = objective({"index": torch.arange(16)}, generator).loss.mean()
        optimiser.zero_grad()
        loss.backward()
        assert torch.isfinite(loss)
        optimiser.step()
        getattr(objective, "after_step", lambda: None)()
    assert all(held(model, tokens) for tokens in seen if settings.get("target") != "soft_value")
    drawn = tuned.draw(2000, generator=generator)
    assert held(model, drawn)
    before, after = (ExactLaw.of(m.denoiser).p.detach() for m in (model, tuned))
    space = StateSpace(4, 4)
    tokens = space.states[space.sequences]
    short = (tokens == 3).sum(1) == 2
    assert after[short].sum() == pytest.approx(0.25, abs=1e-6)
    gained = ((tokens == 2).sum(1) * (after - before)).sum()
    assert gained > 0.1


@pytest.mark.parametrize("guidance", ["reward", "best_of_n", "smc", "tds", "svdd"])
def test_guidance_holds_what_is_known(guidance):
    model = toy(lengths=LENGTHS).pinned({0: "B"})
    config = {"type": guidance, **({"scale": 2.0} if guidance == "reward" else {})}
    generator = torch.Generator().manual_seed(0)
    drawn = draw_guided(model, config, lambda x: x[..., 2].sum(1), 32, generator=generator)
    assert held(model, drawn.tokens)


def test_templates():
    assert template({1: "AC", -1: "G"}, 6, "ACGT") == ".AC..G"
    assert template("......", 6, "ACGT") == template({}, 6, "ACGT") == ""
    for fixed, message in (
        ({5: "AC"}, "does not fit into 6"),
        ({0: "AX"}, "unknown letter in fixed 'AX'"),
        ({0: "AC", 1: "G"}, "position 1 is fixed twice"),
        ("AC", "has 2 positions, expected 6"),
    ):
        with pytest.raises(ValueError, match=message):
            template(fixed, 6, "ACGT")
    with pytest.raises(ValueError, match="position 2 is fixed, and sequences of 1 lack it"):
        Templated(LogLinear(), 3, (3, 3, 0), (0, 1, 0, 1))
    with pytest.raises(ValueError, match="must be 3 weights"):
        Templated(LogLinear(), 3, (3, 3), (1,))
