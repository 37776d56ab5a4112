"""``select --curvature``: every operator, in two layouts; resumed; carried into sketch space."""

from __future__ import annotations

import dataclasses
import json
import types

import flat_requests
import numpy as np
import pytest
from ranks import Layout, RankError, on_layout, run_on_ranks
from trained import SMALL
from weights import fill_by_hash

from megatron_direct.commands.report import ReportConfig, ReportRequest, report
from megatron_direct.commands.select import SelectRequest, select
from megatron_direct.config import Job
from megatron_direct.curvature.fisher import FisherOperator
from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.data.indexed import dataset_digest
from megatron_direct.data.samples import MicroBatchLimits, Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients.per_sample import GradientModel, sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.gradients.store import SketchStore
from megatron_direct.mcore import grid
from megatron_direct.mcore import model as models
from megatron_direct.mcore.shards import parameter_shards
from megatron_direct.steps import curvature as steps_curvature
from megatron_direct.steps.curvature import leading_directions
from megatron_direct.steps.curvature_config import CurvatureConfig
from megatron_direct.steps.eigenpairs import Eigenpairs
from megatron_direct.steps.pass_plan import Drawn
from megatron_direct.steps.sketch import read_sketches

MODEL = SMALL.model
VOCAB_SIZE = MODEL.known_vocab_size
MANY = Layout(tp=2, pp=2)


@pytest.fixture(scope="module")
def folder(small_folder):
    return small_folder


def _select(folder, layout, name, kind, settings=()):
    select(flat_requests.make(SelectRequest, layout.config(), **{
        "load": str(folder / "theta"), "data_path": (str(folder / "pool"),),
        "valid_data_path": (str(folder / "valid"),), "run_dir": str(folder / name),
        "sketch_size": 128, "micro_batch_size": 4, "curvature": kind, "num_eigenpairs": 4,
        "lanczos_tol": 1e-4, "num_select": 10, "objective": "descent", "pilot_iters": 0,
        **dict(settings)}))


def _spectrum(folder, name):
    return json.loads((folder / name / "curvature" / "spectrum.json").read_text())


@pytest.mark.parametrize("kind", [
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("hessian", "gauss-newton")),
    "sketched-fisher"])
def test_operators_give_one_spectrum_in_two_layouts(folder, kind):
    for layout, name in ((Layout(), f"{kind}-1"), (MANY, f"{kind}-4")):
        run_on_ranks(layout.world_size, _select, folder, layout, name, kind)
    one, many = _spectrum(folder, f"{kind}-1"), _spectrum(folder, f"{kind}-4")
    assert one["converged"] and many["converged"]
    np.testing.assert_allclose(one["eigenvalues"], many["eigenvalues"],
                               atol=1e-4 * one["eigenvalues"][0])
    if kind == "sketched-fisher":
        assert "12 validation samples span at most 12 of 128" in one["notes"][1]
        samples = Samples([str(folder / "valid")], MODEL.seq_length, VOCAB_SIZE)
        rows = read_sketches(SketchStore(folder / f"{kind}-1" / "sketches", 128), Drawn(
            "valid", samples, samples.usable, [dataset_digest(str(folder / "valid"))]),
            ).rows.astype(np.float64)
        np.testing.assert_allclose(one["eigenvalues"],
                                   np.linalg.eigvalsh(rows @ rows.T / 12)[::-1], rtol=1e-6)
        assert one["elbow"]["reached"] and one["elbow"]["num_computed"] == 12
        energy = np.array(one["eigenvalues"]) / np.sum(one["eigenvalues"])
        held = np.cumsum(energy)
        assert one["elbow"]["num_stiff"] == 1 + np.flatnonzero(held >= 0.945)[0] > 4
    else:
        assert not one["elbow"]["whole_operator"]  # said, since no density was asked for
    if kind == "gauss-newton":
        assert one["smallest_ritz"] > -1e-5 * one["eigenvalues"][0]


def test_more_eigenpairs_than_there_are_is_reported(folder):
    run_on_ranks(1, _select, folder, Layout(), "many-pairs", "sketched-fisher",
                 (("num_eigenpairs", 20),))
    spectrum = _spectrum(folder, "many-pairs")
    assert len(spectrum["eigenvalues"]) == 12
    assert "rank is at most 12: only 12 of --num-eigenpairs 20" in spectrum["notes"][-1]


@pytest.mark.parametrize("kind", ["hessian", "fisher", "sketched-fisher"])
def test_a_gradient_that_is_not_finite_names_the_sample_before_any_product(kind):
    rows = np.ones((3, 8), np.float32)
    rows[1, 5] = np.inf
    valid = types.SimpleNamespace(numbers=np.array([7, 40, 41]))
    with pytest.raises(UserError, match="validation sample 40, or its gradient, is not finite"):
        leading_directions(CurvatureConfig(curvature=kind), None, None, valid, rows, None)


def _eigenpairs(count, **changes):
    return dataclasses.replace(Eigenpairs(
        np.ones(count), np.ones((count, 4)), rank=256, asked=16, max_matvecs=200, converged=True,
        total_energy=None), **changes)


def test_eigenpairs_serve_those_who_ask_for_no_more():
    def served(found, **flags):
        return found.serve(CurvatureConfig(curvature="fisher", max_matvecs=200, **flags))

    assert served(_eigenpairs(16), num_eigenpairs=16) and served(_eigenpairs(16), num_eigenpairs=9)
    assert not served(_eigenpairs(16), num_eigenpairs=64)
    stopped = _eigenpairs(12, converged=False)  # by rounding, or by the number of products
    assert served(stopped, num_eigenpairs=16) and not served(stopped, num_eigenpairs=64)
    assert not served(dataclasses.replace(stopped, max_matvecs=100), num_eigenpairs=16)


def test_the_energy_of_some_samples_is_of_those(folder):
    """A Fisher of which all pairs are computed, over a part of the validation samples."""
    run_on_ranks(1, _select, folder, Layout(), "some", "fisher", (("num_curvature_samples", 4),))
    elbow = _spectrum(folder, "some")["elbow"]
    assert elbow["whole_operator"] and elbow["reached"]
    assert elbow["energy"] == pytest.approx(sum(_spectrum(folder, "some")["eigenvalues"]))


def test_the_density_tells_the_energy_of_the_whole_operator(folder):
    run_on_ranks(1, _select, folder, Layout(), "density", "hessian",
                 (("density_samples", 2), ("density_steps", 6)))
    spectrum = _spectrum(folder, "density")
    density = spectrum["density"]
    assert spectrum["elbow"]["whole_operator"]
    assert sum(density["weights"]) == pytest.approx(1)
    report(ReportRequest(ReportConfig(str(folder / "density"))))
    page = (folder / "density" / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2 and "standard error" in page
    assert density["positive_trace"]["value"] >= sum(v for v in spectrum["eigenvalues"] if v > 0)


def _killed_select(folder, layout, name, kind, after):
    """A run that ends in the middle of Lanczos, on all ranks, as a kill would end it."""
    whole, count = FisherOperator.matvec, [0]

    def matvec(self, vector):
        count[0] += 1
        if count[0] > after:
            raise RuntimeError("killed")
        return whole(self, vector)

    FisherOperator.matvec = matvec
    try:
        _select(folder, layout, name, kind)
    finally:
        FisherOperator.matvec = whole


@pytest.mark.parametrize(("layout", "after"), [
    (Layout(), 3), pytest.param(MANY, 7, marks=pytest.mark.slow)], ids=str)
def test_a_killed_lanczos_carries_on_and_ends_with_the_same_bytes(folder, layout, after):
    unbroken, broken = f"unbroken-{layout}", f"broken-{layout}"
    run_on_ranks(layout.world_size, _select, folder, layout, unbroken, "fisher")
    with pytest.raises(RankError, match="killed"):
        run_on_ranks(layout.world_size, _killed_select, folder, layout, broken, "fisher", after)
    marker = json.loads((folder / broken / "curvature" / "lanczos" / "step.json").read_text())
    assert marker["step"] == after
    products = _spectrum(folder, unbroken)["num_matvecs"]
    with pytest.raises(RankError, match="killed"):  # fewer than all: it did not begin anew
        run_on_ranks(layout.world_size, _killed_select, folder, layout, broken, "fisher",
                     products - after - 1)
    run_on_ranks(layout.world_size, _select, folder, layout, broken, "fisher")
    for name in ("spectrum.json", "directions.npz"):
        assert (folder / broken / "curvature" / name).read_bytes() == \
            (folder / unbroken / "curvature" / name).read_bytes()


def _counted_select(folder, layout, name, settings):
    """select, and the products of the operator that it took."""
    whole, count = FisherOperator.matvec, [0]

    def matvec(self, vector):
        count[0] += 1
        return whole(self, vector)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FisherOperator, "matvec", matvec)
        _select(folder, layout, name, "fisher", settings)
    return count[0]


@pytest.mark.parametrize("layout", [Layout(), pytest.param(MANY, marks=pytest.mark.slow)], ids=str)
def test_more_eigenpairs_carry_on_from_the_state_of_the_fewer(folder, layout):
    """Fewer products than a run of its own takes, and its eigenvalues."""
    name, alone = f"more-{layout}", f"more-alone-{layout}"

    def products(of, **settings):
        return run_on_ranks(layout.world_size, _counted_select, folder, layout, of,
                            tuple(settings.items()))[0]

    first = products(name)
    assert first > 0
    assert products(name) == 0
    assert products(name, num_eigenpairs=3, selection_name="fewer") == 0
    assert products(name, energy_share=0.5, selection_name="elbow") == 0
    more = products(name, num_eigenpairs=8, selection_name="more")
    whole = products(alone, num_eigenpairs=8)
    assert 0 < more < whole
    found, expected = _spectrum(folder, name), _spectrum(folder, alone)
    assert found["converged"] and len(found["eigenvalues"]) == 8
    np.testing.assert_allclose(found["eigenvalues"], expected["eigenvalues"],
                               atol=1e-4 * expected["eigenvalues"][0])


def _heard_select(folder, layout, name, reported_bytes):
    """What select says with word of every log from so many bytes on."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps_curvature, "_REPORTED_BYTES", reported_bytes)
        patch.setattr(steps_curvature.parallel, "say", said.append)
        _select(folder, layout, name, "fisher")
    return [line for line in said if "lanczos" in line]


@pytest.mark.parametrize(("layout", "model_ranks"), [
    pytest.param(Layout(dp=2), 1, marks=pytest.mark.slow), (Layout(tp=2), 2)], ids=str)
def test_a_log_holds_one_basis_and_a_large_one_is_reported(folder, layout, model_ranks):
    name = f"log-{layout}"
    assert run_on_ranks(2, _heard_select, folder, layout, name, 1 << 30)[0] == []
    log = folder / name / "curvature" / "lanczos"
    step = json.loads((log / "step.json").read_text())["step"]
    held = 0
    for rank in range(model_ranks):
        with np.load(log / f"rank-{rank}-step-{step}.npz") as data:
            kept = set(data["names"].tolist())
        assert {p.name for p in log.glob(f"rank-{rank}-vector-*")} == kept
        held += 4 * sum(np.load(log / vector).size for vector in kept)
    total = sum(path.stat().st_size for path in log.iterdir())
    # A vector's file has a header of 128 bytes, the small state of a rank some KiB.
    assert held < total < held + 2048 * len(kept) * model_ranks + 20_000 * model_ranks
    assert len(list(log.iterdir())) == model_ranks * (len(kept) + 1) + 1
    line, = run_on_ranks(2, _heard_select, folder, layout, f"{name}-reported", 1000)[0]
    assert f"{name}-reported/curvature/lanczos holds 0.0 GiB of basis vectors" in line
    assert "may be deleted" in line


def test_a_spectrum_that_ran_out_of_products_carries_on_with_more(folder):
    def products(**settings):
        return run_on_ranks(1, _counted_select, folder, Layout(), "short",
                            tuple(settings.items()))[0]

    assert products(max_matvecs=5) == 5
    assert not _spectrum(folder, "short")["converged"]
    assert products(max_matvecs=5) == 0
    assert 0 < products(max_matvecs=200) < _spectrum(folder, "short")["num_matvecs"]
    assert _spectrum(folder, "short")["converged"]


def _projections(model, layout, prefix, sketch_size):
    """<g_i, v> for random unit v: exact, and between sketches; and the norms |g_i|."""
    chunks = models.build(Job(model, layout))
    shards = parameter_shards(chunks)
    fill_by_hash(shards)
    samples = Samples([prefix], model.seq_length, VOCAB_SIZE)
    space = ParameterSpace(shards)
    operator = FisherOperator(chunks, space, samples, samples.usable, MicroBatchLimits(4))
    sketch = Sketch(shards, sketch_size, 0)
    rows, norms, exact, sketched = {}, {}, [], []
    gradients = GradientModel(chunks, shards, sketch, micro_batch=MicroBatchLimits(4))
    for some, numbers, _ in sketch_samples(gradients, samples, samples.usable):
        rows.update(zip(numbers.tolist(), some, strict=True))
    for seed in range(8):
        vector = space.random_signs(seed)
        vector /= space.dot(vector, vector) ** 0.5
        found = {}
        for micro_batches, products in zip(operator._passes, operator.inner_products(vector),
                                           strict=True):
            for batch, values in zip(micro_batches, products, strict=True):
                found.update(zip(batch.samples.tolist(), values.tolist(), strict=False))
        of_vector = grid.sum_over_model(sketch.of_vector(space.split(vector), shards)).numpy()
        exact.append([found[n] for n in sorted(found)])
        sketched.append([float(rows[n] @ of_vector) for n in sorted(found)])
    norms = [float(np.linalg.norm(rows[n])) for n in sorted(rows)]
    return np.array(exact), np.array(sketched), np.array(norms)


def test_projections_between_sketches_err_as_a_projection_must(folder):
    """<S g, S v> errs by about |g| |v| / sqrt(k): this is what the stiff costs carry with them."""
    size = 512
    exact, sketched, norms = on_layout(Layout(), _projections, MODEL, str(folder / "pool"), size)[0]
    errors = (sketched - exact) / norms * np.sqrt(size)
    # A sketch with independent rows has 1 + cos^2 <= 2 as the variance of this; measured 0.98.
    assert 0.8 < np.sqrt(np.mean(errors**2)) < 1.2
