"""The study's plan: what is run first, and that no arm is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_direct.comparison import measurements  # noqa: F401  (registers all arms)
from megatron_direct.comparison.arms import REGISTRY

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import package_study as study


def test_arms_and_settings_are_what_there_is():
    for stage in study.STAGES:
        assert set(stage.arms) <= set(REGISTRY) and set(stage.settings) <= set(study.SETTINGS)


def test_every_setting_has_every_arm_and_seed_once():
    runs = [(arm, setting, seeds) for stage, seeds, setting in study.order(
        study.STAGES, 3, list(study.SETTINGS)) for arm in stage.arms]
    assert len(runs) == len(set(runs))
    for setting in study.MOST_IMPORTANT:
        assert {arm for arm, name, _ in runs if name == setting} == {
            *study.FIRST, *study.DECISIONS, *study.RIVALS, *study.CEILING}


@pytest.mark.parametrize("settings", [list(study.SETTINGS), ["other", "noisy"]])
def test_the_first_stage_has_all_seeds_before_the_next_begins(settings):
    plan = list(study.order(study.STAGES, 3, settings))
    first = [(seeds, name) for stage, seeds, name in plan if stage == study.STAGES[0]]
    wanted = [name for name in study.MOST_IMPORTANT if name in settings]
    assert first == [(seeds, name) for seeds in (1, 2, 3) for name in wanted]
    assert [stage for stage, _, _ in plan[: len(first)]] == [study.STAGES[0]] * len(first)
