"""Which rank a process is, from its launcher's variables alone.

The variables are those that the launchers set here: torch 2.13, Open MPI 4.1.4, MPICH 5.0.2 and
Slurm 22.05, or those that their documentation names.
"""

from __future__ import annotations

import re

import pytest
import torch

from megatron_direct.errors import UserError
from megatron_direct.runtime import host, ranks
from megatron_direct.runtime.ranks import Rank

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_RANK": "1",
            "MASTER_ADDR": "node-a", "MASTER_PORT": "29400"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8",
            "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
            "OMPI_COMM_WORLD_NODE_RANK": "1", "PMIX_RANK": "5", "PMIX_NAMESPACE": "47448065"}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4",
         "PMI_FD": "9"}
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8",
         "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "12",
         "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "node[07-08]",
         "SLURM_JOB_NODELIST": "node[06-08]"}


def test_a_process_that_was_started_alone_is_the_only_rank():
    alone = ranks.discover({"HOME": "/"})
    assert alone == Rank() and not alone.is_launched


@pytest.mark.parametrize(("variables", "launcher", "master"), [
    (TORCHRUN, "torchrun", ("node-a", 29400)),
    (OPEN_MPI, "Open MPI", ("", 0)),
    (MPICH, "MPICH", ("", 0)),
    # Of the step, whose first node may not be the job's; 20000 + 31 * 12.
    (SLURM, "srun", ("node07", 20372)),
], ids=lambda value: value if isinstance(value, str) else "")
def test_each_launcher_says_which_rank_a_process_is(variables, launcher, master):
    found = ranks.discover(variables)
    assert found == Rank(5, 8, 1, 1, launcher, *master) and found.is_launched


@pytest.mark.parametrize("variables", [OPEN_MPI, MPICH, SLURM, TORCHRUN])
def test_an_address_that_is_given_is_taken(variables):
    found = ranks.discover({**variables, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (found.master_addr, found.master_port) == ("10.0.0.1", 4000)


@pytest.mark.parametrize(("outer", "inner"), [
    (SLURM, TORCHRUN), (SLURM, OPEN_MPI), (SLURM, MPICH), (OPEN_MPI, TORCHRUN)])
def test_of_two_launchers_the_inner_one_counts(outer, inner):
    """srun starts one torchrun agent, or one of mpirun's, on each node: its variables remain."""
    outer = {name: "0" if "RANK" in name or name.endswith("ID") else value
             for name, value in outer.items()}
    assert ranks.discover({**outer, **inner}).launcher == ranks.discover(inner).launcher


def test_srun_with_an_mpi_of_slurms_own_is_srun():
    """``srun --mpi=pmi2`` and ``--mpi=pmix`` set PMI's variables beside Slurm's."""
    for more in ({"PMI_RANK": "5", "PMI_SIZE": "8"}, {"PMIX_RANK": "5"}):
        assert ranks.discover({**SLURM, **more}).launcher == "srun"


def test_one_node_of_slurm_needs_no_name():
    one = {**SLURM, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "node07"}
    assert ranks.discover(one).master_addr == "127.0.0.1"


def test_steps_of_slurm_meet_at_ports_of_their_own():
    ports = {ranks.discover({**SLURM, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
                            ).master_port for job in range(50, 60) for step in range(20)}
    assert len(ports) == 200 and min(ports) >= 20000 and max(ports) < 32768


@pytest.mark.parametrize(("hosts", "first"), [
    ("alone", "alone"), ("a,b", "a"), ("node[3,7-9]", "node3"), ("node[007-012]", "node007"),
    ("rack[2-3]node[10,4]-ib,login[1-2]", "rack2node10-ib"), ("n[1-2].cluster,x", "n1.cluster")])
def test_the_first_host_of_a_list(hosts, first):
    assert ranks.first_host(hosts) == first


@pytest.mark.parametrize("variables", [
    {"SLURM_NTASKS": "4"},  # in the shell of salloc
    # A batch script, which is no task of a step.
    {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"},
    {"OMPI_COMM_WORLD_SIZE": "4"}, {"PMI_SIZE": "4"},
    {"MV2_COMM_WORLD_SIZE": "4"}], ids=lambda variables: next(iter(variables)))
def test_one_of_several_that_does_not_know_which_is_refused(variables):
    name = next(iter(variables))
    with pytest.raises(UserError, match=f"{name} is 4, but nothing says which of 4 ranks this "
                                        "process is.*run directory.*srun, torchrun or mpirun"):
        ranks.discover(variables)
    assert ranks.discover({**variables, name: "1"}) == Rank()


@pytest.mark.parametrize(("variables", "match"), [
    ({"RANK": "0"}, "torchrun has set a rank, but not WORLD_SIZE"),
    ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE is 'many': expected a whole number"),
    ({**MPICH, "PMI_RANK": "-1"}, "PMI_RANK is '-1': expected a whole number"),
    ({**TORCHRUN, "RANK": "8"}, "torchrun says that this is rank 8 of 8, which counts from 0"),
    ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
     "Open MPI has set a rank, but not OMPI_COMM_WORLD_LOCAL_RANK"),
])
def test_variables_that_contradict_each_other_are_named(variables, match):
    with pytest.raises(UserError, match=re.escape(match)):
        ranks.discover(variables)


def test_without_a_gpu_the_device_is_the_cpu_and_the_backend_gloo():
    expected = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
    assert (host.device().type, host.collective_backend()) == expected


@pytest.mark.parametrize(("visible", "number"), [(1, 0), (4, 1)])
def test_a_task_that_is_shown_one_gpu_alone_takes_it(monkeypatch, visible, number):
    monkeypatch.setattr(host, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(ranks, "discover", lambda: Rank(5, 8, 1))
    assert host.device() == torch.device("cuda", number)
