"""Policies learn from several stores: frequencies, one normaliser, bit-exact resume, a command."""

import json

import numpy as np
import pytest
import torch

from diffpolicy import DiffusionPolicy
from diffpolicy.config import load_train
from diffpolicy.data import EpisodeStore, FieldSpec, Normalizer, Windows
from diffpolicy.data.joined import Joined, open_store
from diffpolicy.data.remaking import merged
from diffpolicy.learn.learning import Learning, examples, usable_episodes
from diffpolicy.learn.material import PlanMaterial, TuningData
from diffpolicy.settings import ConfigError
from diffpolicy.training.run_files import read_metrics
from diffpolicy.training.settings import TrainerConfig

SMALL = {
    "horizon": 4,
    "n_action_steps": 2,
    "network": {"type": "mlp", "width": 16, "depth": 1},
}
TRAINER = {"batch_size": 8, "eval_every": 6, "checkpoint_every": 4, "progress": False}


@pytest.fixture
def stores(tmp_path):
    """Two stores whose observations and actions lie apart; the second has more, and rewards."""
    rng = np.random.default_rng(0)
    for name, shift, count in (("near", 0, 4), ("far", 5, 7)):
        more = {"reward": ()} if name == "far" else {}
        with EpisodeStore.create(
            tmp_path / f"{name}.zarr", {"obs": (3,), "action": (2,), **more}
        ) as s:
            for _ in range(count):
                length = int(rng.integers(3, 12))
                rows = {k: rng.normal(shift, 1, (length, *f.shape)) for k, f in s.fields.items()}
                s.append({k: v.astype(np.float32) for k, v in rows.items()})
    return [
        {"path": str(tmp_path / "near.zarr"), "weight": 3},
        {"path": str(tmp_path / "far.zarr")},
    ]


def test_one_normaliser_is_that_of_all_rows(stores, tmp_path):
    policy = DiffusionPolicy.from_dataset(stores, spec=SMALL, normalize={"obs": "gaussian"})
    parts = [EpisodeStore.open(one["path"]) for one in stores]
    together = merged(parts, tmp_path / "all.zarr", fields=["obs", "action"])
    whole = DiffusionPolicy.from_dataset(together, spec=SMALL, normalize={"obs": "gaussian"})
    for name, value in whole.normalizer.to_tensors().items():
        torch.testing.assert_close(policy.normalizer.to_tensors()[name], value, rtol=1e-6, atol=0)


def test_batches_hold_each_store_by_its_weight(stores):
    policy = DiffusionPolicy.from_dataset(stores, spec=SMALL, normalize={"obs": "identity"})
    joined = Joined(
        {n: EpisodeStore.open(s["path"]) for n, s in zip("ab", stores, strict=True)}, [3, 1]
    )
    source = examples(policy.spec, policy.normalizer, joined, Learning(), range(11))
    for step in range(20):
        batch = source.gather(source.draw(step, 8, 0))
        assert int((batch["obs"].mean((1, 2)) > 2.5).sum()) == 2
    alone = Windows(
        EpisodeStore.open(stores[0]["path"]), horizon=4, n_obs_steps=policy.spec.n_obs_steps,
        n_action_steps=2, normalizer=policy.normalizer,
    )  # fmt: skip
    found, wanted = (s.gather(torch.arange(len(alone))) for s in (source, alone))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_tuning_clones_demonstrations_by_the_same_weights(stores):
    policy = DiffusionPolicy.from_dataset(stores, spec=SMALL, normalize={"obs": "identity"})
    data = TuningData.of(demonstrations=stores, max_episodes=2)
    source = PlanMaterial(policy.spec, policy.normalizer, data).demonstrations()
    obs = source.gather(torch.arange(len(source)))["obs"]
    far = int((obs.mean((1, 2)) > 2.5).sum())
    assert abs(far - len(source) / 4) < 1
    lengths = [EpisodeStore.open(one["path"]).episode_lengths[:2].sum() for one in stores]
    assert len(obs.unique(dim=0)) == sum(lengths)


def test_resume_of_a_mixture_is_bit_exact(stores, tmp_path):
    def run(folder, steps, resume=False):
        policy = DiffusionPolicy.from_dataset(stores, spec=SMALL)
        config = TrainerConfig(steps=steps, lr_schedule="constant", warmup_steps=1, **TRAINER)
        return policy.learn(stores, config, tmp_path / folder, val_fraction=0.2, resume=resume)

    whole = run("whole", 12)
    run("parts", 5)
    again = run("parts", 12, resume=True)
    for name, value in whole.denoiser.state_dict().items():
        assert torch.equal(value, again.denoiser.state_dict()[name]), name
    row = read_metrics(tmp_path / "whole" / "metrics.csv")[-1]
    near, far = float(row["val_loss_near"]), float(row["val_loss_far"])
    assert float(row["val_loss"]) == pytest.approx(0.75 * near + 0.25 * far)
    other = [{**stores[0], "weight": 2}, stores[1]]
    policy = DiffusionPolicy.from_dataset(other, spec=SMALL)
    config = TrainerConfig(steps=14, lr_schedule="constant", warmup_steps=1, **TRAINER)
    with pytest.raises(ValueError, match="shares"):
        policy.learn(other, config, tmp_path / "parts", val_fraction=0.2, resume=True)


def test_padding_with_images_never_crosses_an_episode_or_a_store(tmp_path):
    parts = {}
    for number, lengths in enumerate([(1, 5, 2), (3, 1, 4)]):
        with EpisodeStore.create(
            tmp_path / f"{number}.zarr",
            {"obs.image": FieldSpec((2, 2, 3), "uint8"), "obs.state": (1,), "action": (1,)},
            chunk_rows=2,
        ) as store:
            for episode, length in enumerate(lengths):
                mark = 10 * number + episode
                store.append({
                    "obs.image": np.full((length, 2, 2, 3), mark, np.uint8),
                    "obs.state": np.full((length, 1), mark, np.float32),
                    "action": np.full((length, 1), mark, np.float32),
                })  # fmt: skip
        parts[str(number)] = EpisodeStore.open(tmp_path / f"{number}.zarr")
    joined = Joined(parts)
    windows = Windows(joined, horizon=6, n_obs_steps=3, n_action_steps=2)
    batch = windows.gather(torch.arange(len(windows)))
    assert len(windows) == 16
    assert batch["obs.image"].dtype == torch.uint8
    for values in (batch["obs.image"], batch["obs.state"], batch["action"]):
        marks = values.flatten(1).float()
        assert (marks == marks[:, :1]).all()
        assert torch.equal(marks[:, 0], batch["action"][:, 0, 0])


def test_episodes_without_actions_are_left_out_of_each_store(stores, tmp_path):
    rows = {"obs": np.zeros((5, 3), np.float32), "action": np.zeros((5, 2), np.float32)}
    for name, free in (("some", [False, True, True]), ("none", [True, True])):
        with EpisodeStore.create(tmp_path / f"{name}.zarr", {"obs": (3,), "action": (2,)}) as store:
            for alone in free:
                store.append(rows, **({"actions": False} if alone else {}))
    spec = DiffusionPolicy.from_dataset(stores, spec=SMALL).spec
    some = open_store([stores[0], str(tmp_path / "some.zarr")])
    assert usable_episodes(spec, some, None).tolist() == [0, 1, 2, 3, 4]
    assert usable_episodes(spec, some, 1).tolist() == [0, 4]
    with pytest.raises(ValueError, match="none of the 2 episodes of none has actions"):
        usable_episodes(spec, open_store([stores[0], str(tmp_path / "none.zarr")]), None)


def test_fields_that_differ_are_refused_by_name(stores, tmp_path):
    with EpisodeStore.create(tmp_path / "wide.zarr", {"obs": (4,), "action": (2,)}) as store:
        store.append({"obs": np.zeros((3, 4)), "action": np.zeros((3, 2))})
    with pytest.raises(ValueError, match=r"obs is \[3\] float32 in .*near.*\[4\] float32 in"):
        DiffusionPolicy.from_dataset([*stores, str(tmp_path / "wide.zarr")], spec=SMALL)


def test_command_line(stores, tmp_path, capsys):
    from diffpolicy.commands.train import run

    mix = ", ".join(f"{{path: {s['path']}, weight: {s.get('weight', 1)}}}" for s in stores)
    arguments = [
        *("env.name=none", f"data.mix=[{mix}]", "data.val_fraction=0.2", "env.id=none"),
        *("network=mlp", "network.width=16", "network.depth=1", "policy.n_action_steps=2"),
        *("trainer.steps=4", "trainer.batch_size=8", "trainer.progress=false", "device=cpu"),
        *("evaluation.episodes=0", "evaluation.val_episodes=0", f"run_dir={tmp_path / 'run'}"),
    ]
    assert run(arguments) == 0
    said = capsys.readouterr().out
    assert "data.mix: near, 4 episodes" in said
    assert "75.0% of each batch" in said
    assert json.loads(said.rsplit("RESULT ", 1)[1])["train_s"] >= 0
    assert "val_loss_far" in read_metrics(tmp_path / "run" / "metrics.csv")[-1]
    assert load_train(arguments).data.path is None
    with pytest.raises(ConfigError, match=r"leave out data\.path"):
        load_train([*arguments, "data.path=x.zarr"])
    with pytest.raises(ConfigError, match="no setting 'wight'"):
        run([*arguments, "data.mix=[{path: a.zarr, wight: 1}]", f"run_dir={tmp_path / 'no'}"])


def test_a_normaliser_for_each_store(stores, tmp_path):
    how = {"spec": SMALL, "normalize": {"obs": "gaussian"}, "per_store": True}
    policy = DiffusionPolicy.from_dataset(stores, **how)
    config = TrainerConfig(steps=2, **TRAINER)
    policy.learn(stores, config, tmp_path / "run", val_fraction=0)
    parts = {n: EpisodeStore.open(s["path"]) for n, s in zip(("near", "far"), stores, strict=True)}
    own = {n: Normalizer.fit(s.statistics, policy.normalizer.modes) for n, s in parts.items()}
    source = examples(policy.spec, policy.normalizer, Joined(parts), Learning(), range(11))
    for name, part in source.parts.items():  # each in its own units: centred, wherever it lies
        windows = Windows(
            parts[name], horizon=4, n_obs_steps=policy.spec.n_obs_steps, n_action_steps=2,
            normalizer=own[name],
        )  # fmt: skip
        rows = torch.arange(len(windows))
        assert torch.equal(part.gather(rows)["obs"], windows.gather(rows)["obs"])
    for name in (None, "near", "far"):
        loaded = DiffusionPolicy.from_pretrained(tmp_path / "run", normalizer=name)
        for key, value in own[name or "near"].to_tensors().items():
            assert torch.equal(loaded.normalizer.to_tensors()[key], value)
    loaded.save(tmp_path / "far")
    again = DiffusionPolicy.load(tmp_path / "far")  # as it was saved; and may be turned back
    assert torch.equal(
        again.normalizer.to_tensors()["obs.offset"], own["far"].to_tensors()["obs.offset"]
    )
    back = DiffusionPolicy.load(tmp_path / "far", normalizer="near")
    near = DiffusionPolicy.from_pretrained(tmp_path / "run")
    obs = np.zeros((2, 3), np.float32)
    np.testing.assert_array_equal(back.predict(obs)[0], near.predict(obs)[0])
    assert not np.array_equal(back.predict(obs)[0], again.predict(obs)[0])
    with pytest.raises(ValueError, match=r"unknown normalizer 'fra'.*did you mean 'far'"):
        DiffusionPolicy.load(tmp_path / "far", normalizer="fra")
    with pytest.raises(ValueError, match="several"):
        near.with_anchors(str(stores[0]["path"]))
    with pytest.raises(ValueError, match="give a list of stores"):
        DiffusionPolicy.from_dataset(stores[0]["path"], spec=SMALL, per_store=True)
    plain = DiffusionPolicy.from_dataset(stores, spec=SMALL)
    assert set(plain.normalizer.to_config()) == {"fields"}  # as before there were several
