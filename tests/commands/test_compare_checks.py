"""What `compare` checks before any work, without a model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_direct.commands import compare as compare_command
from megatron_direct.comparison.earlier_calls import (
    given_paths,
    require_same_names,
    require_same_proxy,
)
from megatron_direct.comparison.measurements import CompareConfig, Setting
from megatron_direct.errors import UserError
from megatron_direct.runtime.manifest import Artefact, Key
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.steps.curvature_config import CurvatureConfig
from megatron_direct.steps.measure import MeasureSettings
from megatron_direct.steps.pilot import PilotConfig
from megatron_direct.steps.sketch import SketchConfig


def _setting(folder: Path, *arms: str, num_valid: int = 20, **sketch) -> Setting:
    onset = SimpleNamespace(
        pool=SimpleNamespace(prefixes=[str(folder / "a")]),
        valid=SimpleNamespace(prefixes=[str(folder / "a")], usable=np.arange(num_valid)),
        checkpoint=SimpleNamespace(has_readable_optimizer=True, path=folder / "theta",
                                   digest="one"))
    return Setting(CompareConfig(test_data_path=("data/test",), arms=arms), folder / "run", onset,
                   MeasureSettings(PilotConfig(), SketchConfig(**sketch), CurvatureConfig()),
                   SelectionConfig())


def test_an_arm_that_is_named_twice_is_run_once(tmp_path):
    assert compare_command._arms(_setting(tmp_path, "random", "direct", "random")) == [
        "random", "direct"]


@pytest.mark.parametrize("settings", [{"num_valid": 7}, {"num_valid_samples": 7}])
def test_half_of_a_small_validation_set_judges_no_share(tmp_path, settings, capsys):
    with pytest.raises(UserError, match="--arms direct-share: .* its 7 samples are too few: it "
                                        "takes 8. Give more validation data, or leave"):
        compare_command._arms(_setting(tmp_path, "random", "direct-share", **settings))
    asked_for_nothing = dataclasses.replace(
        _setting(tmp_path, **settings), config=CompareConfig(test_data_path=("data/test",)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_command, "states_of_training", lambda _: None)
        found = compare_command._arms(asked_for_nothing)
    assert "direct-share" not in found and "direct" in found
    assert "direct-share: left out, since" in capsys.readouterr().out


def test_datasets_that_results_are_of_under_other_names_are_refused(tmp_path):
    setting = _setting(tmp_path)
    artefact = Artefact(setting.folder, "a comparison")
    artefact.begin(Key(), given_paths(setting))

    def check(path: str) -> None:
        require_same_names(dataclasses.replace(
            setting, config=CompareConfig(test_data_path=(path,))), artefact)

    check("elsewhere/test")
    with pytest.raises(UserError, match="--test-data-path gives copy, and the results in .*run are "
                                        "of the same datasets as test: .* end as before"):
        check("data/copy")


def test_another_smaller_model_is_refused(tmp_path):
    def check(digest: str) -> None:
        require_same_proxy(tmp_path / "proxy.json", SimpleNamespace(
            checkpoint=SimpleNamespace(path=Path(f"small-{digest}"), digest=digest)))

    check("one")
    check("one")
    with pytest.raises(UserError, match="--proxy-load small-two is another checkpoint than "
                                        "small-one, at which arms of .* Give that one, or"):
        check("two")
