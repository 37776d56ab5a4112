"""What arms may know, out of what was measured."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_direct.comparison import measurements
from megatron_direct.errors import UserError
from megatron_direct.selection.config import SelectionConfig


def test_more_samples_than_have_a_finite_gradient_are_refused(tmp_path, monkeypatch):
    sketches = SimpleNamespace(samples=np.arange(8), finite=np.arange(8) != 3)
    monkeypatch.setattr(measurements, "read_sketches", lambda *_: sketches)
    setting = SimpleNamespace(
        selection=SelectionConfig(num_select=8), num_tokens=64,
        onset=SimpleNamespace(pool=None, valid=None), seed_folder=lambda seed: tmp_path)
    measured = {"onset": SimpleNamespace(store=None, pool=None, valid=None)}
    with pytest.raises(UserError, match="--num-select asks for 8 of the 7 samples that have "
                                        "sketches and finite gradients. Give a smaller number"):
        measurements._case(setting, 1, measured)
