"""The command as a user starts it: an error is reported once, every rank fails, none hangs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from indexed_files import random_documents, write_dataset

ROOT = Path(__file__).parents[2]
RANKS = 2


def _torchrun(*arguments: str, environment=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(RANKS), *arguments], capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})})


def test_importing_the_package_is_light():
    code = ("import sys, megatron_direct; from megatron_direct import stiff_budget; "
            "assert not {'torch', 'megatron.core'} & set(sys.modules), 'heavy'; "
            "from megatron_direct import SampleMask; assert 'torch' not in sys.modules; "
            "assert 'MaskedGPTDataset' in dir(megatron_direct)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there():
    import megatron_direct

    for name in megatron_direct.__all__:
        assert getattr(megatron_direct, name).__module__.startswith("megatron_direct")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = megatron_direct.nonsense


@pytest.mark.parametrize("command", ["pretrain", "select", "anneal", "report", "anneal-gpt"])
def test_help_names_megatrons_flags(command):
    done = subprocess.run([sys.executable, "-m", "megatron_direct", command, "--help"],
                          capture_output=True, text=True, check=True)
    if command != "report":
        for flag in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size"):
            assert flag in done.stdout


def test_an_error_is_reported_once_and_every_rank_fails(tmp_path):
    prefix = write_dataset(tmp_path / "a", random_documents(10, 20))
    os.truncate(prefix + ".bin", 8)
    done = _torchrun("-m", "megatron_direct", "pretrain", "--data-path", prefix, "--save",
                     str(tmp_path / "theta"), "--vocab-size", "20")
    assert done.returncode != 0
    assert done.stderr.count("megatron-direct: error:") == 1
    assert re.search(r"a\.bin is truncated: .*a\.idx promises", done.stderr)
    assert "Traceback" not in done.stderr.split("error:")[0]
    assert len(re.findall(r"exitcode *: 1 ", done.stderr)) >= 1
    assert not (tmp_path / "theta").exists()


def test_an_error_of_one_rank_alone_is_reported_too(tmp_path):
    """As when one rank alone reads a damaged sample, and the others wait for it."""
    script = tmp_path / "one_rank.py"
    script.write_text(
        "from megatron_direct.cli import main as cli\n"
        "from megatron_direct.errors import UserError\n"
        "import sys, torch.distributed as dist\n"
        "def work():\n"
        "    if dist.get_rank() == 1:\n"
        "        raise UserError('only rank 1 met this')\n"
        "    dist.barrier()\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(cli.run(work))\n")
    done = _torchrun(str(script))
    assert done.returncode != 0
    assert done.stderr.count("megatron-direct: error: only rank 1 met") == 1


@pytest.mark.parametrize("command", [
    "select", pytest.param("doctor", marks=pytest.mark.slow)])
def test_a_backend_that_there_is_no_gpu_for_is_refused_once(tmp_path, command):
    flags = () if command == "doctor" else (
        "--load", str(tmp_path), "--data-path", str(tmp_path / "a"), "--valid-data-path",
        str(tmp_path / "v"), "--run-dir", str(tmp_path / "run"))
    done = _torchrun("-m", "megatron_direct", command, *flags, "--distributed-backend", "nccl",
                     environment={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode != 0
    assert done.stderr.count("error: --distributed-backend nccl needs a GPU for each rank") == 1
    assert not (tmp_path / "run").exists()


def test_a_backend_that_is_asked_for_carries_the_collectives(tmp_path):
    done = _torchrun("-m", "megatron_direct", "doctor", "--shared-folder", str(tmp_path),
                     "--distributed-backend", "gloo")
    assert done.returncode == 0, done.stderr
    assert re.search(r"collectives: +gloo, \d+ sums", done.stdout)


def test_launch_script_runs_under_bash_and_names_what_is_missing():
    environment = {k: v for k, v in os.environ.items()
                   if k not in ("CHECKPOINT_PATH", "DATA_PATH", "RUN_DIR")}
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "anneal_gpt.sh")], capture_output=True, text=True,
        timeout=240, env={**environment, "TORCHRUN": f"{sys.executable} -m torch.distributed.run"})
    assert done.returncode != 0
    assert done.stderr.count("error: --load is missing. Give it, or set CHECKPOINT_PATH.") == 1


@pytest.mark.parametrize("name", ["GPUS_PER_NODE", "NUM_NODES", "NODE_RANK", "MASTER_PORT",
                                  "TENSOR_MODEL_PARALLEL_SIZE", "PIPELINE_MODEL_PARALLEL_SIZE"])
@pytest.mark.parametrize("value", ["PPID[$(touch x)]", "-1", "1e3", "0x10", " 2", "1\n2", "08"])
def test_launch_script_takes_numbers_alone(tmp_path, name, value):
    """Bash runs a command that stands in the subscript of what it computes with."""
    environment = {**os.environ, "NUM_NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "localhost",
                   "TORCHRUN": f"{sys.executable} -c open('started','w')"}
    done = subprocess.run(["bash", str(ROOT / "launch" / "anneal_gpt.sh")], capture_output=True,
                          text=True, cwd=tmp_path, env={**environment, name: value})
    assert done.returncode == 1
    assert re.search(rf"error: {name} is .*: expected a whole number", done.stderr)
    assert not list(tmp_path.iterdir())
    subprocess.run(["bash", str(ROOT / "launch" / "anneal_gpt.sh")], cwd=tmp_path, check=True,
                   env={**environment, name: "2"}, capture_output=True)
    assert (tmp_path / "started").is_file()


@pytest.mark.parametrize(("variables", "match"), [
    ({"ARMS": "drect"}, "ARMS is 'drect': expected direct, random or both"),
    ({"ARMS": " "}, "ARMS is '': expected"),
    ({"NUM_SELECT": "many"}, "NUM_SELECT is 'many': it is not a valid value of --num-select"),
    ({"LR_WSD_DECAY_ITERS": "0"}, "--lr-wsd-decay-iters is 0: it must be at least 1"),
    ({"TENSOR_MODEL_PARALLEL_SIZE": "-1"}, "--tensor-model-parallel-size is -1: it must be"),
])
def test_wrong_variables_are_reported_before_any_work(tmp_path, monkeypatch, variables, match):
    from megatron_direct.cli import anneal_gpt
    from megatron_direct.errors import UserError

    for name, value in {"CHECKPOINT_PATH": "theta", "DATA_PATH": "a", "VALID_DATA_PATH": "v",
                        "RUN_DIR": str(tmp_path / "run"), **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(match)):
        anneal_gpt._run(anneal_gpt.make_parser().parse_args([]))
    assert not (tmp_path / "run").exists()


def test_flags_that_say_nothing_are_refused(tmp_path, monkeypatch):
    """Which selection is annealed, and of what size a random one is."""
    from megatron_direct.cli import anneal_gpt
    from megatron_direct.commands.arm import AnnealConfig
    from megatron_direct.errors import UserError

    flags = ["--load", "theta", "--data-path", "a", "--valid-data-path", "v", "--run-dir",
             str(tmp_path / "run")]
    monkeypatch.delenv("ARMS", raising=False)
    with pytest.raises(UserError, match="--selection and --size-of are for `anneal` alone: ARMS"):
        anneal_gpt._run(anneal_gpt.make_parser().parse_args([*flags, "--selection", "random"]))
    with pytest.raises(UserError, match="--size-of many has no effect without --selection random"):
        AnnealConfig(run_dir="run", size_of="many")
    AnnealConfig(run_dir="run", selection="random", size_of="many")
