"""Layers of Transformer Engine, by a stand-in that computes on a CPU what it computes on a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import launching
import pytest
from indexed_files import random_documents, write_dataset
from ranks import Layout, RankError, on_layout
from spec_parity import PARITY, build_filled, errors
from tiny_models import MODELS, VOCAB_SIZE

from megatron_direct.config import ParallelConfig
from megatron_direct.data.mask import SampleMask
from megatron_direct.errors import UserError

TESTS = Path(__file__).parents[1]
VARIABLES = launching.environment(PYTHONPATH=f"{launching.ROOT}:{TESTS}")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, dict[str, float]]]:
    """By rank, what transformer_engine_run.py found."""
    folder = tmp_path_factory.mktemp("transformer-engine")
    launched = launching.run(
        [sys.executable, "-W", "ignore", *launching.torchrun(2)[1:],
         str(TESTS / "transformer_engine_run.py"), str(folder)], VARIABLES)
    assert launched.returncode == 0, launched.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_they_compute_what_local_layers_do(found):
    """Logits, losses, gradients and sketches; experts in one, and norms in linear layers."""
    for of_rank in found:
        for case, differences in of_rank.items():
            if "in checkpoints" not in case:
                for what in ("logits", "losses", "gradients", "sketches"):
                    assert differences[what] < PARITY, (case, what)


def test_they_are_transformer_engines(found):
    for case, counts in found[0].items():
        if "in checkpoints" not in case:
            assert counts["of Transformer Engine"] >= 7, case
            # The output layer alone, which Transformer Engine has none of.
            assert counts["of Megatron"] <= 1, case


def test_checkpoints_serve_both(found):
    differences = [of_rank[case] for of_rank in found for case in of_rank
                   if "in checkpoints" in case]
    assert len(differences) == 4
    assert all(set(both.values()) == {0.0} for both in differences)


def _selected_and_annealed(folder: Path, run: Path, implementation: str
                           ) -> tuple[list[int], list[float]]:
    """Which documents are selected, and the losses of an annealing on them."""
    program = [sys.executable, "-W", "ignore", str(TESTS / "with_transformer_engine.py")]
    flags = ["--transformer-impl", implementation]
    for command in (launching.select_flags(folder, run, "--pilot-iters", "3", *flags),
                    ["anneal", "--run-dir", str(run), *flags, "--lr-wsd-decay-iters", "3",
                     "--test-data-path", str(folder / "test")]):
        launched = launching.run([*program, *command], VARIABLES)
        assert launched.returncode == 0, launched.stderr
    mask = SampleMask.load(run / "selections" / "direct" / "masks" / "pool.mask.npz")
    lines = (run / "anneal" / "direct" / "metrics.jsonl").read_text().splitlines()
    return mask.keep.tolist(), [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_a_pilot_a_selection_and_an_annealing(small_folder, tmp_path):
    write_dataset(small_folder / "test", random_documents(8, 60, seed=2, longest=16))
    local, theirs = (_selected_and_annealed(small_folder, tmp_path / name, name)
                     for name in ("local", "transformer_engine"))
    assert sum(local[0]) and local[0] == theirs[0]
    assert len(local[1]) == 3 and local[1] == pytest.approx(theirs[1], rel=1e-5)


def test_models_that_are_not_built_of_them_are_refused():
    layout = ParallelConfig(transformer_impl="transformer_engine")
    layout.require_fits(MODELS["qwen2-moe"], 1)
    for name, flag in (("minicpm3", "--multi-latent-attention"),
                       ("nemotron-h", "--hybrid-layer-pattern")):
        with pytest.raises(UserError, match=f"does not support {flag}.*--transformer-impl local"):
            layout.require_fits(MODELS[name], 1)


def _is_missing() -> bool:
    from megatron.core.extensions import transformer_engine

    return not transformer_engine.HAVE_TE


def test_where_it_is_missing_the_flag_is_refused():
    if not _is_missing():
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(RankError, match="cannot be imported here.*--transformer-impl local"):
        on_layout(Layout(), build_filled, MODELS["llama-tied"], "transformer_engine")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "mixtral"])
def test_on_a_gpu(name, tmp_path):
    if _is_missing():
        pytest.skip("needs Transformer Engine and a GPU")
    prefix = write_dataset(tmp_path / "pool",
                           random_documents(20, VOCAB_SIZE, seed=1, longest=14))
    differences, = on_layout(Layout(), errors, MODELS[name], prefix,
                             ("local", "transformer_engine"))
    # Its kernels sum in another order than the local layers, in single precision.
    assert all(difference < 1e-4 for difference in differences.values()), differences
