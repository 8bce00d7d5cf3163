"""Settings from plain values."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from diffpolicy import RTI, PolicySpec, Sampler, TrainerConfig
from diffpolicy.core import make_process, make_solver
from diffpolicy.core.masking import make_masking
from diffpolicy.learn.actor_critic.algorithms import ActorCritic
from diffpolicy.settings import (
    ConfigError,
    check_choice,
    check_known,
    check_range,
    check_shape,
    from_values,
    setting_names,
    settings_of,
)


@dataclass(frozen=True)
class Oven:
    degrees: int = 180
    fan: bool = False

    def __post_init__(self) -> None:
        if self.degrees < 0:
            raise ValueError(f"degrees must be 0 or more, got {self.degrees}")


def test_settings():
    assert settings_of(Oven, {"fan": True}, "oven") == Oven(fan=True)
    assert setting_names(Oven) == ["degrees", "fan"]
    check_known({}, ["a"], "oven")


def test_messages():
    with pytest.raises(ConfigError, match="oven has no setting 'door'; it has degrees, fan"):
        settings_of(Oven, {"door": 1}, "oven")
    with pytest.raises(ConfigError, match=r"no setting 'degres'; .*did you mean 'degrees'"):
        settings_of(Oven, {"degres": 1}, "oven")
    with pytest.raises(ValueError, match="degrees must be 0 or more"):
        settings_of(Oven, {"degrees": -1}, "oven")


def test_a_mistyped_keyword_names_the_nearest_setting():
    for kind, wrong, right in (
        (TrainerConfig, "stepss", "steps"),
        (PolicySpec, "horzion", "horizon"),
        (RTI, "t_strat", "t_start"),
        (Sampler, "num_step", "num_steps"),
    ):
        with pytest.raises(TypeError, match=f"{kind.__name__} has no setting '{wrong}'.*'{right}'"):
            kind(**{wrong: 1})
    assert TrainerConfig(100, seed=3).steps == 100


@pytest.mark.parametrize(
    ("build", "nearest"),
    [
        (lambda: from_values(TrainerConfig, {"stepss": 1}, "trainer."), "trainer.steps"),
        (lambda: PolicySpec.from_config({"obs_dim": 1, "action_dim": 1, "horizn": 3}), "horizon"),
        (lambda: make_process({"type": "ddpm_cosine", "num_stps": 3}), "num_steps"),
        (lambda: make_process("ddpm_cosin"), "ddpm_cosine"),
        (lambda: make_solver("dimm"), "ddim"),
        (lambda: make_solver("ddim", etaa=1), "eta"),
        (lambda: make_masking("masked_loglin"), "masked_loglinear"),
        (lambda: settings_of(ActorCritic, {"expectil": 0.9}, "critic"), "expectile"),
    ],
)
def test_every_builder_names_the_nearest(build, nearest):
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        build()


def test_types_are_checked_by_their_path():
    with pytest.raises(ConfigError, match=r"trainer\.steps must be int, got 'many'"):
        from_values(TrainerConfig, {"steps": "many"}, "trainer.")


@pytest.mark.parametrize(
    ("interval", "value", "text"),
    [
        ("[0, 1)", 1.0, r"rate must be in \[0, 1\), got 1.0"),
        ("[1, inf)", 0, "rate must be at least 1, got 0"),
        ("(0, inf)", 0.0, "rate must be positive, got 0.0"),
        ("(1, inf)", 1, "rate must be above 1, got 1"),
        ("[0, 1]", float("nan"), "got nan"),
    ],
)
def test_values_outside_an_interval_are_refused_in_words(interval, value, text):
    check_range(interval, fine=None)
    with pytest.raises(ValueError, match=text):
        check_range(interval, rate=value)


def test_choices_and_shapes_say_what_was_expected():
    check_choice("tail", "hold", ("hold", "extrapolate"))
    with pytest.raises(ValueError, match=r"unknown tail 'hodl'; .*did you mean 'hold'"):
        check_choice("tail", "hodl", ("hold", "extrapolate"))
    check_shape("noise", (4, 16, 3), ("B", 16, 3))
    with pytest.raises(ValueError, match=r"noise must be \[B, 16, 3\], got \[4, 8, 3\]"):
        check_shape("noise", (4, 8, 3), ("B", 16, 3))
