"""Two nodes of two ranks by torchrun, as network namespaces: TP 2 within a node, PP 2 across.

``make test-nodes``; needs root, and says so where there is none.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import hosts
import launching
import numpy as np
import pytest
from launching import LAYOUT, ROOT

from megatron_direct.data.mask import SampleMask

pytestmark = [pytest.mark.nodes,
              pytest.mark.skipif(bool(hosts.obstacle()), reason=hosts.obstacle() or "-")]

LIMIT_MINUTES = 1
SECONDS_TO_REPORT = 90  # a silent rank, or a silent store, is given up after 40


@pytest.fixture
def two_hosts(tmp_path):
    with hosts.two_hosts(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def expected(small_folder) -> dict[str, bytes]:
    """What four ranks of one node select, which is what one rank selects."""
    run, alone = launching.run_folder(small_folder), small_folder / "one-rank"
    for launcher, to, layout in ((launching.torchrun(), run, LAYOUT),
                                 (launching.torchrun(1), alone, [])):
        done = launching.run([*launcher, *launching.COMMAND[1:], *launching.select_flags(
            small_folder, to, *layout)])
        assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(_kept(run), _kept(alone))
    return launching.selected_bytes(run)


def _kept(run: Path) -> np.ndarray:
    return SampleMask.load(run / "selections" / "direct" / "masks" / "pool.mask.npz").keep


@dataclass(frozen=True)
class Launched:
    process: subprocess.Popen
    log: Path

    def output(self) -> str:
        return self.log.read_text()


@contextmanager
def _launched(two_hosts, words: list[str], **variables: str) -> Iterator[list[Launched]]:
    """A command on each host; what still runs at the end is killed."""
    started = []
    try:
        for host in two_hosts:
            log = host.hosts_file.with_name(f"log-of-{host.name}")
            with open(log, "w") as file:
                started.append(Launched(subprocess.Popen(
                    host.command(words), stdout=file, stderr=subprocess.STDOUT,
                    env=launching.environment(NUM_NODES="2", GPUS_PER_NODE="2",
                                              MASTER_ADDR="node-a", **variables)), log))
        yield started
    finally:
        for launched in started:
            if launched.process.poll() is None:
                launched.process.terminate()  # torchrun ends its ranks
                try:
                    launched.process.wait(30)
                except subprocess.TimeoutExpired:
                    launched.process.kill()
            launched.process.wait()


def _ended(started: list[Launched], seconds: float) -> list[str]:
    for launched in started:
        launched.process.wait(seconds)
    return [launched.output() for launched in started]


def _torchrun(*words: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "node-a:6000", "--rdzv-id", "test",
            *launching.COMMAND[1:], *words]


def test_the_launch_script_on_two_nodes_selects_what_one_node_selects(
        small_folder, expected, two_hosts):
    run = launching.run_folder(small_folder)
    words = ["bash", str(ROOT / "launch" / "anneal_gpt.sh"),
             *launching.select_flags(small_folder, run, *LAYOUT)[1:], "--lr-wsd-decay-iters", "2"]
    with _launched(two_hosts, words, ARMS="direct",
                   TORCHRUN=f"{sys.executable} -m torch.distributed.run") as started:
        outputs = _ended(started, 300)
    assert [each.process.returncode for each in started] == [0, 0], outputs
    assert launching.selected_bytes(run) == expected
    assert (run / "report.html").is_file()


def test_a_link_that_is_cut_in_mid_sketch_is_reported_and_the_run_resumes(
        small_folder, expected, two_hosts):
    """On a slow link, which changes nothing else."""
    run = launching.run_folder(small_folder)
    words = _torchrun(*launching.select_flags(
        small_folder, run, *LAYOUT, "--micro-batch-size", "1", "--distributed-timeout-minutes",
        str(LIMIT_MINUTES)))
    for host in two_hosts:
        host.slow_down("200kbit")  # the sketches take seconds, in which the link can be cut
    with _launched(two_hosts, words) as started:
        end = time.monotonic() + 200
        while not any(path.stat().st_size for path in run.glob("sketches/rows-*")):
            assert time.monotonic() < end and all(s.process.poll() is None for s in started), \
                [each.output() for each in started]
            time.sleep(0.05)
        two_hosts[0].link("down")
        end = time.monotonic() + SECONDS_TO_REPORT
        # On both nodes. torchrun's own agent beyond the link waits for its store longer.
        # These nodes share their kernel: that rank 3 has left may be seen before it is silent.
        expected_words = ("error: rank 3 (process ", "lost the launcher's store")
        while not all(words in each.output() for each, words in zip(
                started, expected_words, strict=True)):
            assert time.monotonic() < end, [each.output() for each in started]
            time.sleep(0.5)
        assert all("Run the command again: it resumes" in each.output() for each in started)
        assert started[0].process.wait(60) == 1
    assert not (run / "selections").exists()

    two_hosts[0].link("up")
    for host in two_hosts:
        host.slow_down("1mbit")
    with _launched(two_hosts, words) as started:
        outputs = _ended(started, 400)
    assert [each.process.returncode for each in started] == [0, 0], outputs
    # Another micro-batch size: equal up to rounding, and so the same samples.
    np.testing.assert_array_equal(_kept(run), _kept(small_folder / "one-rank"))


def test_a_name_that_does_not_resolve_is_named(small_folder, two_hosts):
    words = launching.select_flags(small_folder, small_folder / "nowhere", *LAYOUT)
    done = launching.run(
        two_hosts[1].command(["bash", str(ROOT / "launch" / "anneal_gpt.sh"), *words[1:]]),
        launching.environment(NUM_NODES="2", MASTER_ADDR="node-c"))
    assert done.returncode == 1
    assert "node-b does not know the host MASTER_ADDR, node-c. Give a name" in done.stderr
    # Found by address, node-a then tells its host name to node-b, which does not know it.
    two_hosts[1].hosts_file.write_text(f"127.0.0.1 localhost\n{two_hosts[1].address} node-b\n")
    started = _torchrun("doctor", "--distributed-timeout-minutes", str(LIMIT_MINUTES))
    started[started.index("node-a:6000")] = f"{two_hosts[0].address}:6000"
    with _launched(two_hosts, started) as processes:
        outputs = _ended(processes, 200)
    assert all(each.process.returncode for each in processes)
    assert "node-b does not know the host 'node-a', where rank 0 is to be met" in outputs[1]
    assert "--local-addr" in outputs[1]
