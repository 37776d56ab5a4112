"""The sketches of ``select``: resumed to the same bytes, and each option as it is defined."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import flat_requests
import numpy as np
import pytest
import torch
import trained_checkpoint
from indexed_files import random_documents, write_dataset
from ranks import Layout, RankError, on_layout, run_on_ranks
from tiny_models import MODELS
from trained import SMALL
from weights import assemble, pieces

from megatron_direct.commands.select import SelectRequest, select
from megatron_direct.config import Job, Precision
from megatron_direct.curvature.preconditioner import adam_scales
from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.data.indexed import dataset_digest
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.samples import MicroBatchLimits, Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients.hashes import HASH_VERSION
from megatron_direct.gradients.per_sample import GradientModel, sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.gradients.store import SketchStore
from megatron_direct.mcore import checkpoint, grid, model, training, training_folder
from megatron_direct.mcore.shards import parameter_shards
from megatron_direct.steps import selected
from megatron_direct.steps import sketch as sketch_step
from megatron_direct.steps.curvature_config import OPERATORS
from megatron_direct.steps.pass_plan import Drawn
from megatron_direct.steps.pilot import GradientPoint
from megatron_direct.steps.sketch import (
    SketchConfig,
    SketchesKey,
    open_store,
    read_sketches,
    sketched_shards,
    sketches_key,
)

SIZE = 128
EPS = 1e-4  # of the size of the moments' roots
MODEL, OPTIMIZER, BATCH = SMALL.model, SMALL.optimizer, SMALL.batch
VOCAB_SIZE = MODEL.known_vocab_size
MANY = Layout(tp=2, pp=2)


@pytest.fixture(scope="module")
def folder(small_folder):
    return small_folder


def _select(folder, layout, name, settings, num_select=10):
    select(flat_requests.make(SelectRequest, layout.config(), **{
        "load": str(folder / "theta"), "data_path": (str(folder / "pool"),),
        "valid_data_path": (str(folder / "valid"),), "run_dir": str(folder / name),
        "sketch_size": SIZE, "micro_batch_size": 4, "curvature": "fisher", "num_eigenpairs": 4,
        "lanczos_tol": 1e-5, "num_select": num_select, "pilot_iters": 0, **settings}))


def _stored(folder, name, dtype="fp32"):
    samples = Samples([str(folder / "pool")], MODEL.seq_length, VOCAB_SIZE)
    return read_sketches(SketchStore(folder / name / "sketches", SIZE, dtype), Drawn(
        "pool", samples, samples.usable, [dataset_digest(str(folder / "pool"))]))


def _killed_select(folder, layout, name, passes):
    """A run that ends, as a kill would end it, after so many passes over the pool on each rank."""
    whole = sketch_step.sketch_samples

    def some(gradients, samples, *rest):
        for number, rows in enumerate(whole(gradients, samples, *rest)):
            if "pool" in samples.prefixes[0] and number == passes[grid.data_rank()]:
                raise RuntimeError("killed")
            yield rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketch_step, "sketch_samples", some)
        _select(folder, layout, name, {})


@pytest.mark.parametrize("layout", [
    Layout(dp=2), pytest.param(MANY, marks=pytest.mark.slow)], ids=str)
def test_a_killed_run_carries_on_to_the_same_bytes(folder, layout):
    """Each rank was killed at another place, with pieces of unfinished rows behind."""
    whole, killed = f"whole-{layout}", f"killed-{layout}"
    run_on_ranks(layout.world_size, _select, folder, layout, whole, {})
    with pytest.raises(RankError, match="killed"):
        run_on_ranks(layout.world_size, _killed_select, folder, layout, killed, [1, 2])
    for rank in range(layout.dp):
        with open(folder / killed / "sketches" / f"rows-{rank}.f32", "ab") as file:
            file.write(b"a row cut short")
    run_on_ranks(layout.world_size, _select, folder, layout, killed, {})
    expected = {path.name: path.read_bytes() for path in (folder / whole / "sketches").iterdir()}
    found = {path.name: path.read_bytes() for path in (folder / killed / "sketches").iterdir()}
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"manifest.json"}:
        assert found[name] == expected[name], name


def test_a_killed_run_carries_on_in_another_layout(folder):
    """With other micro-batches too: what is there is not computed again."""
    run_on_ranks(1, _select, folder, Layout(), "one-layout", {})
    with pytest.raises(RankError, match="killed"):
        run_on_ranks(2, _killed_select, folder, Layout(dp=2), "two-layouts", [2, 2])
    sketches = folder / "two-layouts" / "sketches"
    before = {n: (sketches / f"rows-{n}.f32").read_bytes() for n in range(2)}
    assert all(before.values())
    run_on_ranks(4, _select, folder, MANY, "two-layouts", {"micro_batch_size": 3})
    after = {n: (sketches / f"rows-{n}.f32").read_bytes() for n in range(2)}
    assert after[0].startswith(before[0]) and after[1] == before[1]
    one, two = (_stored(folder, name) for name in ("one-layout", "two-layouts"))
    np.testing.assert_array_equal(one.samples, two.samples)
    errors = np.linalg.norm(one.rows - two.rows, axis=1) / np.linalg.norm(one.rows, axis=1)
    assert errors.max() < 1e-4
    assert _mask(folder, "one-layout").tolist() == _mask(folder, "two-layouts").tolist()


def _mask(folder, name):
    return SampleMask.load(selected.selection_folder(folder / name, "direct") / "masks"
                           / "pool.mask.npz").keep


def _select_all_finite(folder, name, broken):
    """A selection of all samples but those whose gradients are made infinite."""
    whole = sketch_step.sketch_samples

    def with_broken(gradients, samples, *rest):
        for rows, ids, losses in whole(gradients, samples, *rest):
            if "pool" in samples.prefixes[0]:
                rows[np.isin(ids, broken), 3] = np.inf
            yield rows, ids, losses

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sketch_step, "sketch_samples", with_broken)
        _select(folder, Layout(), name, {}, num_select=41 - len(broken))


def test_samples_without_finite_gradients_are_counted_and_never_selected(folder):
    run_on_ranks(1, _select_all_finite, folder, "broken", [3, 17])
    kept = _mask(folder, "broken")
    assert np.flatnonzero(~kept).tolist() == [3, 17]
    _, summary = selected.find_selection(folder / "broken", "direct")
    assert summary.samples.not_finite == 2 and list(summary.not_finite) == [3, 17]


def _sketches(folder, layout, settings):
    """(rows by sample, scales by parameter, names sketched) of one pass over the pool."""
    chunks = model.build(Job(MODEL, layout))
    found = training_folder.latest(folder / "theta")
    checkpoint.load_model(found, chunks)
    shards = parameter_shards(chunks)
    scales = adam_scales(found, chunks, shards, EPS)
    sketch = Sketch(shards, SIZE, 1, scales if settings.get("precondition") else None)
    samples = Samples([str(folder / "pool")], MODEL.seq_length, VOCAB_SIZE)
    rows = {}
    gradients = GradientModel(chunks, shards, sketch, micro_batch=MicroBatchLimits(4),
                              sample_loss=settings.get("sample_loss", "mean"))
    for sketches, numbers, _ in sketch_samples(gradients, samples, samples.usable):
        rows.update(zip(numbers.tolist(), sketches, strict=True))
    return rows, pieces(shards, [scales[s.name] for s in shards]), samples.num_labels


def _in_layout(folder, layout, settings):
    with grid.model_parallel(layout.config()):
        return _sketches(folder, layout.config(), settings)


def _adam_state(folder):
    """Second moments as torch's own optimizer holds them, the checkpoint loaded for training."""
    with grid.model_parallel(Layout().config()):
        chunks = model.build(Job(MODEL, Layout().config()))
        trainer = training.make_trainer(chunks, OPTIMIZER, BATCH)
        checkpoint.load_training(training_folder.latest(folder / "theta"), chunks,
                                 trainer.optimizer, trainer.scheduler)
        shards = parameter_shards(chunks)
        state = trainer.optimizer.optimizer.state
        return pieces(shards, [state[s.parameter]["exp_avg_sq"] for s in shards])


def test_adam_scales_are_those_of_its_update_in_every_layout(folder):
    moments = assemble(run_on_ranks(1, _adam_state, folder))
    for layout in (Layout(), MANY):
        ranks = run_on_ranks(layout.world_size, _in_layout, folder, layout, {})
        scales = assemble([rank[1] for rank in ranks])
        assert scales.keys() == moments.keys()
        for name, v in moments.items():
            seen = v > 0
            np.testing.assert_allclose(scales[name][seen] ** -2, np.sqrt(v[seen]) + EPS,
                                       rtol=1e-5)
            assert not scales[name][~seen].any()


def test_options_scale_gradients_as_they_say(folder):
    """The sum of the losses is the mean times the labels; all layouts agree with each option."""
    plain, _, num_labels = run_on_ranks(1, _in_layout, folder, Layout(), {})[0]
    summed = run_on_ranks(1, _in_layout, folder, Layout(), {"sample_loss": "sum"})[0][0]
    for number, row in plain.items():
        np.testing.assert_allclose(summed[number], row * num_labels[number], rtol=1e-3,
                                   atol=1e-5 * np.linalg.norm(summed[number]))
    for settings in ({"precondition": True}, {"sample_loss": "sum"}):
        one = run_on_ranks(1, _in_layout, folder, Layout(), settings)[0][0]
        many = run_on_ranks(4, _in_layout, folder, MANY, settings)[0][0]
        for number, row in one.items():
            assert np.linalg.norm(many[number] - row) < 1e-4 * np.linalg.norm(row)


SETTINGS = {"sketch_dtype": "bf16", "sample_loss": "sum", "precondition": "adam",
            "sketch_parameters": ("!*word_embeddings*", "!*layernorm*")}


def _weights(folder):
    with grid.model_parallel(Layout().config()):
        shards = parameter_shards(model.build(Job(MODEL, Layout().config())))
        return {shard.name: np.empty(shard.parameter.shape) for shard in shards}


def test_select_with_every_option_in_two_layouts(folder):
    """Eigenvalues of D F D over some parameters, and a selection, the same in both."""
    for layout, name in ((Layout(), "options-1"), (MANY, "options-4")):
        run_on_ranks(layout.world_size, _select, folder, layout, name, SETTINGS)
    spectra = [json.loads((folder / name / "curvature" / "spectrum.json").read_text())
               for name in ("options-1", "options-4")]
    # The products of each layout sum in another order, in float32.
    np.testing.assert_allclose(*(s["eigenvalues"] for s in spectra), rtol=1e-3)
    left = sum(weight.size for name, weight in run_on_ranks(1, _weights, folder)[0].items()
               if "word_embeddings" not in name and "layernorm" not in name)
    assert [s["dimension"] for s in spectra] == [left, left]
    one, many = (_mask(folder, name) for name in ("options-1", "options-4"))
    assert one.sum() == many.sum() == 10 and (one != many).sum() <= 2  # one tie of bf16 rows
    one, many = (_stored(folder, name, "bf16") for name in ("options-1", "options-4"))
    # bf16 has 8 bits: two roundings differ by at most 2^-8 of a coordinate.
    errors = np.linalg.norm(one.rows - many.rows, axis=1) / np.linalg.norm(one.rows, axis=1)
    assert errors.max() < 2**-8


def _products_over_some_parameters(folder, layout):
    """(H v restricted to some parameters, and the product of the operator over these alone)."""
    with grid.model_parallel(layout.config()):
        chunks = model.build(Job(MODEL, layout.config()), spec="local")
        checkpoint.load_model(training_folder.latest(folder / "theta"), chunks)
        shards = parameter_shards(chunks)
        some = sketched_shards(shards, ["*layernorm*", "*mlp*", "!*fc2*"])
        names = {shard.name for shard in some}
        samples = Samples([str(folder / "valid")], MODEL.seq_length, VOCAB_SIZE)
        whole, part = ParameterSpace(shards), ParameterSpace(some)
        found = {}
        for kind, operator in OPERATORS.items():
            vector = whole.join([v * (s.name in names) for s, v in zip(
                shards, whole.split(whole.random_signs(1)), strict=True)])
            given = samples, samples.usable, MicroBatchLimits(4)
            product = operator(chunks, whole, *given).matvec(vector)
            expected = part.join([p for s, p in zip(shards, whole.split(product), strict=True)
                                  if s.name in names])
            alone = operator(chunks, part, *given).matvec(part.random_signs(1))
            found[kind] = float((alone - expected).norm() / expected.norm())
        return found, [p.grad is None for chunk in chunks for p in chunk.parameters()]


@pytest.mark.parametrize("layout", [Layout(), MANY], ids=str)
def test_curvature_over_some_parameters_is_a_block_of_the_whole(folder, layout):
    for found, cleared in run_on_ranks(layout.world_size, _products_over_some_parameters, folder,
                                       layout):
        assert max(found.values()) < 1e-5, found
        assert all(cleared)


def test_rows_whose_key_is_not_known_are_refused(tmp_path):
    key = SketchesKey("point", MODEL, SIZE)
    store = open_store(tmp_path, key)
    store.number_datasets(["dataset"])
    writer = store.writer(0)
    writer.append(np.ones((1, SIZE), np.float32), np.zeros(1, int), np.zeros(1, int), np.ones(1))
    writer.close()
    assert len(open_store(tmp_path, key).entries().dataset) == 1
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds sketches but no manifest.json .*delete the folder"):
        open_store(tmp_path, key)
    assert not (tmp_path / "manifest.json").exists()


def test_rows_of_older_hashes_are_refused(tmp_path):
    """Their key, which did not name a version, counts as that of the first."""
    open_store(tmp_path, SketchesKey("point", MODEL, SIZE))
    now = SketchesKey("point", MODEL, SIZE, hash_version=HASH_VERSION)
    with pytest.raises(UserError, match="version 1 of the hash, and megatron-direct has version 2 "
                                        "now. Choose another --run-dir, or delete"):
        open_store(tmp_path, now)


def test_patterns_of_parameters_that_match_nothing_are_refused(folder):
    with pytest.raises(RankError, match="no parameter matches '?.*experts.*The parameters are"):
        run_on_ranks(1, _select, folder, Layout(), "refused",
                     {"sketch_parameters": ("!*experts*",)})
    with pytest.raises(RankError, match="leaves no parameter to sketch"):
        run_on_ranks(1, _select, folder, Layout(), "empty", {"sketch_parameters": ("!*",)})


def test_a_checkpoint_without_an_optimizer_cannot_precondition(folder):
    run_on_ranks(1, _save_weights_alone, folder)
    with pytest.raises(RankError, match="no second moments of Adam.*--precondition"):
        run_on_ranks(1, _scales_of, folder)


def _save_weights_alone(folder):
    with grid.model_parallel(Layout().config()):
        chunks = model.build(Job(MODEL, Layout().config()))
        checkpoint.save(folder / "bare", 1, chunks, None, None, vars(MODEL))


def _scales_of(folder):
    with grid.model_parallel(Layout().config()), torch.no_grad():
        chunks = model.build(Job(MODEL, Layout().config()))
        adam_scales(training_folder.latest(folder / "bare"), chunks, parameter_shards(chunks), EPS)


def _moments_of_parts(model_of_case, layout, folder):
    """For each parameter the scales, and Adam's second moments, which optimizers that are chained
    may hold: experts have one of their own."""
    chunks = model.build(Job(model_of_case, layout))
    trainer = training.make_trainer(chunks, OPTIMIZER, BATCH)
    found = training_folder.latest(folder)
    checkpoint.load_training(found, chunks, trainer.optimizer, trainer.scheduler)
    shards = parameter_shards(chunks)
    state = {parameter: of_one for optimizer in getattr(
        trainer.optimizer, "chained_optimizers", [trainer.optimizer])
        for parameter, of_one in optimizer.optimizer.state.items()}
    scales = adam_scales(found, chunks, shards, EPS)
    return {s.name: (scales[s.name].numpy(), state[s.parameter]["exp_avg_sq"].numpy())
            for s in shards}


@pytest.mark.parametrize(("name", "layout", "part"), [
    ("qwen2-moe", Layout(dp=2, ep=2), "experts"),
    ("nemotron-h", Layout(), "mixer.in_proj")])  # which a checkpoint holds in pieces
def test_experts_and_mamba_layers_have_second_moments_too(name, layout, part, tmp_path):
    trained_checkpoint.save(trained_checkpoint.Case(name, layout, layout), tmp_path)
    for of_rank in on_layout(layout, _moments_of_parts, MODELS[name], tmp_path):
        assert any(part in of_parameter for of_parameter in of_rank)
        for scales, moments in of_rank.values():
            seen = moments > 0
            np.testing.assert_allclose(scales[seen] ** -2, np.sqrt(moments[seen]) + EPS,
                                       rtol=1e-5)
            assert not scales[~seen].any()


def _scales_in(model_of_case, layout, folder, precision):
    chunks = model.build(Job(model_of_case, layout, precision=precision))
    shards = parameter_shards(chunks)
    scales = adam_scales(training_folder.latest(folder), chunks, shards, EPS)
    return pieces(shards, [scales[s.name] for s in shards])


def test_the_distributed_optimizers_moments_are_the_same_and_so_are_those_in_bf16(tmp_path):
    found = {}
    for distributed, precision in ((False, Precision()), (True, Precision()),
                                   (False, Precision(bf16=True))):
        case = trained_checkpoint.Case("gpt2-untied", Layout(dp=2), Layout(dp=2), distributed)
        folder = tmp_path / str(distributed)
        if not folder.exists():
            trained_checkpoint.save(case, folder)
        found[distributed, precision] = assemble(
            on_layout(Layout(), _scales_in, MODELS[case.model], folder, precision))
    plain, distributed, in_bf16 = found.values()
    assert plain.keys() == distributed.keys() == in_bf16.keys()
    for name, scales in plain.items():
        np.testing.assert_array_equal(in_bf16[name], scales)
        # Sums over ranks in another order; what is zero but for rounding is left out.
        moments, others = (np.where(of_one > 0, of_one, np.inf) ** -4.0
                           for of_one in (scales, distributed[name]))
        np.testing.assert_allclose(others, moments, rtol=1e-3, atol=1e-8 * moments.max())


def test_another_pool_leaves_the_spectrum_as_it_is(folder):
    """Also where the state of Lanczos was deleted, from which it would be found again."""
    write_dataset(folder / "more", random_documents(9, 60, seed=7, longest=16))
    run_on_ranks(1, _select, folder, Layout(), "extended", {"num_eigenpairs": 6})
    curvature = folder / "extended" / "curvature"
    shutil.rmtree(curvature / "lanczos")
    before = {path: path.stat().st_mtime_ns for path in curvature.rglob("*")}
    pools = tuple(str(folder / name) for name in ("pool", "more"))
    run_on_ranks(1, _select, folder, Layout(), "extended", {"data_path": pools})
    assert {path: path.stat().st_mtime_ns for path in curvature.rglob("*")} == before
    run_on_ranks(1, _select, folder, Layout(), "whole", {"data_path": pools})
    found = [selected.SelectionSummary.read(selected.selection_folder(folder / name, "direct"))
             for name in ("extended", "whole")]
    assert found[0].mask_digests == found[1].mask_digests


def test_rows_that_adam_scales_are_of_its_moments_and_its_constant():
    """Where weights are an average, the moments are of the checkpoint that was given beside it."""
    def key(precondition, moments_digest, eps):
        job = Job(MODEL, Layout().config(), dataclasses.replace(OPTIMIZER, adam_eps=eps))
        point = GradientPoint(Path("merged"), "average", Path("theta"), moments_digest)
        return sketches_key(SketchConfig(precondition=precondition), job, point).digest()

    assert len({key("adam", *of) for of in (("x", 1e-8), ("y", 1e-8), ("x", 1e-6))}) == 3
    assert key("none", "x", 1e-8) == key("none", "y", 1e-6)


class _SeenLate(SketchStore):
    """Whose rows are seen at the third look, as those of another node can be."""

    looks = 0

    def entries_by_file(self):
        self.looks += 1
        return super().entries_by_file() if self.looks > 2 else iter([])


def _write_and_read_late(model, layout, folder, run):
    samples = Samples([str(folder / "pool")], MODEL.seq_length, VOCAB_SIZE)
    drawn = Drawn("pool", samples, samples.usable, [dataset_digest(str(folder / "pool"))])
    rows = np.random.default_rng(0).standard_normal((len(drawn.numbers), 4)).astype(np.float32)

    def compute(plan):
        yield rows, drawn.numbers, rows[:, 0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_direct.runtime.files.time", SimpleNamespace(
            monotonic=time.monotonic, sleep=lambda seconds: None))
        store = _SeenLate(folder / run, 4)
        sketch_step.write_rows(store, drawn, "rows", compute)
        store.looks = 0
        found = read_sketches(store, drawn)
        patch.setattr("megatron_direct.runtime.files.SECONDS_UNTIL_FILES_SHOW", 0)
        store.looks = 0
        with pytest.raises(UserError, match="has rows of 0 of the .* --run-dir on a file system"):
            read_sketches(store, drawn)
    return found.samples, drawn.numbers, found.rows, rows


def test_rows_of_other_nodes_that_show_late_are_waited_for(folder):
    samples, numbers, found, rows = on_layout(
        Layout(), _write_and_read_late, MODEL, folder, "late")[0]
    np.testing.assert_array_equal(samples, numbers)
    np.testing.assert_array_equal(found, rows)
