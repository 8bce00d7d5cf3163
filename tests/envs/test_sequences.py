"""Sequence design tasks: complete tables, exact multilinear rewards, splits that do not leak."""

import gzip
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.error import DependencyNotInstalled
from gymnasium.utils.env_checker import check_env

from diffpolicy_envs.sequences import (
    GB1,
    LacPromoter,
    RNAFolding,
    SequenceDesignEnv,
    SpliceSite,
    TableTask,
    TFBind8,
)
from diffpolicy_envs.sequences import rna as rna_module
from diffpolicy_envs.sequences.promoter import DATA as LAC_DATA

SHARED = Path(__file__).parents[3] / "shared/data"
HAIRPIN = "((((....))))"


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"the measurements shared/data/{name} are not here")
    return SHARED / name


def one_hot(tokens: Any, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.eye(size, dtype=dtype)[torch.as_tensor(np.asarray(tokens, dtype=np.int64))]


@pytest.fixture(scope="module")
def tfbind8() -> TFBind8:
    return TFBind8()


@pytest.fixture(scope="module")
def lac() -> LacPromoter:
    return LacPromoter()


@pytest.fixture(scope="module")
def splice() -> SpliceSite:
    return SpliceSite()


@pytest.fixture(scope="module")
def gb1() -> GB1:
    return GB1(shared("gb1/gb1.npz"))


class TestTFBind8:
    def test_table_is_complete_and_symmetric(self, tfbind8: TFBind8) -> None:
        tokens, reward = tfbind8.measurements()
        assert len(np.unique(tokens, axis=0)) == 4**8
        assert (tfbind8.scores(tfbind8.reverse_complement(tokens)) == reward).all()
        assert (reward.min(), reward.max()) == (0.0, 1.0)
        assert tfbind8.table.shape == (4,) * 8
        assert tfbind8.table.dtype == torch.float32

    def test_the_best_sequence(self, tfbind8: TFBind8) -> None:
        assert tfbind8.best() == ("AGGTATCA", 1.0)
        best = tfbind8.encode(["AGGTATCA", "TGATACCT"])
        np.testing.assert_array_equal(tfbind8.reverse_complement(best), best[::-1])
        assert tfbind8.scores(best).tolist() == [1.0, 1.0]
        assert tfbind8.escore.max() == pytest.approx(0.49105, abs=1e-12)

    def test_the_shipped_table_is_the_source_digit_by_digit(self, tfbind8: TFBind8) -> None:
        with np.load(shared("tfbind8/tfbind8.npz"), allow_pickle=False) as source:
            escore = source["SIX6_REF_R1_escore"]
        np.testing.assert_array_equal(tfbind8.escore.astype(np.float32), escore)
        again = TFBind8(file=shared("tfbind8/tfbind8.npz"))
        tokens = again.all_tokens()
        np.testing.assert_allclose(again.scores(tokens), tfbind8.scores(tokens), atol=1e-6)

    def test_another_factor_from_a_file(self) -> None:
        task = TFBind8("CRX_REF_R1", file=shared("tfbind8/tfbind8.npz"))
        assert task.best() == ("CTAATCCC", 1.0)
        assert task.name == "tfbind8_CRX_REF_R1"

    def test_file_rows_may_come_in_any_order(self, tfbind8: TFBind8, tmp_path: Path) -> None:
        order = np.random.default_rng(0).permutation(4**8)
        arrays = {"x": tfbind8.all_tokens()[order], "own_escore": tfbind8.escore[order]}
        np.savez(tmp_path / "own.npz", **arrays)
        task = TFBind8("own", file=tmp_path / "own.npz")
        assert torch.equal(task.table, tfbind8.table)

    @pytest.mark.parametrize("fraction", [0.1, 0.5, 1.0])
    def test_training_data_keeps_pairs_together(self, fraction: float) -> None:
        task = TFBind8(pretrain_fraction=fraction)
        tokens, reward = task.training_data()
        assert tokens.dtype == np.int8
        assert reward.dtype == np.float32
        assert len(tokens) == pytest.approx(fraction * 4**8, abs=4)
        members = {row.tobytes() for row in tokens}
        assert {row.tobytes() for row in task.reverse_complement(tokens)} == members
        _, everything = task.measurements()
        assert reward.max() <= np.quantile(everything, fraction) + 1e-6

    def test_split_never_separates_a_pair(self, tfbind8: TFBind8) -> None:
        first, second = tfbind8.split_pairs(0.3, seed=1)
        assert np.array_equal(np.sort(np.concatenate([first, second])), np.arange(4**8))
        assert len(first) == pytest.approx(0.3 * 4**8, rel=0.02)
        tokens, _ = tfbind8.measurements()
        members = {row.tobytes() for row in tokens[first]}
        assert {row.tobytes() for row in tfbind8.reverse_complement(tokens[first])} == members
        assert np.array_equal(first, tfbind8.split_pairs(0.3, seed=1)[0])
        assert not np.array_equal(first, tfbind8.split_pairs(0.3, seed=2)[0])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"table": "CRX_REF_R1"}, r'only \'SIX6_REF_R1\' comes.*file="'),
            ({"pretrain_fraction": 0.0}, "above 0 and at most 1, got 0.0"),
        ],
    )
    def test_bad_arguments(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TFBind8(**options)

    def test_bad_files(self, tfbind8: TFBind8, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="expected a complete 8-mer table"):
            TFBind8(file=tmp_path / "none.npz")
        x, escore = tfbind8.all_tokens(), tfbind8.escore
        np.savez(tmp_path / "a.npz", x=x, other_escore=escore)
        with pytest.raises(ValueError, match="no array 'SIX6_REF_R1_escore', only x, other_escore"):
            TFBind8(file=tmp_path / "a.npz")
        np.savez(tmp_path / "b.npz", x=np.zeros_like(x), SIX6_REF_R1_escore=escore)
        with pytest.raises(ValueError, match="does not hold every 8-mer once"):
            TFBind8(file=tmp_path / "b.npz")
        np.savez(tmp_path / "c.npz", x=x[:9], SIX6_REF_R1_escore=escore[:9])
        with pytest.raises(ValueError, match=r"has x \(9, 8\)"):
            TFBind8(file=tmp_path / "c.npz")


class TestMultilinearReward:
    @pytest.fixture
    def tokens(self) -> Any:
        return np.random.default_rng(0).integers(4, size=(40, 8))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_the_look_up_on_one_hot_rows(
        self, tfbind8: TFBind8, tokens: Any, dtype: torch.dtype
    ) -> None:
        reward = tfbind8.reward(one_hot(tokens, 4, dtype))
        assert reward.dtype == dtype
        np.testing.assert_array_equal(reward.float().numpy(), tfbind8.scores(tokens))
        assert torch.equal(tfbind8.table[tuple(torch.as_tensor(tokens).T)], reward.float())

    def test_gradient_on_one_hot_rows_is_the_neighbours_value(
        self, tfbind8: TFBind8, tokens: Any
    ) -> None:
        x = one_hot(tokens, 4).requires_grad_()
        tfbind8.reward(x).sum().backward()
        neighbours = np.repeat(np.repeat(tokens[:, None, None], 8, 1), 4, 2)  # [B, L, V, L]
        for position in range(8):
            neighbours[:, position, :, position] = np.arange(4)
        expected = tfbind8.scores(neighbours.reshape(-1, 8)).reshape(-1, 8, 4)
        assert x.grad is not None
        np.testing.assert_array_equal(x.grad.numpy(), expected)

    def test_gradient_is_that_of_finite_differences(self, tfbind8: TFBind8) -> None:
        torch.manual_seed(0)
        x = torch.randn(3, 8, 4, dtype=torch.float64).softmax(-1).requires_grad_()
        assert torch.autograd.gradcheck(tfbind8.reward, (x,))

    def test_is_the_expectation_under_independent_letters(self) -> None:
        rng = np.random.default_rng(0)
        task = TableTask("small", "abc", rng.standard_normal((3, 3, 3)))
        x = torch.randn(5, 3, 3, dtype=torch.float64).softmax(-1)
        law = torch.einsum("bi,bj,bk->bijk", *x.unbind(1))
        values = torch.from_numpy(task._values.reshape(3, 3, 3))
        expected = (law * values).sum((1, 2, 3))
        torch.testing.assert_close(task.reward(x), expected)
        uniform = torch.full((1, 3, 3), 1 / 3, dtype=torch.float64)
        torch.testing.assert_close(task.reward(uniform)[0], values.mean())

    @pytest.mark.parametrize("length", [1, 2, 5])
    def test_any_length(self, length: int) -> None:
        table = np.random.default_rng(length).random((2,) * length)
        task = TableTask("small", "ab", table)
        rows = one_hot(task.all_tokens(), 2, torch.float64)
        np.testing.assert_array_equal(task.reward(rows).numpy(), table.reshape(-1))

    def test_half_precision_and_autocast_do_not_coarsen_it(
        self, tfbind8: TFBind8, tokens: Any
    ) -> None:
        x = one_hot(tokens, 4)
        exact = tfbind8.reward(x)
        assert torch.equal(tfbind8.reward(x.bfloat16()), exact)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(tfbind8.reward(x), exact)

    def test_a_first_call_under_inference_mode_does_no_harm(self, tokens: Any) -> None:
        task = TFBind8()
        x = one_hot(tokens, 4)
        with torch.inference_mode():
            task.reward(x)
        x.requires_grad_()
        task.reward(x).sum().backward()
        assert x.grad is not None

    @pytest.mark.parametrize("shape", [(3, 8, 5), (8, 4), (3, 7, 4)])
    def test_other_shapes_are_refused(self, tfbind8: TFBind8, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"float rows \[B, 8, 4\] \(no mask channel\)"):
            tfbind8.reward(torch.zeros(shape))
        with pytest.raises(ValueError, match=r"got torch\.int64"):
            tfbind8.reward(torch.zeros(3, 8, 4, dtype=torch.int64))

    def test_bad_tables(self) -> None:
        with pytest.raises(ValueError, match=r"axes of length 2, got shape \[2, 3\]"):
            TableTask("bad", "ab", np.zeros((2, 3)))
        with pytest.raises(ValueError, match="1 values not finite"):
            TableTask("bad", "ab", [0.0, np.nan])
        with pytest.raises(ValueError, match="the table's shape"):
            TableTask("bad", "ab", np.zeros((2, 2)), measured=[True, False])
        with pytest.raises(ValueError, match="distinct letters, got 'aa'"):
            TableTask("bad", "aa", np.zeros((2, 2)))


class TestLetters:
    def test_round_trip(self, tfbind8: TFBind8) -> None:
        assert tfbind8.encode(["ACGTACGT"]).tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
        assert tfbind8.decode([[0, 1, 2, 3, 0, 1, 2, 3]]) == ["ACGTACGT"]
        assert tfbind8.encode([]).shape == (0, 8)
        assert tfbind8.valid(tfbind8.encode(["ACGTACGT"])).tolist() == [True]

    @pytest.mark.parametrize("text", ["ACGT", "ACGUACGU", "acgtacgt"])
    def test_other_letters_are_refused(self, tfbind8: TFBind8, text: str) -> None:
        with pytest.raises(ValueError, match=f"8 letters of 'ACGT', got '{text}'"):
            tfbind8.encode([text])

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (np.full((1, 8), 4), r"0\.\.3 \(no mask token\), got values 4\.\.4"),
            (np.zeros((1, 8)), "integer tokens"),
            (np.zeros(8, dtype=int), r"\[N, 8\], got int64 of shape \[8\]"),
        ],
    )
    def test_other_tokens_are_refused(self, tfbind8: TFBind8, tokens: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            tfbind8.scores(tokens)


class TestGB1:
    def test_known_variants(self, gb1: GB1) -> None:
        assert gb1.best() == ("FWAA", 1.0)
        wild_type = gb1.scores(gb1.encode([gb1.wild_type]))[0]
        assert wild_type == pytest.approx(np.log(2) / np.log1p(8.76196575), rel=1e-6)
        assert gb1.measured.sum() == 149_361
        imputed = gb1.table.numpy()[~gb1.measured]
        assert len(imputed) == 10_639
        assert 0.0 <= imputed.min() < imputed.max() < 0.2

    def test_training_data_is_measured_and_poor(self, gb1: GB1) -> None:
        tokens, reward = gb1.training_data()
        assert gb1.measured[tuple(tokens.T.astype(int))].all()
        assert len(tokens) == pytest.approx(0.9 * 149_361, abs=2)
        assert reward.max() < np.log1p(0.05) / np.log1p(8.76)

    def test_the_files_own_order_of_letters_does_not_matter(self, gb1: GB1, tmp_path: Path) -> None:
        with np.load(shared("gb1/gb1.npz"), allow_pickle=False) as source:
            x, fitness, alphabet = (source[name] for name in ("x", "fitness", "alphabet"))
        np.savez(tmp_path / "own.npz", x=19 - x, fitness=fitness, alphabet=alphabet[::-1])
        assert torch.equal(GB1(tmp_path / "own.npz").table, gb1.table)

    def test_additive_landscapes_are_imputed_exactly(self, tmp_path: Path) -> None:
        # log(fitness + 0.01) is a sum over sites, and the ridge is small against 8000 rows.
        rng = np.random.default_rng(0)
        grid = np.exp(sum(np.ix_(*rng.uniform(0, 0.5, (4, 20))))) - 0.01
        kept = np.flatnonzero(rng.random(20**4) < 0.5)
        x = np.stack(np.unravel_index(kept, grid.shape), axis=1)
        alphabet = np.array(list("ACDEFGHIKLMNPQRSTVWY"))
        np.savez(tmp_path / "own.npz", x=x, fitness=grid.reshape(-1)[kept], alphabet=alphabet)
        task = GB1(tmp_path / "own.npz")
        expected = np.log1p(grid) / np.log1p(grid.reshape(-1)[kept].max())
        assert np.abs(task.table.numpy() - expected).max() < 0.01
        assert task.measured.sum() == len(kept)

    def test_without_its_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"not shipped: give file=.*FLIP benchmark"):
            GB1()
        np.savez(tmp_path / "a.npz", x=np.zeros((3, 4), int), fitness=np.ones(3), alphabet=["A"])
        with pytest.raises(ValueError, match=r"alphabet 'A'; expected an \.npz"):
            GB1(tmp_path / "a.npz")


class TestSpliceSite:
    def test_only_gc_and_gu_sites_are_valid(self, splice: SpliceSite) -> None:
        assert splice.measured.sum() == 30_483
        assert splice.valid(splice.all_tokens()).sum() == 4**7 * 2
        tokens = splice.encode(["CAGGUAAGU", "CAGGCAAGU", "CAGGAAAGU", "CAGAUAAGU"])
        assert splice.valid(tokens).tolist() == [True, True, False, False]
        assert (splice.scores(tokens[2:]) == 0).all()
        for data in (splice.training_data(), splice.measurements()):
            assert splice.valid(data[0]).all()

    def test_the_consensus_is_strong_and_the_source_agrees(self, splice: SpliceSite) -> None:
        assert splice.best() == ("CGGGUAACC", 1.0)
        assert splice.scores(splice.encode(["CAGGUAAGU"]))[0] > 0.9
        with gzip.open(shared("lac_promoter/mpsa_data.csv.gz"), "rt") as file:
            rows = [line.strip().split(",") for line in file][1:]
        psi = np.array([float(row[3]) for row in rows])
        scaled = (psi - psi.min()) / (psi.max() - psi.min())
        found = splice.scores(splice.encode([row[4] for row in rows]))
        np.testing.assert_allclose(found, scaled, atol=1e-6)


class TestLacPromoter:
    def test_all_sets_are_merged(self, lac: LacPromoter) -> None:
        tokens, activity = lac.measurements()
        assert tokens.shape == (50_518, 75)
        assert len(np.unique(tokens, axis=0)) == 50_518
        assert (activity.min(), activity.max()) == (0.0, 9.0)
        assert activity.mean() == pytest.approx(4.43935, abs=1e-4)
        assert lac.reads.sum() == 49_213 + 2 * 1275 + 3 * 30
        np.testing.assert_array_equal(lac.training_data()[0], tokens)

    def test_wild_type_is_the_consensus_and_was_measured(self, lac: LacPromoter) -> None:
        tokens, activity = lac.measurements()
        frequency = (tokens[:, :, None] == np.arange(4)).mean(axis=0)
        assert lac.decode(frequency.argmax(axis=1)[None]) == [lac.wild_type]
        same = (tokens == lac.encode([lac.wild_type])).all(axis=1)
        assert activity[same].tolist() == [8.5]
        assert 1 - frequency.max(axis=1).mean() == pytest.approx(0.115, abs=5e-4)

    def test_halves_are_disjoint_and_complete(self, lac: LacPromoter) -> None:
        first, second = lac.halves(0)
        assert len(first) == len(second) == 25_259
        assert np.array_equal(np.sort(np.concatenate([first, second])), np.arange(50_518))
        assert np.array_equal(first, lac.halves(0)[0])
        assert not np.array_equal(first, lac.halves(1)[0])

    def test_copies_of_a_sequence_stay_together(
        self, lac: LacPromoter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        doubled = np.concatenate([lac._tokens[:300], lac._tokens[:300]])
        monkeypatch.setattr(lac, "_tokens", doubled)
        first, second = lac.halves(3)
        assert len(first) == len(second) == 300
        assert not set(first % 300) & set(second % 300)

    def test_one_half_predicts_the_other(self, lac: LacPromoter) -> None:
        tokens, activity = lac.measurements()
        hot = np.eye(4, dtype=np.float32)[tokens].reshape(len(tokens), -1)
        first, second = lac.halves(0)
        gram = hot[first].T @ hot[first] + np.eye(300, dtype=np.float32)
        weight = np.linalg.solve(gram, hot[first].T @ (activity[first] - activity.mean()))
        assert np.corrcoef(hot[second] @ weight, activity[second])[0, 1] > 0.5

    def test_the_shipped_file_is_the_source(self) -> None:
        source = shared("lac_promoter/sortseq_data.csv.gz")
        assert source.read_bytes() == LAC_DATA.read_bytes()

    def test_there_is_no_reward(self, lac: LacPromoter) -> None:
        with pytest.raises(RuntimeError, match=r"learn an oracle from measurements\(\)"):
            lac.reward(torch.zeros(1, 75, 4))


class TestRNAFolding:
    @pytest.fixture(autouse=True)
    def _engine(self) -> None:
        pytest.importorskip("seqfold", reason='needs pip install "diffpolicy[rna]"')

    def test_a_known_hairpin_folds(self) -> None:
        task = RNAFolding(length=12, engine="seqfold")
        fold = task.fold("GGGGAAAACCCC")
        assert fold.structure == HAIRPIN
        assert fold.energy == pytest.approx(-5.4, abs=0.2)
        open_chain = task.fold("AAAAAAAAAAAA")
        assert open_chain == ("............", 0.0)
        rewards = task.scores(task.encode(["GGGGAAAACCCC", "AAAAAAAAAAAA", "GGGGAAAACCCC"]))
        np.testing.assert_allclose(rewards, [5.4 / 12, 0.0, 5.4 / 12], atol=0.02)

    def test_unstable_structures_are_the_open_chain(self) -> None:
        # The engine answers ((....)) with +1.9 kcal/mol here.
        assert RNAFolding(length=8, engine="seqfold").fold("ACGUACGU") == ("........", 0.0)

    def test_target_scores(self) -> None:
        texts = ["GGGGAAAACCCC", "AAAAAAAAAAAA", "GGGAAAAAACCC"]
        task = RNAFolding(HAIRPIN, engine="seqfold")
        tokens = task.encode(texts)
        assert task.length == 12
        assert task.fold(texts[2]).structure == "(((......)))"
        np.testing.assert_allclose(task.scores(tokens), [1.0, 0.0, 2 * 3 / (3 + 4)])
        by_position = RNAFolding(HAIRPIN, score="positions", engine="seqfold").scores(tokens)
        np.testing.assert_allclose(by_position, [1.0, 4 / 12, 10 / 12])

    def test_structures_of_random_sequences_are_balanced(self) -> None:
        task = RNAFolding(length=40, engine="seqfold")
        for text in task.decode(task.training_data()[0][:100]):
            fold = task.fold(text)
            pairs = rna_module.base_pairs(fold.structure)
            assert all(text[i] + text[j] in {"GC", "CG", "AU", "UA", "GU", "UG"} for i, j in pairs)
            assert fold.energy <= 0.0
            assert bool(pairs) == (fold.energy < 0.0)

    def test_prior_has_the_asked_gc_content(self) -> None:
        tokens, values = RNAFolding(gc_content=0.3).training_data()
        assert values is None
        assert tokens.shape == (20_000, 30)
        assert np.isin(tokens, [1, 2]).mean() == pytest.approx(0.3, abs=0.005)
        assert np.array_equal(tokens, RNAFolding(gc_content=0.3).training_data()[0])
        assert not np.array_equal(tokens, RNAFolding(gc_content=0.3, seed=1).training_data()[0])

    def test_measurements_are_the_prior_with_rewards(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rna_module, "PRIOR_SIZE", 20)
        task = RNAFolding()
        tokens, values = task.measurements()
        np.testing.assert_array_equal(tokens, task.training_data()[0])
        np.testing.assert_array_equal(values, task.scores(tokens))
        values[:] = -1.0  # the kept rewards are not handed out
        np.testing.assert_array_equal(task.measurements()[1], task.scores(tokens))

    def test_reward_is_a_black_box(self) -> None:
        task = RNAFolding(HAIRPIN)
        x = one_hot(task.encode(["GGGGAAAACCCC"]), 4)
        assert task.reward(x).tolist() == [1.0]
        with pytest.raises(ValueError, match=r"no gradient: .*x\.detach\(\)"):
            task.reward(x.clone().requires_grad_())
        with pytest.raises(ValueError, match="one-hot rows, got soft ones"):
            task.reward(torch.full((1, 12, 4), 0.25))
        with torch.no_grad():
            assert task.reward(x.clone().requires_grad_()).tolist() == [1.0]

    def test_vienna_is_called_as_its_interface_says(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = SimpleNamespace(fold=lambda sequence: (HAIRPIN, -5.4))
        monkeypatch.setitem(sys.modules, "RNA", module)
        task = RNAFolding(HAIRPIN)
        assert task.engine == "vienna"
        assert task.fold("GGGGAAAACCCC") == (HAIRPIN, -5.4)

    def test_a_missing_engine_names_the_pip_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "RNA", None)
        assert RNAFolding().engine == "seqfold"
        with pytest.raises(DependencyNotInstalled, match="pip install ViennaRNA"):
            RNAFolding(engine="vienna")
        monkeypatch.setitem(sys.modules, "seqfold", None)
        for engine in ("auto", "seqfold"):
            with pytest.raises(DependencyNotInstalled, match=r'pip install "diffpolicy\[rna\]"'):
                RNAFolding(engine=engine)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target": "((...)"}, "leaves one open"),
            ({"target": "(...))"}, "at position 5"),
            ({"target": "(..x.)"}, "at position 3"),
            ({"target": "......"}, "at least one base pair"),
            ({"target": HAIRPIN, "length": 9}, "the target has 12 positions"),
            ({"engine": "mfold"}, "engine must be"),
            ({"score": "f1"}, "score must be"),
            ({"gc_content": 1.0}, "between 0 and 1, got 1.0"),
            ({"length": 0}, "length must be at least 1"),
        ],
    )
    def test_bad_arguments(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RNAFolding(**options)


class TestEnvironment:
    @pytest.mark.parametrize("name", ["TFBind8", "SpliceSite", "RNAFolding", "LacPromoter"])
    def test_gymnasium_checks(self, name: str) -> None:
        options: dict[str, Any] = {}
        if name == "RNAFolding":
            pytest.importorskip("seqfold", reason='needs pip install "diffpolicy[rna]"')
        if name == "LacPromoter":
            options["oracle"] = lambda x: x.mean((1, 2))
        env = gym.make(f"diffpolicy_envs:diffpolicy/{name}-v0", **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_env(env.unwrapped, skip_render_check=True)
        assert env.unwrapped.task.length == len(env.action_space.nvec)  # type: ignore[attr-defined]

    def test_one_step_is_the_episode(self, tfbind8: TFBind8) -> None:
        env = gym.make("diffpolicy_envs:diffpolicy/TFBind8-v0", pretrain_fraction=0.25)
        assert env.unwrapped.task.pretrain_fraction == 0.25  # type: ignore[attr-defined]
        observation, _ = env.reset(seed=0)
        assert observation.tolist() == [0.0]
        action = tfbind8.encode(["AGGTATCA"])[0].astype(np.int64)
        _, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated, truncated) == (1.0, True, False)
        assert info["sequence"] == "AGGTATCA"

    def test_a_measured_task_needs_an_oracle_to_step(self, lac: LacPromoter) -> None:
        env = SequenceDesignEnv(lac)
        with pytest.raises(RuntimeError, match=r"give it to the environment as oracle="):
            env.step(np.zeros(75, dtype=np.int64))
        count_t = SequenceDesignEnv(lac, oracle=lambda x: x[:, :, 3].sum(1))
        assert count_t.step(np.full(75, 3))[1] == 75.0

    def test_a_task_of_ones_own(self) -> None:
        task = TableTask("own", "ab", [[0.0, 1.0], [2.0, 3.0]])
        assert isinstance(task, TableTask)
        assert SequenceDesignEnv(task).step(np.array([1, 0]))[1] == 2.0

    def test_bad_arguments(self, lac: LacPromoter) -> None:
        with pytest.raises(ValueError, match="no sequence task 'tfbind10'; there are tfbind8"):
            SequenceDesignEnv("tfbind10")
        with pytest.raises(ValueError, match=r"takes no options, got \['seed'\]"):
            SequenceDesignEnv(lac, seed=1)
        with pytest.raises(TypeError, match="oracle must map rows"):
            SequenceDesignEnv(lac, oracle=3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="GB1 landscape is not shipped"):
            gym.make("diffpolicy_envs:diffpolicy/GB1-v0")
        with pytest.raises(ValueError, match="got values 7"):
            SequenceDesignEnv(lac).step(np.full(75, 7))


def test_tasks_need_no_torch_until_a_reward_is_asked_for() -> None:
    code = """
import sys
for name in ("torch", "diffpolicy", "RNA", "seqfold"):
    sys.modules[name] = None
import gymnasium
env = gymnasium.make("diffpolicy_envs:diffpolicy/TFBind8-v0")
env.reset(seed=0)
env.step(env.action_space.sample())
from diffpolicy_envs.sequences import LacPromoter
assert len(LacPromoter().halves(0)) == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
