"""Settings from plain values."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from diffpolicy.finetune.settings import check_known, setting_names, settings_of


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
    with pytest.raises(ValueError, match="oven has no setting 'door'; it has degrees, fan"):
        settings_of(Oven, {"door": 1}, "oven")
    with pytest.raises(ValueError, match="degrees must be 0 or more"):
        settings_of(Oven, {"degrees": -1}, "oven")
