"""Masks in Megatron-Bridge: its registry, its data loaders on two ranks, the recipe of the docs.

Where megatron-bridge is installed (0.6.2; CONTRIBUTING.md says how); nothing here needs a GPU.
"""

from __future__ import annotations

import re
import types
from pathlib import Path

import bridge_on_cpu
import megatron_lm_runs as runs
import numpy as np
import pytest
from ranks import RankError, run_on_ranks

from megatron_direct.errors import UserError

needs_bridge = pytest.mark.skipif(bridge_on_cpu.why_not() is not None,
                                  reason=bridge_on_cpu.why_not() or "")
ONSET, BATCH = 12, 4  # samples
RECIPE = Path(__file__).parents[2] / "docs" / "nemo.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return runs.make_pools(tmp_path_factory.mktemp("bridge"))


def _dataset(folder: Path, pools=("pool0", "pool1"), **changed):
    from megatron.bridge.training.config import GPTDatasetConfig

    prefixes = [str(folder / name) for name in (*pools, "pool2")]
    return GPTDatasetConfig(**{
        "seq_length": 16, "random_seed": 5, "split": None,
        "blend_per_split": [(prefixes, [1, 2, 1]), ([prefixes[2]], None), None],
        "path_to_cache": str(folder / "cache"), "reset_position_ids": False,
        "reset_attention_mask": False, "eod_mask_loss": False, "dataloader_type": "single",
        "num_workers": 0, "pin_memory": False, **changed})


def _masked(folder: Path, **changed):
    from megatron_direct.plugins.megatron_bridge import MaskedBlendConfig

    return MaskedBlendConfig.from_recipe(_dataset(folder),
                                         sample_masks=str(folder / "masks"), **changed)


def _container(dataset, train_iters: int):
    """A pre-training recipe's config; of a model nothing is asked."""
    from megatron.bridge.training import config

    return config.ConfigContainer(
        model=None, dataset=dataset, logger=config.LoggerConfig(),
        train=config.TrainingConfig(train_iters=train_iters, global_batch_size=BATCH,
                                    micro_batch_size=1),
        validation=config.ValidationConfig(eval_interval=500, eval_iters=1),
        optimizer=config.OptimizerConfig(lr=3e-4, min_lr=3e-5),
        scheduler=config.SchedulerConfig(
            lr_decay_style="cosine", lr_warmup_iters=500, lr_warmup_init=0.0,
            start_weight_decay=0.1, end_weight_decay=0.1, weight_decay_incr_style="constant"),
        tokenizer=config.TokenizerConfig(),
        checkpoint=config.CheckpointConfig(save="pretraining", load="pretraining"))


def _tokens(config, consumed: int, count: int) -> list[np.ndarray]:
    """This rank's first batches of training and validation, from Megatron-Bridge's own setup."""
    from megatron.bridge.data.loaders import setup_data_iterators
    from megatron.bridge.data.utils import get_dataset_provider
    from megatron.bridge.training.setup import _bind_dataset_provider_context
    from megatron.bridge.training.state import TrainState
    from megatron.core import parallel_state

    from megatron_direct.config import ParallelConfig
    from megatron_direct.mcore import grid
    from megatron_direct.mcore.blend import Vocabulary

    config.dataset.finalize()
    config.dataset.tokenizer = Vocabulary(61, "test")  # as its setup does
    with grid.model_parallel(ParallelConfig()):
        train, valid, _ = setup_data_iterators(
            cfg=config, train_state=TrainState(consumed_train_samples=consumed), model_length=1,
            train_valid_test_datasets_provider=_bind_dataset_provider_context(
                get_dataset_provider(config.dataset), tokenizer=config.dataset.tokenizer,
                pg_collection=None),
            dp_group=parallel_state.get_data_parallel_group())
        return [next(train)["tokens"].numpy() for _ in range(count)], next(valid)["tokens"].numpy()


def _batches(folder: Path, which: str, train_iters: int, consumed: int = 0, onset: int = 0):
    bridge_on_cpu.import_bridge()
    dataset = {
        "masked": lambda: _masked(folder, onset_samples=onset),
        "whole": lambda: _dataset(folder),
        "alone": lambda: _dataset(folder, ("alone0", "alone1")),
    }[which]()
    left = train_iters * BATCH - consumed
    return _tokens(_container(dataset, train_iters), consumed, left // 2)


@needs_bridge
def test_batches_are_those_of_materialized_datasets_and_hold_no_masked_token(folder):
    masked = run_on_ranks(2, _batches, folder, "masked", 8)
    alone = run_on_ranks(2, _batches, folder, "alone", 8)
    whole = run_on_ranks(2, _batches, folder, "whole", 8)
    for (train, valid), (expected, expected_valid) in zip(masked, alone, strict=True):
        np.testing.assert_array_equal(train, expected)
        np.testing.assert_array_equal(valid, expected_valid)
        assert not (np.array(train) == runs.POISON).any()
    assert not np.array_equal(masked[0][0], masked[1][0])  # each rank has samples of its own
    assert (np.array(whole[0][0]) == runs.POISON).any()  # without masks it would be seen


@needs_bridge
def test_the_blend_begins_at_the_onset_and_resumes_behind_it(folder):
    fresh = run_on_ranks(2, _batches, folder, "masked", 5)
    begun = run_on_ranks(2, _batches, folder, "masked", 5 + ONSET // BATCH, ONSET, ONSET)
    resumed = run_on_ranks(2, _batches, folder, "masked", 5 + ONSET // BATCH, ONSET + 2 * BATCH,
                           ONSET)
    for (expected, _), (all_of_it, _), (rest, _) in zip(fresh, begun, resumed, strict=True):
        np.testing.assert_array_equal(all_of_it, expected)
        np.testing.assert_array_equal(rest, expected[4:])  # micro-batches of two iterations


@needs_bridge
def test_a_checkpoint_from_before_the_onset_is_refused(folder):
    with pytest.raises(RankError, match=r"sample 8 was asked for, but the blend begins at "
                                        r"onset_samples = 12. Load the checkpoint of the onset"):
        run_on_ranks(2, _batches, folder, "masked", 8, 8, ONSET)


def _refusals(folder: Path) -> None:
    bridge_on_cpu.import_bridge()
    from megatron.bridge.data import utils
    from megatron.bridge.training.config import MockGPTDatasetConfig

    from megatron_direct.plugins import megatron_bridge

    mock = MockGPTDatasetConfig(seq_length=16, random_seed=1)
    with pytest.raises(UserError, match="is a MockGPTDatasetConfig, but sample masks are for"):
        megatron_bridge.MaskedBlendConfig.from_recipe(mock, sample_masks="x")
    with pytest.raises(UserError, match="onset_samples needs dataloader_type 'single'"):
        megatron_bridge.MaskedBlendConfig.from_recipe(
            _dataset(folder, dataloader_type="cyclic"), onset_samples=4).finalize()
    with pytest.raises(UserError, match="sample masks need a blend: set blend or"):
        megatron_bridge.MaskedBlendConfig.from_recipe(
            _dataset(folder, blend_per_split=None, split="100,0,0")).finalize()
    with pytest.raises(UserError, match="ends after 8 samples. Set train_iters to those before"):
        megatron_bridge.build_masked_datasets([8, 0, 0], _masked(folder, onset_samples=8))
    first = utils._REGISTRY.pop(megatron_bridge.MaskedBlendConfig)
    try:  # what a later version might do: the class before it in the registry fits as well
        with pytest.raises(UserError, match="would leave the masks out. Use megatron-bridge 0.6"):
            _masked(folder).finalize()
    finally:
        utils._REGISTRY[megatron_bridge.MaskedBlendConfig] = first
        megatron_bridge._come_first()
    _masked(folder).finalize()


@needs_bridge
def test_what_would_train_without_masks_is_refused(folder):
    run_on_ranks(1, _refusals, folder)


def _anneal_by_the_recipe(folder: Path):
    """Runs the docs' function, and returns batches and learning rates of its config."""
    bridge_on_cpu.import_bridge()
    import torch
    from megatron.bridge.training.optim import _get_scheduler
    from megatron.bridge.training.state import TrainState

    from megatron_direct.runtime import parallel

    code = re.search(r"^```python\n(.*?)^```", RECIPE.read_text(), re.M | re.S).group(1)
    recipe = {"__name__": "recipe"}
    exec(compile(code, str(RECIPE), "exec"), recipe)

    onset = folder / "onset"
    if parallel.is_rank_zero():  # as a checkpoint has it
        onset.mkdir()
        state = TrainState(step=ONSET // BATCH, consumed_train_samples=ONSET)
        torch.save(state.state_dict(), onset / "latest_train_state.pt")
    base = _dataset(folder)
    config = recipe["annealing"](_container(base, 1000), str(onset), str(folder / "annealed"), 5,
                                 base.blend_per_split, str(folder / "masks"))
    assert config.checkpoint.load == str(onset)
    assert config.checkpoint.save == str(folder / "annealed")
    train, _ = _tokens(config, ONSET, 10)

    config._calculate_scheduler_steps()
    config.scheduler.finalize()
    # As a checkpoint brings it, with the rates of the pre-training.
    group = {"lr": 0.0, "weight_decay": 0.0, "params": [], "max_lr": 3e-4, "min_lr": 3e-5}
    assert config.optimizer.lr == 3e-4 and config.optimizer.min_lr == 3e-5  # by which it is found
    optimizer = types.SimpleNamespace(param_groups=[group])
    scheduler = _get_scheduler(config.optimizer, config.scheduler, optimizer)
    rates = []
    scheduler.step(increment=ONSET)
    recipe["AnnealingRates"](end=0.0).on_train_start(
        types.SimpleNamespace(optimizer=optimizer, scheduler=scheduler))
    for _ in range(5):
        rates.append(group["lr"] / config.optimizer.lr)
        scheduler.step(increment=BATCH)
    return train, [*rates, group["lr"] / config.optimizer.lr]


@needs_bridge
def test_the_recipe_of_the_docs_anneals_over_the_blend(folder):
    annealed = run_on_ranks(2, _anneal_by_the_recipe, folder)
    fresh = run_on_ranks(2, _batches, folder, "masked", 5)
    for (train, rates), (expected, _) in zip(annealed, fresh, strict=True):
        np.testing.assert_array_equal(train, expected)
        np.testing.assert_allclose(rates, [1, 0.8, 0.6, 0.4, 0.2, 0], atol=1e-12)
