"""``--dry-run``: commands that parse back to the request, and a layout that is Megatron's."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess

import launching
import pytest
from launching import ROOT
from ranks import LAYOUTS, on_layout
from trained import SMALL

from megatron_direct.cli import anneal_gpt, dry_run, flags
from megatron_direct.cli.main import make_parser
from megatron_direct.cli.registry import COMMANDS
from megatron_direct.commands.select import SelectRequest
from megatron_direct.config import ModelConfig, ParallelConfig
from megatron_direct.errors import UserError
from megatron_direct.steps.placement import Placement

SELECT = ["--load", "theta with space", "--data-path", "a", "b", "--valid-data-path", "v",
          "--run-dir", "run", "--num-select", "7", "--quotas", "a:1:3", "--hidden-size", "16",
          "--seed", "5", "--sequence-parallel", "--tensor-model-parallel-size", "2"]


def _parsed(words: list[str]):
    found = make_parser().parse_args(words)
    return flags.request_from(COMMANDS[found.command].load()[0], found)


@pytest.mark.parametrize("words", [
    ["select", *SELECT],
    ["anneal", "--run-dir", "run", "--no-load-optim", "--data-path", "0.3", "a", "--lr", "0.5"],
    ["pretrain", "--data-path", "a", "--save", "s", "--num-layers", "3", "--lr", "1e-05"],
    ["report", "--run-dir", "a'b"],
], ids=lambda words: words[0])
def test_the_command_that_is_printed_makes_the_same_request(words):
    request = _parsed(words)
    line = dry_run.command_line(words[0], request)
    assert _parsed(shlex.split(line)[1:]) == request


def test_the_launch_prints_every_stage_with_its_own_flags():
    found = anneal_gpt.make_parser().parse_args(
        [*SELECT, "--lr-wsd-decay-iters", "9", "--test-data-path", "t"])
    request = flags.request_from(anneal_gpt.LaunchRequest, found)
    calls = anneal_gpt._calls(request, ["direct", "random"])
    assert [name for name, _ in calls] == ["select", "anneal", "anneal", "report"]
    for name, of_stage in calls:
        parsed = _parsed(shlex.split(dry_run.command_line(name, of_stage))[1:])
        # A stage may be given more than its command has flags for, such as the model's.
        assert all(getattr(parsed, field.name) == getattr(of_stage, field.name)
                   for field in dataclasses.fields(of_stage) if field.name != "given")
    assert calls[0][1] == _parsed(["select", *SELECT])


def test_the_launch_prints_the_length_of_its_annealing_where_the_number_depends_on_it(small_folder):
    words = launching.select_flags(small_folder, small_folder / "no")[1:]
    at = words.index("--num-select")
    auto = words[:at] + words[at + 2:]
    for given, expected in (
            (auto, f"--anneal-tokens {9 * 4 * 12}"),  # iterations x batch x sequence length
            ([*auto, "--global-batch-size", "8"], f"--anneal-tokens {9 * 8 * 12}"),
            ([*auto, "--anneal-tokens", "77"], "--anneal-tokens 77"), (words, None)):
        line = _select_of_launch([*given, "--lr-wsd-decay-iters", "9"])
        assert expected in line if expected else "--anneal-tokens" not in line
    not_there = [*auto, "--load", str(small_folder / "none")]
    assert "--anneal-tokens" not in _select_of_launch(not_there)


def _select_of_launch(words: list[str]) -> str:
    found = anneal_gpt.make_parser().parse_args(words)
    request = flags.request_from(anneal_gpt.LaunchRequest, found)
    name, of_stage = anneal_gpt._calls(request, ["direct"])[0]
    return dry_run.command_line(name, dry_run.with_anneal_tokens(
        of_stage, request.anneal.lr_wsd_decay_iters))


def _where(model, layout):
    from megatron.core import parallel_state

    return (parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank())


@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[3]], ids=str)
def test_ranks_stand_where_megatron_puts_them(layout):
    found = on_layout(layout, _where, SMALL.model)
    placed = Placement(layout.config(), layout.world_size, 2, SMALL.model)
    assert [placed.rank(*where) for where in found] == list(range(layout.world_size))


def test_the_layout_in_words():
    model = ModelConfig(num_layers=8, hidden_size=16, vocab_size=8)
    layout = ParallelConfig(2, 2, num_layers_per_virtual_pipeline_stage=2)
    assert list(Placement(layout, 8, 4, model).lines()) == [
        "8 ranks on 2 nodes: TP 2 x PP 2 x DP 2",
        "  ranks 0-1      node 0      copy 0     stage 0: embedding, layers 1-2, layers 5-6",
        "  ranks 2-3      node 0      copy 1     stage 0: embedding, layers 1-2, layers 5-6",
        "  ranks 4-5      node 1      copy 0     stage 1: layers 3-4, layers 7-8, output layer",
        "  ranks 6-7      node 1      copy 1     stage 1: layers 3-4, layers 7-8, output layer"]
    large = list(Placement(ParallelConfig(8, 4), 4096, 8).lines())
    assert large[0] == "4096 ranks on 512 nodes: TP 8 x PP 4 x DP 128" and len(large) == 5
    assert large[1] == ("  ranks 0-1023   nodes 0-127 copies 0-127 stage 0: embedding, layers, "
                        "part 1 of 4")
    assert list(Placement(ParallelConfig(), 1, 1).lines())[1].endswith(
        "stage 0: embedding, all layers, output layer")
    across = list(Placement(ParallelConfig(4), 6 * 4, 6).lines())
    assert "6 ranks a node are no multiple of TP 4" in across[-1]


def test_the_number_of_ranks_is_the_launch_scripts(small_folder):
    from megatron_direct.runtime import parallel

    request = SelectRequest(flags.request_from(SelectRequest, make_parser().parse_args(
        launching.select_flags(small_folder, small_folder / "no"))).onset)
    with parallel.process_group():
        for variables, ranks, per_node in (
                ({}, 4, 4), ({"GPUS_PER_NODE": "8"}, 8, 8),
                ({"GPUS_PER_NODE": "2", "NUM_NODES": "4"}, 8, 2)):
            placed = dry_run.placement(request, ParallelConfig(2, 2), variables)
            assert (placed.num_ranks, placed.ranks_per_node) == (ranks, per_node)
            assert placed.model.num_layers == SMALL.model.num_layers
        with pytest.raises(UserError, match="NUM_NODES is 'two': expected a whole number"):
            dry_run.placement(request, ParallelConfig(), {"NUM_NODES": "two"})
        with pytest.raises(UserError, match="needs a multiple of 4 ranks, but 2 were started"):
            dry_run.placement(request, ParallelConfig(2, 2), {"GPUS_PER_NODE": "2"})


def test_a_vocabulary_that_only_datasets_know_is_no_obstacle():
    from megatron_direct.runtime import parallel

    request = _parsed(["pretrain", "--data-path", "a", "--save", "s",
                       "--tensor-model-parallel-size", "4"])
    with parallel.process_group():
        assert dry_run.placement(request, request.layout, {}).num_ranks == 4


def test_the_script_prints_torchruns_command_and_computes_nothing(small_folder, tmp_path):
    words = launching.select_flags(small_folder, tmp_path / "run", *launching.LAYOUT)[1:]
    done = launching.run(
        ["bash", str(ROOT / "launch" / "anneal_gpt.sh"), "--dry-run", *words],
        launching.environment(NUM_NODES="2", GPUS_PER_NODE="2", MASTER_ADDR="node-a",
                              TORCHRUN=" ".join(launching.torchrun(1)[:3])))
    assert done.returncode == 0, done.stderr
    assert "--nproc-per-node 2 --nnodes 2 --max-restarts 0 --rdzv-backend c10d" in done.stdout
    assert "--rdzv-endpoint node-a:6000" in done.stdout
    assert "megatron-direct select --load " in done.stdout
    assert "megatron-direct anneal --run-dir " in done.stdout
    assert "--selection random" in done.stdout
    assert "4 ranks on 2 nodes: TP 2 x PP 2 x DP 1" in done.stdout
    assert "ranks 2-3      node 1" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "launch").glob("*.sh")))
def test_scripts_are_valid_bash(script):
    done = subprocess.run(["bash", "-n", str(ROOT / "launch" / script)], capture_output=True,
                          text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_selection_is_estimated_on_the_ranks_that_it_will_have(small_folder, tmp_path):
    words = launching.select_flags(small_folder, tmp_path / "run", "--sketch-share", "0.5",
                                   "--proxy-load", str(small_folder / "theta"))
    done = launching.run([*launching.torchrun(1), "-m", "megatron_direct", *words, "--dry-run"],
                         launching.environment(HOME=str(tmp_path), GPUS_PER_NODE="1"))
    assert done.returncode == 0, done.stderr
    assert "1 rank on 1 node" in done.stdout
    for stage in ("sketch", "curvature", "solve", "in all"):
        assert f"\n{stage}" in done.stdout
    assert "the smaller model's forward pass over the pools (--proxy-load) comes on top" \
        in done.stdout
    assert not (tmp_path / "run").exists()
