"""A pytest plugin for Megatron-LM's own dataset tests: masked datasets in the place of its own.

    cd /path/to/Megatron-LM
    DIRECT=/path/to/megatron-direct
    PYTHONPATH=$DIRECT/tests/plugins:$DIRECT/tests:$DIRECT MEGATRON_LM_PATH=$PWD \\
        python -m pytest -p all_ones_masks --noconftest -o addopts= tests/unit_tests/data

``GPTDataset`` and ``MockGPTDataset`` are MaskedGPTDatasets whose masks keep every document; with
MASKS=none they are Megatron's own. Without a GPU, megatron_lm_on_cpu answers for it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path

import megatron_lm_on_cpu
import megatron_lm_runs
import numpy as np
import pytest


def _import_from(checkout: str) -> None:
    """megatron.core is the installed one, whose helpers are compiled, if it is of this version.

    Else it is the checkout's own, with these helpers.
    """
    elsewhere = [path for path in sys.path if path not in ("", checkout)]
    installed = importlib.metadata.distribution("megatron-core")
    if megatron_lm_runs.release_of(checkout) == megatron_lm_runs.release(installed.version):
        sys.path[:] = [*elsewhere, checkout]
        return
    sys.path[:] = [checkout, *elsewhere]
    name = "megatron.core.datasets.helpers_cpp"
    file, = Path(str(installed.locate_file("megatron/core/datasets"))).glob("helpers_cpp*.so")
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


_import_from(os.environ["MEGATRON_LM_PATH"])
megatron_lm_on_cpu.stub_missing_packages()

from megatron.core.datasets import gpt_dataset  # noqa: E402

from megatron_direct import MaskedGPTDataset, SampleMask  # noqa: E402
from megatron_direct.data.indexed import dataset_digest  # noqa: E402
from megatron_direct.runtime import parallel  # noqa: E402


class _MaskOfMock(SampleMask):
    """Mock data has no files that a mask could belong to."""

    def require_belongs_to(self, prefix):
        assert prefix is None


class AllOnes(MaskedGPTDataset):
    def _build_document_sample_shuffle_indices(self):
        if self.dataset_path is None:
            self.dataset.document_indices = np.arange(len(self.dataset) + 1)
            mask = _MaskOfMock(np.ones(len(self.dataset)), "mock")
        else:
            mask = SampleMask(np.ones(len(self.dataset.document_indices) - 1),
                              dataset_digest(self.dataset_path))
        self.config.sample_masks = {self.dataset_path: mask}
        return super()._build_document_sample_shuffle_indices()


class AllOnesMock(AllOnes, gpt_dataset.MockGPTDataset):
    pass


@pytest.fixture(scope="session")
def tmp_path_dist_ckpt(tmp_path_factory):
    """Megatron-LM's own stands in the conftest that downloads its test data."""
    return tmp_path_factory.mktemp("dist_ckpt")


def pytest_configure(config):
    stack = megatron_lm_on_cpu.on_this_host()
    stack.enter_context(parallel.process_group())
    config.add_cleanup(stack.close)
    if os.environ.get("MASKS") != "none":
        gpt_dataset.GPTDataset, gpt_dataset.MockGPTDataset = AllOnes, AllOnesMock
