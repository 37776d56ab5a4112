"""launch/anneal_gpt.sh as a NeMo-Run experiment, on this machine or on a Slurm cluster.

    python launch/nemo_run_anneal_gpt.py --flags "--load theta --run-dir runs/mine ..."
    python launch/nemo_run_anneal_gpt.py --account A --partition P --nodes 4 --gpus-per-node 8 \\
        --container-image nvcr.io/mine/megatron-direct:latest --flags "..."

On Slurm srun starts one task for each GPU, and megatron-direct finds its ranks by Slurm's
variables; on one machine the script starts torchrun. The recipes are functions, to be used from a
file of your own. --dry-run shows what NeMo-Run would submit. On Slurm tasks start in a folder of
NeMo-Run's: give absolute paths below this repository. Needs ``pip install nemo_run``.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from pathlib import Path

import nemo_run as run

SCRIPT = "launch/anneal_gpt.sh"


@dataclass(frozen=True)
class Cluster:
    """What Slurm is asked for. folder: the repository, on a file system that all nodes share."""

    account: str
    partition: str
    nodes: int
    gpus_per_node: int
    folder: str
    container_image: str | None = None
    time: str = "04:00:00"


def on_this_machine(flags: list[str], gpus: int) -> tuple[run.Script, run.LocalExecutor]:
    return (run.Script(path=SCRIPT, args=flags),
            run.LocalExecutor(env_vars={"GPUS_PER_NODE": str(gpus)}))


def on_slurm(flags: list[str], cluster: Cluster) -> tuple[run.Script, run.SlurmExecutor]:
    executor = run.SlurmExecutor(
        account=cluster.account, partition=cluster.partition, nodes=cluster.nodes,
        ntasks_per_node=cluster.gpus_per_node, gpus_per_node=cluster.gpus_per_node,
        time=cluster.time, container_image=cluster.container_image,
        container_mounts=[f"{cluster.folder}:{cluster.folder}"],
        packager=run.Packager(),
        tunnel=run.LocalTunnel(job_dir=f"{cluster.folder}/runs/nemo-run"))
    # A rank each: the script's Python half.
    return run.Script(path=f"{cluster.folder}/{SCRIPT}", entrypoint="python", args=flags), executor


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--account", help="Slurm account; without it all runs on this machine")
    parser.add_argument("--partition", default="batch")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=1)
    parser.add_argument("--container-image")
    parser.add_argument("--flags", type=shlex.split, default=[], help="those of anneal_gpt.sh")
    parser.add_argument("--dry-run", action="store_true")
    found = parser.parse_args()
    if found.account:
        script, executor = on_slurm(found.flags, Cluster(
            found.account, found.partition, found.nodes, found.gpus_per_node, str(Path.cwd()),
            found.container_image))
    else:
        script, executor = on_this_machine(found.flags, found.gpus_per_node)
    with run.Experiment("anneal-gpt") as experiment:
        experiment.add(script, executor=executor, name="anneal-gpt")
        if found.dry_run:
            experiment.dryrun()
        else:
            experiment.run()


if __name__ == "__main__":
    main()
