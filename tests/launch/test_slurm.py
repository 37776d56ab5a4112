"""A real Slurm of two virtual nodes: srun, sbatch, a requeue in mid-run, an array of seeds.

``make test-slurm``; needs Debian's packages and root, and says so where they are not there.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import launching
import pytest
import slurm_cluster
from indexed_files import random_documents, write_dataset
from launching import COMMAND, LAYOUT, ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(
    bool(slurm_cluster.obstacle()), reason=slurm_cluster.obstacle() or "-")]

TASKS = ["--nodes", "2", "--ntasks-per-node", "2"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(scope="module")
def variables(cluster) -> dict[str, str]:
    # The commands of this environment, as a user's job finds them.
    path = f"{launching.BIN}:{os.environ['PATH']}"
    return launching.environment(**cluster.variables, PATH=path)


@pytest.fixture(scope="module")
def expected(small_folder) -> dict[str, bytes]:
    run = launching.run_folder(small_folder)
    done = launching.run([*launching.torchrun(), *COMMAND[1:], *launching.select_flags(
        small_folder, run, *LAYOUT)])
    assert done.returncode == 0, done.stderr
    return launching.selected_bytes(run)


def _submit(variables, *words: str) -> str:
    done = launching.run(["sbatch", "--parsable", "--chdir", str(ROOT), *words], variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_srun_selects_what_torchrun_selects(small_folder, expected, variables):
    run = launching.run_folder(small_folder)
    done = launching.run(["srun", *TASKS, *COMMAND, *launching.select_flags(
        small_folder, run, *LAYOUT)], variables)
    assert done.returncode == 0, done.stderr
    assert launching.selected_bytes(run) == expected


def test_the_doctor_sees_both_nodes_tasks(variables, tmp_path):
    done = launching.run(["srun", *TASKS, *COMMAND, "doctor", "--shared-folder", str(tmp_path)],
                         variables)
    assert done.returncode == 0, done.stderr
    assert "4 on " in done.stdout and "(started by srun)" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_batch_script_without_srun_is_refused(small_folder, cluster, variables, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/sh\nexec " + " ".join(
        [*COMMAND, *launching.select_flags(small_folder, small_folder / "refused")]) + "\n")
    job = _submit(variables, *TASKS, "--output", str(tmp_path / "log"), str(script))
    assert cluster.wait(job, ("FAILED", "COMPLETED"), 120) == "FAILED"
    text = (tmp_path / "log").read_text()
    assert "is 4, but nothing says which of 4 ranks this process is" in text
    assert not (small_folder / "refused").exists()


def test_a_job_that_is_requeued_in_mid_run_resumes(
        small_folder, expected, cluster, variables, tmp_path):
    run, log = launching.run_folder(small_folder), tmp_path / "log"
    words = launching.select_flags(small_folder, run, *LAYOUT)[1:]
    job = _submit({**variables, "GPUS_PER_NODE": "2", "ARMS": "direct"}, "--output", str(log),
                  str(ROOT / "launch" / "sbatch_anneal_gpt.sh"), *words,
                  "--lr-wsd-decay-iters", "4", "--save-interval", "1")
    end = time.monotonic() + 200
    while not any(path.stat().st_size for path in run.glob("sketches/rows-*")):
        assert time.monotonic() < end and cluster.state(job) in ("PENDING", "RUNNING"), \
            log.read_text()
        time.sleep(0.05)
    cluster.call("scontrol", "requeue", job)
    cluster.wait(job, ("PENDING",), 60)
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")  # else after two minutes
    assert cluster.wait(job, ("FAILED", "COMPLETED"), 300) == "COMPLETED", log.read_text()
    assert "Restarts=1" in cluster.call("scontrol", "show", "job", job)
    assert launching.selected_bytes(run) == expected
    assert (run / "report.html").is_file()


def test_sigterm_before_the_time_limit_returns_the_job_to_the_queue(cluster, variables, tmp_path):
    """As --signal sends it; in place of the launch there is something that only waits."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "anneal_gpt.sh").write_text(
        'echo "node $SLURM_NODEID of $NUM_NODES meets at $MASTER_ADDR, $RDZV_ID"\n'
        '[ "${SLURM_RESTART_COUNT:-0}" -ge 1 ] || sleep 100\n')
    log = tmp_path / "log"
    job = _submit(variables, "--output", str(log), "--chdir", str(tmp_path),
                  str(ROOT / "launch" / "sbatch_anneal_gpt.sh"))
    end = time.monotonic() + 60
    while not log.exists() or log.read_text().count("meets") < 2:
        assert time.monotonic() < end, cluster.state(job)
        time.sleep(0.1)
    cluster.call("scancel", "--batch", "--signal", "TERM", job)
    cluster.wait(job, ("PENDING",), 60)
    cluster.call("scontrol", "update", f"JobId={job}", "StartTime=now")
    assert cluster.wait(job, ("FAILED", "COMPLETED"), 60) == "COMPLETED", log.read_text()
    lines = [line for line in log.read_text().splitlines() if "meets" in line]
    assert sorted(lines) == sorted(
        f"node {node} of 2 meets at {slurm_cluster.NODES[0]}, {job}-{restart}"
        for node in range(2) for restart in range(2))


def test_an_array_of_seeds_compares_what_one_job_compares(
        small_folder, cluster, variables, tmp_path):
    def flags(run: Path) -> list[str]:
        flags = launching.select_flags(small_folder, run, "--arms", "random", "whole-pool",
                                       "--num-seeds", "2", "--lr-wsd-decay-iters", "2",
                                       "--test-data-path", str(small_folder / "test"))
        return flags[1:]

    write_dataset(small_folder / "test", random_documents(8, 60, seed=9, longest=16))
    script, spread = str(ROOT / "launch" / "sbatch_compare.sh"), small_folder / "spread"
    array = _submit(variables, "--array", "0-1", "--ntasks", "1", "--output",
                    str(tmp_path / "log-%a"), script, *flags(spread))
    report = _submit(variables, "--dependency", f"afterok:{array}", "--ntasks", "1", "--output",
                     str(tmp_path / "log"), script, *flags(spread))
    cluster.wait(report, ("FAILED", "COMPLETED", "CANCELLED"), 400)
    logs = [path.read_text() for path in tmp_path.glob("log*")]
    assert cluster.state(report) == "COMPLETED", logs
    together = small_folder / "together"
    done = launching.run([*COMMAND, "compare", *flags(together)])
    assert done.returncode == 0, done.stderr
    losses = [{str(path.relative_to(run)): json.loads(path.read_text())["after"]
               for path in run.glob("arms/*/*/result.json")} for run in (spread, together)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert (spread / "results.md").is_file()
