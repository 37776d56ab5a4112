"""Collective sums of a Lanczos step, besides those within the passes over the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from indexed_files import random_documents, write_dataset
from ranks import Layout, on_layout
from tiny_models import MODELS, VOCAB_SIZE

from megatron_direct.config import Job
from megatron_direct.curvature.fisher import FisherOperator
from megatron_direct.curvature.gauss_newton import GaussNewtonOperator
from megatron_direct.curvature.krylov import SymmetricOperator
from megatron_direct.curvature.lanczos import leading_eigenpairs
from megatron_direct.curvature.thick_restart import Target
from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.data.samples import MicroBatchLimits, Samples
from megatron_direct.mcore import grid
from megatron_direct.mcore import model as models
from megatron_direct.mcore.shards import parameter_shards


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("all-reduces")
    write_dataset(folder / "valid", random_documents(12, VOCAB_SIZE, seed=0, longest=9))
    return str(folder / "valid")


def _counts(model, layout, prefix):
    """For each operator the all-reduces of each step, and the passes of a product."""
    chunks = models.build(Job(model, layout), spec="local")
    space = ParameterSpace(parameter_shards(chunks))
    samples = Samples([prefix], model.seq_length, VOCAB_SIZE)
    original, calls, found = grid.all_reduce, [], {}

    def counting(tensor, group):
        if torch.distributed.get_world_size(group) > 1:
            calls.append(group)
        return original(tensor, group)

    for kind in (GaussNewtonOperator, FisherOperator):
        operator, counts = kind(chunks, space, samples, samples.usable, MicroBatchLimits(1)), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grid, "all_reduce", counting)
            leading_eigenpairs(
                SymmetricOperator(operator.matvec, space), Target(2, tol=1e-6, max_matvecs=4),
                space.random_signs(0), on_step=lambda _, counts=counts: counts.append(len(calls)))
        found[kind] = np.diff(counts).tolist(), len(operator._passes)
    return found


@pytest.mark.parametrize(("name", "layout", "of_gradients"), [
    ("llama-untied", Layout(tp=2), 0),
    ("llama-tied", Layout(tp=2, pp=2), 1),  # the embeddings of the first and the last stage
], ids=str)
def test_a_step_takes_one_all_reduce_and_a_product_of_the_fisher_one_more(
        name, layout, of_gradients, prefix):
    for found in on_layout(layout, _counts, MODELS[name], prefix):
        for kind, of_fisher in ((GaussNewtonOperator, 0), (FisherOperator, 1)):
            counts, num_passes = found[kind]
            assert counts and num_passes > 1  # whose sums travel together
            assert counts == [1 + of_gradients + of_fisher] * len(counts)
