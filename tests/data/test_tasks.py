"""What fills `obs.task`: ids of instructions, or vectors of them."""

import sys
import types

import numpy as np
import pytest

from diffpolicy.commands.data import run
from diffpolicy.data import EpisodeStore, convert
from diffpolicy.settings import ConfigError

ENDS = [3, 7, 12]
TEXTS = ["open the door", "close it", "open the door"]


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "a.npz",
        obs=rng.normal(size=(12, 3)),
        action=rng.normal(size=(12, 2)),
        which=np.repeat([2, 0, 2], np.diff([0, *ENDS])),
        half=np.full(12, 0.5),
        said=np.array(TEXTS),
        all="one task",
        episode_ends=ENDS,
    )
    return tmp_path / "a.npz"


def letters(texts: list[str]) -> list[list[float]]:
    """A sentence encoder; remembers what it was asked."""
    letters.asked += texts
    return [[len(text), text.count("o"), 0.5] for text in texts]


letters.asked = []


def test_ids_of_instructions(source, tmp_path):
    store = convert(source, tmp_path / "a.zarr", task="said")
    assert sorted(store.fields) == ["action", "obs.state", "obs.task"]
    assert (store.fields["obs.task"].shape, store.fields["obs.task"].dtype) == ((1,), "int64")
    np.testing.assert_array_equal(store.read("obs.task")[:, 0], np.repeat([0, 1, 0], [3, 4, 5]))
    assert store.attrs["tasks"] == TEXTS[:2]
    np.testing.assert_array_equal(convert(source, None).read("obs"), store.read("obs.state"))
    again = convert(tmp_path / "a.zarr", None)  # a store of ours keeps them
    np.testing.assert_array_equal(again.read("obs.task"), store.read("obs.task"))
    assert again.attrs["tasks"] == TEXTS[:2]
    assert convert(source, None, task="all").attrs["tasks"] == ["one task"]
    numbers = convert(source, None, task="which")
    np.testing.assert_array_equal(numbers.read("obs.task")[:, 0], np.repeat([2, 0, 2], [3, 4, 5]))
    assert numbers.attrs["tasks"] == ["0", "1", "2"]


def test_every_instruction_is_encoded_once(source, tmp_path):
    letters.asked.clear()
    store = convert(source, tmp_path / "a.zarr", task="said", task_encoder=letters)
    assert letters.asked == TEXTS[:2]
    want = np.array(letters(TEXTS), np.float32)
    np.testing.assert_array_equal(store.read("obs.task"), np.repeat(want, [3, 4, 5], 0))
    assert store.attrs["tasks"] == TEXTS[:2]
    assert [known["tasks"] for known in store.episode_attrs] == [[text] for text in TEXTS]
    # Ids that a store of ours holds, by a name that can be imported, at the command line.
    convert(source, tmp_path / "ids.zarr", task="said").close()
    module = types.ModuleType("own_sentences")
    module.encode = letters
    sys.modules["own_sentences"] = module
    options = ["task=obs.task", "task_encoder=own_sentences:encode"]
    assert run(["convert", str(tmp_path / "ids.zarr"), str(tmp_path / "b.zarr"), *options]) == 0
    again = EpisodeStore.open(tmp_path / "b.zarr")
    np.testing.assert_array_equal(again.read("obs.task"), store.read("obs.task"))


def test_a_sentence_transformer(source, monkeypatch):
    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = lambda name: types.SimpleNamespace(encode=letters, name=name)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    name = "sentence-transformers/all-MiniLM-L6-v2"
    assert convert(source, None, task="said", task_encoder=name).fields["obs.task"].shape == (3,)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r'pip install "diffpolicy\[language\]"'):
        convert(source, None, task="said", task_encoder=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "sait"}, r"task=sait: .* has nothing of that name; .*did you mean 'said'"),
        ({"task": "half"}, r"task=half must be one whole number from 0 a step; got \[\] float64"),
        ({"task": "obs"}, r"task=obs must be one whole number from 0 a step; got \[3\]"),
        ({"task": "which", "task_encoder": letters}, "there is nothing to encode"),
        ({"task_encoder": letters}, "names no tasks; say task=FIELD"),
        ({"task": "said", "task_encoder": len}, r"must make finite numbers \[1, d\] of 1 instr"),
    ],
)
def test_what_is_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        convert(source, None, **options)


def test_encoders_that_cannot_be_imported(source):
    for text in ("nowhere:encode", "sys:nothing", "encode"):
        with pytest.raises(ConfigError, match=r"task_encoder=.*write MODULE:FUNCTION"):
            convert(source, None, task="said", task_encoder=text)
