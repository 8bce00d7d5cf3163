import gymnasium
import numpy as np
import pytest

from diffpolicy.sequences import SequenceTask, open_task
from diffpolicy.sequences.task import valid_rows


class OneStep(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0.0, 0.0, (1,), np.float32)
    action_space = gymnasium.spaces.MultiDiscrete([3] * 4)

    def __init__(self, task) -> None:
        self.task = task


@pytest.fixture
def register():
    names = []

    def make(task) -> str:
        name = f"Sequence{len(names)}-v0"
        gymnasium.register(name, entry_point=lambda: OneStep(task))
        names.append(name)
        return name

    yield make
    for name in names:
        gymnasium.registry.pop(name)


def test_a_task_by_its_id(register, table_task):
    assert open_task(register(table_task)) is table_task


def test_fake_tasks_are_tasks(table_task, measured_task):
    for task in (table_task, measured_task):
        assert isinstance(task, SequenceTask)


def test_an_environment_without_a_task():
    with pytest.raises(ValueError, match="no task on sequences: its environment lacks task"):
        open_task("CartPole-v1")


def test_a_task_that_lacks_something(register):
    class Half:
        name, alphabet, length, kind = "half", "AB", 3, "table"

    with pytest.raises(ValueError, match=r"lacks training_data, reward$"):
        open_task(register(Half()))


def test_a_measured_task_needs_measurements_and_no_reward(register, measured_task):
    class Least:
        name, alphabet, length, kind = "least", "ACGT", 6, "measured"
        training_data = measured_task.training_data
        measurements = measured_task.measurements

    task = open_task(register(Least()))
    assert valid_rows(task, task.training_data()[0]).all()
    del Least.measurements
    with pytest.raises(ValueError, match=r"lacks measurements$"):
        open_task(register(Least()))


def test_unknown_ids_and_modules():
    with pytest.raises(ValueError, match="module:Name-v0"):
        open_task("Missing-v0")
    with pytest.raises(ValueError, match="no_such_module"):
        open_task("no_such_module:Missing-v0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alphabet": "AA"}, "all different"),
        ({"alphabet": "A_"}, "none '_'"),
        ({"length": 0}, "positive integer"),
        ({"kind": "tabel"}, "unknown kind of task 'tabel'.*did you mean 'table'"),
    ],
)
def test_what_is_wrong_is_said(register, table_task, changes, message):
    for name, value in changes.items():
        setattr(table_task, name, value)
    with pytest.raises(ValueError, match=message):
        open_task(register(table_task))
