"""Averages of checkpoints against averages of the plain state dict, in any layout."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from ranks import Layout, RankError, on_layout, run_on_ranks
from tiny_models import MODELS
from trained_checkpoint import BATCH, train_on
from weights import assemble, fill_by_hash, fill_expert_bias, pieces

from megatron_direct.config import Job, OptimizerConfig, Precision
from megatron_direct.mcore import checkpoint, merging, training_folder
from megatron_direct.mcore.merging import Average, write_average

WEIGHTS = (0.5, 0.2, 0.3)
# Written in three layouts; one has the distributed optimizer.
WRITTEN = (Layout(), Layout(tp=2, pp=2), Layout(dp=2))


def _write(model, layout, folder, seed, bf16=False):
    from megatron_direct.mcore import model as models
    from megatron_direct.mcore import training
    from megatron_direct.mcore.shards import parameter_shards

    chunks = models.build(Job(model, layout, precision=Precision(bf16=bf16)))
    fill_by_hash(parameter_shards(chunks), scale=0.2, seed=seed)
    fill_expert_bias(chunks)
    for bias in _biases(chunks).values():
        bias.mul_(seed)
    trainer = training.make_trainer(chunks, OptimizerConfig(lr=1e-3), BATCH)
    trainer.optimizer.reload_model_params()
    if bf16:  # so that main parameters are between the numbers of bfloat16
        train_on(trainer, model, 0)
    checkpoint.save(folder, seed, chunks, trainer.optimizer if bf16 else None, trainer.scheduler,
                    {**vars(model), "bf16": bf16})
    return _mains(chunks) if bf16 else _pieces(chunks)


def _pieces(chunks):
    from megatron_direct.mcore.shards import parameter_shards

    shards = parameter_shards(chunks)
    return pieces(shards, [shard.parameter.detach().float().clone() for shard in shards])


def _biases(chunks):
    """Of experts: buffers, which training moves."""
    return {name: buffer for chunk in chunks for name, buffer in chunk.named_buffers()
            if name.endswith("expert_bias")}


def _mains(chunks):
    from megatron_direct.mcore.shards import parameter_shards

    shards = parameter_shards(chunks)
    return pieces(shards, [shard.parameter.main_param.detach().clone() for shard in shards])


def _read(model, layout, folder, bf16=False):
    from megatron_direct.mcore import model as models

    chunks = models.build(Job(model, layout, precision=Precision(bf16=bf16)))
    checkpoint.load_model(training_folder.latest(folder), chunks)
    return _pieces(chunks)


def _merge(folders, weights, keeps_optimizer, output):
    states = [checkpoint.open_checkpoint(folder) for folder in folders]
    write_average(Average(states, weights, keeps_optimizer), output)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """(folders, whole weights) of a model in three states."""
    folder = tmp_path_factory.mktemp("three")
    found = [(folder / str(seed), assemble(on_layout(layout, _write, MODELS["llama-tied"],
                                                     str(folder / str(seed)), seed)))
             for seed, layout in enumerate(WRITTEN, 1)]
    return [path for path, _ in found], [weights for _, weights in found]


def _average(weights, shares):
    return {name: sum(share * one[name] for share, one in zip(shares, weights, strict=True))
            for name in weights[0]}


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow),
                                   pytest.param(2, marks=pytest.mark.slow), 4])
def test_weights_are_the_average_of_the_plain_state_dict(three, tmp_path, ranks):
    folders, weights = three
    run_on_ranks(ranks, _merge, folders, WEIGHTS, False, tmp_path)
    expected = _average(weights, WEIGHTS)
    for layout in (Layout(), Layout(tp=2, pp=2), Layout(dp=2)) if ranks == 4 else (Layout(),):
        found = assemble(on_layout(layout, _read, MODELS["llama-tied"], str(tmp_path)))
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            # Sums in float64, rounded once to float32.
            np.testing.assert_allclose(found[name], weight, rtol=2e-7, atol=1e-9)
    merged = checkpoint.read_checkpoint(tmp_path)
    assert merged.iteration == 3 and not merged.has_optimizer
    assert merged.arguments["hidden_size"] == MODELS["llama-tied"].hidden_size


def _merge_in_small_portions(folders, output):
    """(bytes of the largest tensor of this rank; the most that was read and not yet averaged)."""
    read, sizes, largest = merging._read, [], []

    def noted(entries, path):
        found = read(entries, path)
        own = [part.data.nbytes for part in found.values()]
        sizes.append(sum(own))
        largest.append(max(own, default=0))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "_READ_AT_ONCE", 1)
        patch.setattr(merging, "_read", noted)
        _merge(folders, WEIGHTS, False, output)
    assert len(sizes) > 3 * 5  # tensors, in each of three states
    return max(largest), max(sizes)


def test_what_is_read_of_a_state_is_a_portion_and_not_the_model(three, tmp_path):
    for largest, most in run_on_ranks(2, _merge_in_small_portions, three[0], tmp_path / "small"):
        assert most == largest
    run_on_ranks(2, _merge, three[0], WEIGHTS, False, tmp_path / "whole")
    for small, whole in zip(*(assemble(on_layout(
            Layout(), _read, MODELS["llama-tied"], str(tmp_path / name))).values()
            for name in ("small", "whole")), strict=True):
        np.testing.assert_array_equal(small, whole)


def _resume(model, layout, folder):
    """Main parameters and Adam's moments, as training would go on from them."""
    from megatron_direct.mcore import model as models
    from megatron_direct.mcore import training

    chunks = models.build(Job(model, layout, precision=Precision(bf16=True)))
    trainer = training.make_trainer(chunks, OptimizerConfig(lr=1e-3), BATCH)
    checkpoint.load_training(training_folder.latest(folder), chunks, trainer.optimizer,
                             trainer.scheduler)
    return _pieces(chunks), _mains(chunks)


def test_main_parameters_are_averaged_and_the_optimizer_is_the_last_ones(tmp_path):
    model = MODELS["llama-tied"]
    folders = [tmp_path / str(seed) for seed in (1, 2)]
    weights = [assemble(on_layout(Layout(), _write, model, str(folder), seed, True))
               for seed, folder in enumerate(folders, 1)]
    run_on_ranks(2, _merge, folders, (0.25, 0.75), True, tmp_path / "out")
    merged = checkpoint.read_checkpoint(tmp_path / "out")
    assert merged.has_optimizer
    found, mains = map(lambda part: assemble([part]),
                       on_layout(Layout(), _resume, model, str(tmp_path / "out"))[0])
    for name, weight in _average(weights, (0.25, 0.75)).items():
        np.testing.assert_allclose(mains[name], weight, rtol=2e-7, atol=1e-9)
        # Each state's weights, of up to 0.2, are rounded to bfloat16, and so is their average.
        np.testing.assert_allclose(found[name], weight, rtol=2**-8, atol=0.2 * 2**-8)
        assert np.abs(found[name] - mains[name]).max() > 0  # so they are two things


def _read_biases(model, layout, folder):
    from megatron_direct.mcore import model as models

    chunks = models.build(Job(model, layout))
    checkpoint.load_model(training_folder.latest(folder), chunks)
    return {name: bias.numpy() for name, bias in _biases(chunks).items()}


@pytest.mark.slow
def test_experts_and_their_biases_are_averaged(tmp_path):
    model = MODELS["deepseek-v3"]
    layouts = (Layout(), Layout(tp=2, sp=True))
    weights = [assemble(on_layout(layout, _write, model, str(tmp_path / str(seed)), seed))
               for seed, layout in enumerate(layouts, 1)]
    run_on_ranks(2, _merge, [tmp_path / "1", tmp_path / "2"], (0.5, 0.5), False, tmp_path / "out")
    found = assemble(on_layout(Layout(tp=2, sp=True), _read, model, str(tmp_path / "out")))
    assert found.keys() == weights[0].keys()
    for name, weight in _average(weights, (0.5, 0.5)).items():
        np.testing.assert_allclose(found[name], weight, rtol=2e-7, atol=1e-9)
    first, second, average = (on_layout(Layout(), _read_biases, model, str(tmp_path / name))[0]
                              for name in ("1", "2", "out"))
    assert average and average.keys() == first.keys() == second.keys()
    for name, bias in average.items():
        np.testing.assert_allclose(bias, (first[name] + second[name]) / 2, rtol=2e-7)
        assert np.abs(first[name] - second[name]).max() > 0


def test_other_models_are_refused(three, tmp_path):
    folders, _ = three
    narrower = dataclasses.replace(MODELS["llama-tied"], ffn_hidden_size=16)
    on_layout(Layout(), _write, narrower, str(tmp_path / "narrower"), 9)
    with pytest.raises(RankError, match=r"narrower/iter_0000009 was made with --ffn-hidden-size 16"
                                        r".* weights of different models"):
        run_on_ranks(2, _merge, [tmp_path / "narrower", folders[0]], (0.5, 0.5), False,
                     tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_states_of_a_folder(tmp_path):
    for iteration in (10, 20, 30, 31, 40):
        path = tmp_path / f"iter_{iteration:07d}"
        path.mkdir()
        if iteration != 31:  # killed while it was saved
            (path / "metadata.json").write_text("{}")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("40")
    (tmp_path / "iter_0000030_backup").mkdir()  # a copy that somebody keeps
    (tmp_path / "iter_0000030_backup" / "metadata.json").write_text("{}")

    def iterations(*args):
        return [int(path.name[5:]) for path in training_folder.saved_states(tmp_path, *args)]

    assert iterations() == [40]
    assert iterations(3) == [20, 30, 40]
    assert iterations(0, 30) == [30] and iterations(2, 30) == [20, 30]
    assert training_folder.saved_states(tmp_path / "iter_0000020", 5) == [tmp_path / "iter_0000020"]


