"""Megatron-LM's own dataset tests, with masked datasets in the place of its own.

Any checkout: where it is not of the version of the installed megatron-core, megatron.core comes
from it too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from megatron_lm_runs import ROOT

# In these no GPTDataset takes part; they need nltk, and vocabularies from the network.
_OF_TOOLS = ("test_bin_reader.py", "test_preprocess_data.py", "test_preprocess_mmdata.py")


def _outcomes(masks: str, report: Path) -> dict[str, str]:
    """{test: how it ended}, with ``masks`` of all ones, or none."""
    checkout = os.environ["MEGATRON_LM_PATH"]
    path = [str(ROOT / "tests" / "plugins"), str(ROOT / "tests"), str(ROOT),
            *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "all_ones_masks", "--noconftest",
         "-p", "no:cacheprovider", "-o", "addopts=", "--junit-xml", str(report),
         *(f"--ignore=tests/unit_tests/data/{name}" for name in _OF_TOOLS),
         "tests/unit_tests/data"],
        cwd=checkout, capture_output=True, text=True, timeout=1800,
        env={**os.environ, "MASKS": masks, "PYTHONPATH": os.pathsep.join(filter(None, path))})
    assert report.is_file(), done.stdout[-5000:] + done.stderr[-5000:]
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        ending = next((child.tag for child in case if child.tag in ("skipped", "failure", "error")),
                      "passed")
        outcomes[f"{case.get('classname')}.{case.get('name')}"] = ending
    return outcomes


@pytest.mark.skipif("MEGATRON_LM_PATH" not in os.environ,
                    reason="MEGATRON_LM_PATH is not set: needs a checkout of Megatron-LM")
def test_as_many_pass_under_masks_that_keep_everything(tmp_path, capsys):
    own = _outcomes("none", tmp_path / "own.xml")
    ours = _outcomes("ones", tmp_path / "ours.xml")
    with capsys.disabled():
        print(f"\nMegatron-LM's tests/unit_tests/data: its own class {dict(Counter(own.values()))},"
              f" MaskedGPTDataset {dict(Counter(ours.values()))}")
    assert Counter(own.values())["passed"] >= 100
    assert {test: (own[test], ours.get(test)) for test in own if ours.get(test) != own[test]} == {}
