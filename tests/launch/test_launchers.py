"""The same ranks under torchrun, under mpirun of two kinds, and under what PMIx alone tells.

Slurm's srun is in test_slurm.py, several nodes in test_nodes.py.
"""

from __future__ import annotations

import socket
import subprocess

import launching
import pytest
from launching import COMMAND, LAYOUT

# Open MPI's variables but PMIx's: what any launcher with PMIx sets.
_HIDDEN = [word for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "NODE_RANK")
           for word in ("-u", f"OMPI_COMM_WORLD_{name}")]
# Of four ranks, over nodes: test_slurm.py and test_nodes.py.
_OF_TWO = ["--tensor-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def expected(small_folder) -> dict[str, bytes]:
    run = launching.run_folder(small_folder)
    done = launching.run([*launching.torchrun(2), *COMMAND[1:], *launching.select_flags(
        small_folder, run, *_OF_TWO)])
    assert done.returncode == 0, done.stderr
    return launching.selected_bytes(run)


@pytest.mark.parametrize("launcher", [
    "mpich", pytest.param("open_mpi", marks=pytest.mark.slow),
    pytest.param("pmix", marks=pytest.mark.slow)])
def test_mpirun_selects_what_torchrun_selects(small_folder, expected, launcher):
    pytest.importorskip("mpi4py")
    mpirun = launching.mpich(2) if launcher == "mpich" else launching.open_mpi(2)
    if mpirun is None:
        pytest.skip("there is no such mpirun")
    run = launching.run_folder(small_folder)
    hiding = ["env", *_HIDDEN] if launcher == "pmix" else []
    done = launching.run([*mpirun, *hiding, *COMMAND, *launching.select_flags(
        small_folder, run, *_OF_TWO)])
    assert done.returncode == 0, done.stderr
    found = launching.selected_bytes(run)
    assert found == expected and any(name.endswith(".npz") for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("mpirun", ["mpich", "open_mpi"])
def test_the_script_for_mpirun_runs_every_stage(small_folder, tmp_path, mpirun):
    words = getattr(launching, mpirun)(1)
    if words is None:
        pytest.skip("there is no such mpirun")
    run = tmp_path / "run"
    path = f"{launching.BIN}:{launching.environment()['PATH']}"
    done = launching.run(
        ["bash", str(launching.ROOT / "launch" / "mpirun_anneal_gpt.sh"),
         *launching.select_flags(small_folder, run, *LAYOUT)[1:], "--lr-wsd-decay-iters", "2"],
        launching.environment(
            MPIRUN=words[0], ARMS="direct", PATH=path, GPUS_PER_NODE="4",
            MPIRUN_FLAGS="--oversubscribe" if mpirun == "open_mpi" else ""))
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").is_file()


def test_ranks_meet_where_the_variables_say_and_a_taken_port_is_named(tmp_path):
    """By hand: MASTER_ADDR and MASTER_PORT with MPICH's variables, and no mpi4py."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.listen()
        taken = launching.run(
            [*COMMAND, "doctor"], launching.environment(
                PMI_RANK="0", PMI_SIZE="2", MPI_LOCALRANKID="0", MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port)))
    assert taken.returncode == 1
    assert f"port {port} of 127.0.0.1 is taken by another program. Set MASTER_PORT" in taken.stderr
    started = [subprocess.Popen(
        [*COMMAND, "doctor", "--shared-folder", str(tmp_path)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=launching.environment(
            PMI_RANK=str(rank), PMI_SIZE="2", MPI_LOCALRANKID=str(rank), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port))) for rank in range(2)]
    outputs = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert "2 on " in outputs[0][0] and "(started by MPICH)" in outputs[0][0]
    assert outputs[1][0] == ""


def test_a_process_that_does_not_know_its_rank_writes_nothing(small_folder, tmp_path):
    done = launching.run(
        [*COMMAND, *launching.select_flags(small_folder, tmp_path / "run")],
        launching.environment(SLURM_NTASKS="4"))
    assert done.returncode == 1 and not (tmp_path / "run").exists()
    assert done.stderr.count("megatron-direct: error: SLURM_NTASKS is 4, but nothing says") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("mpirun", "expected_words"), [
    ("mpich", "-np 4 -ppn 2"), ("open_mpi", "-np 4 --bind-to none --host node-a:2,node-b:2")])
def test_the_script_for_mpirun_speaks_both_languages(tmp_path, mpirun, expected_words):
    """Its dry run, with a stand-in for the command that it would start."""
    words = getattr(launching, mpirun)(1)
    if words is None:
        pytest.skip("there is no such mpirun")
    (tmp_path / "megatron-direct").write_text("#!/bin/sh\necho layout of $NUM_NODES nodes\n")
    (tmp_path / "megatron-direct").chmod(0o755)
    environment = launching.environment(MPIRUN=words[0], HOSTS="node-a,node-b", GPUS_PER_NODE="2",
                                        RUN_DIR="a b")
    script = str(launching.ROOT / "launch" / "mpirun_anneal_gpt.sh")
    done = launching.run(
        ["bash", script, "--dry-run", "--load", "x"],
        {**environment, "PATH": f"{tmp_path}:{environment['PATH']}"})
    assert done.returncode == 0, done.stderr
    assert expected_words in done.stdout.replace("\\", "")
    assert "megatron-direct anneal-gpt --dry-run --load x" in done.stdout
    assert "layout of 2 nodes" in done.stdout
    assert ("-x RUN_DIR" in done.stdout) == (mpirun == "open_mpi")
