"""What the doctor finds where something is missing, broken, or not shared."""

from __future__ import annotations

import sys

import pytest
from ranks import run_on_ranks

from megatron_direct.cli import doctor as command
from megatron_direct.commands import doctor, inventory
from megatron_direct.commands.doctor import DoctorConfig
from megatron_direct.errors import UserError
from megatron_direct.runtime.findings import Finding, State, look


def _by_name(findings) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def test_this_environment_is_sound():
    found = _by_name(inventory.inventory())
    assert list(found) == ["python", "torch", "CUDA", "collectives", "megatron-core",
                           "transformer-engine", "apex", "mpi4py", "Slurm"]
    assert not [f for f in found.values() if f.state is State.BROKEN]
    assert found["megatron-core"].state is State.GOOD


def test_what_raises_is_broken_and_named():
    def check():
        raise OSError("libcudart.so.13: cannot open\nmore")

    found = look("torch", check)
    assert found.state is State.BROKEN and found.text == "OSError: libcudart.so.13: cannot open"
    with pytest.raises(UserError, match="not sound: torch"):
        doctor.require_sound([found])


def test_a_package_that_is_there_and_cannot_be_imported_is_broken(monkeypatch, tmp_path):
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise ImportError('no cudnn')")
    monkeypatch.syspath_prepend(tmp_path)
    found = _by_name(inventory.inventory())["transformer-engine"]
    assert (found.state, found.text) == (State.BROKEN, "ImportError: no cudnn")


@pytest.mark.parametrize(("version", "state"), [
    ("0.16.0", State.BROKEN), ("0.16.1", State.GOOD), ("0.19.2", State.GOOD),
    ("0.20.0", State.BROKEN)])
def test_a_version_of_megatron_core_that_is_not_supported(monkeypatch, version, state):
    monkeypatch.setattr("megatron_direct.mcore.compat.imported_version", lambda: version)
    found = _by_name(inventory.inventory())["megatron-core"]
    assert found.state is state and version in found.text


def test_a_gpu_that_torch_cannot_use_is_broken(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(inventory, "_NVIDIAS_DEVICE", tmp_path)
    found = _by_name(inventory.inventory())["CUDA"]
    assert found.state is State.BROKEN and "CUDA_VISIBLE_DEVICES" in found.remedy


def test_remedies_of_what_is_broken_come_first():
    findings = [Finding("a", State.ABSENT, "", "for a."), Finding("b", State.GOOD, "", "no."),
                Finding("c", State.BROKEN, "", "repair c.")]
    assert doctor.remedies(findings) == ["c: repair c.", "a: for a."]


def _tried(folders):
    import torch.distributed as dist

    return doctor.trials(DoctorConfig(shared_folder=folders[dist.get_rank()]))


def test_two_ranks_that_share_a_folder(tmp_path):
    for findings in run_on_ranks(2, _tried, [str(tmp_path)] * 2):
        assert [f.state for f in findings] == [State.GOOD] * 3
        assert "2 on " in findings[0].text and "gloo, " in findings[1].text
    assert list(tmp_path.iterdir()) == []


def _tried_on_folders_of_their_own(folder):
    """As where each node has a disk of its own under one path: rank 1 looks elsewhere."""
    import torch.distributed as dist

    original = doctor._blind_ranks
    with pytest.MonkeyPatch.context() as patch:  # ranks serve other tests as well
        patch.setattr(doctor, "_SECONDS_TO_SEE_A_FILE", 0.5)
        if dist.get_rank() == 1:
            patch.setattr(doctor, "_blind_ranks", lambda path, text: original(
                path.parent / "elsewhere" / path.name, text))
        return doctor.trials(DoctorConfig(shared_folder=folder))[2]


def test_a_folder_that_is_not_shared_is_broken(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for found in run_on_ranks(2, _tried_on_folders_of_their_own, str(tmp_path)):
        assert found.state is State.BROKEN
        assert "a file of rank 0 is not seen by rank 1" in found.text
        assert "--run-dir" in found.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_what_is_needed_and_broken_ends_it_before_any_trial(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import of it fails
    with pytest.raises(SystemExit) as ended:
        command.main([])
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "!!  torch:" in printed and "What works" not in printed
    assert "torch: repair torch, or install it again." in printed
