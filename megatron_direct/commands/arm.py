"""An arm that is to be annealed: what is asked for, checked before any work."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megatron_direct.config import (
    Execution,
    Given,
    Job,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
)
from megatron_direct.data import blend_files, checks, mask_files
from megatron_direct.data.blend_plan import BLEND_WEIGHTS, MAX_EPOCHS, Blend, BlendRules
from megatron_direct.data.indexed import prefix_names
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.mcore.checkpoint import Checkpoint, open_checkpoint
from megatron_direct.runtime import parallel
from megatron_direct.runtime.manifest import Key
from megatron_direct.settings import Settings, flag, flag_name
from megatron_direct.steps import selected
from megatron_direct.steps.annealed import RANDOM, random_arm
from megatron_direct.steps.onset import as_trained, dataset_digests, model_of
from megatron_direct.steps.selected import SelectionOrigin


@dataclass(frozen=True)
class AnnealConfig(Settings):
    """Annealing."""

    run_dir: str = flag("", "run directory of a finished select", required=True)
    anneal_load: str = flag(
        "", "checkpoint to anneal, of the same tokenizer: where a small model selects for a large "
        "one; default: the one that the selection was made for")
    selection: str = flag("direct", "the arm: the name of a selection, or random: as many samples "
                          "as --size-of has, drawn at random")
    size_of: str = flag("direct", "--selection random: draw as many samples as this "
                        "selection has")
    lr_wsd_decay_iters: int = flag(
        100, "iterations of the annealing, over which the learning rate decays", at_least=1)
    data_path: tuple = flag(
        (), "the blend: prefixes, or alternating weights and prefixes; what is not a pool of the "
        "run is used whole, unless PREFIX.mask.npz is beside it; default: the pools, each weighted "
        "by the tokens that its mask keeps", nargs="+")
    data_args_path: str = flag("", "file that holds the value of --data-path")
    per_split_data_args_path: str = flag(
        "", "JSON file with a blend each for train, valid (null, or the validation set of the "
        "run) and test (used as --test-data-path)")
    blend_weights: str = flag(
        "keep", "keep the weights of the blend, or rescale each to the tokens that its mask keeps",
        choices=BLEND_WEIGHTS)
    max_epochs: float = flag(
        MAX_EPOCHS, "largest number of epochs over a pool (more is an error); up to four epochs of "
        "repeated data are about as good as fresh data (Muennighoff et al. 2023)", above=0)
    test_data_path: tuple = flag((), "indexed datasets whose loss is reported", nargs="+")
    object_storage_cache_path: str = flag(
        "", "local folder for copies of the indexes of s3:// and msc:// datasets")
    save_interval: int = flag(50, "iterations between checkpoints", at_least=1)
    average_last: int = flag(
        0, "average the last so many saved states of the annealing, too, and report the average's "
        "losses; 0: no average", at_least=0)
    load_optim: bool = flag(True, "start from the checkpoint's optimizer state; "
                                  "--no-load-optim: start with a fresh one")

    def check(self) -> None:
        if self.selection != RANDOM and self.size_of != AnnealConfig.size_of:
            raise UserError(f"--size-of {self.size_of} has no effect without --selection random. "
                            "Add that flag, or leave this one out.")
        saved = -(-self.lr_wsd_decay_iters // self.save_interval)
        if self.average_last and not 2 <= self.average_last <= saved:
            raise UserError(
                f"--average-last {self.average_last}: with --save-interval {self.save_interval} an "
                f"annealing of {self.lr_wsd_decay_iters} iterations saves {saved} states, of which "
                "at least 2 can be averaged. Change either.")

    @property
    def selection_name(self) -> str:
        """Of the selection that the arm takes its samples, or their number, from."""
        return self.size_of if self.selection == RANDOM else self.selection

    @property
    def arm(self) -> str:
        """The name of its folder."""
        return random_arm(self.size_of) if self.selection == RANDOM else self.selection


@dataclass(frozen=True)
class AnnealRequest:
    anneal: AnnealConfig
    layout: ParallelConfig = field(default_factory=ParallelConfig)
    given: Given = field(default_factory=Given,
                         metadata={"groups": ("optimizer", "batch", "precision")})
    execution: Execution = field(default_factory=Execution)


@dataclass(frozen=True)
class ArmKey(Key):
    """What an arm's weights and losses depend on. segments: (first iteration, digests of the masks)
    of each; prefix_digests: of the blend, in its order."""

    checkpoint_digest: str
    segments: tuple[tuple[int, tuple[str, ...]], ...]
    prefix_digests: tuple[str, ...]
    blend_weights: str
    max_epochs: float
    lr_wsd_decay_iters: int
    load_optim: bool
    model: ModelConfig
    optimizer: OptimizerConfig
    global_batch_size: int
    seed: int
    valid_digests: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    test_digests: tuple[str, ...] = ()
    precision: Precision = field(default_factory=Precision)


@dataclass(frozen=True)
class AnnealedArm:
    """An annealing, all checked: what it is, and on what."""

    config: AnnealConfig
    origin: SelectionOrigin
    checkpoint: Checkpoint
    job: Job
    blend: Blend
    test: list[str]
    digests: dict[str, str]

    @property
    def folder(self) -> Path:
        return selected.arm_folder(Path(self.config.run_dir), self.config.arm)

    @functools.cached_property
    def pool(self) -> Samples:
        return Samples(self.origin.data_path, self.job.model.seq_length, self.job.model.vocab_size)

    @functools.cached_property
    def parts(self) -> dict[str, SampleMask]:
        """Masks of prefixes that are parts of a pool: with PREFIX.mask.npz beside them."""
        return parallel.on_rank_zero(lambda: mask_files.read_mask_files({
            prefix: path for prefix in self.blend.prefixes
            if prefix not in self.origin.data_path
            and os.path.isfile(path := prefix + mask_files.SUFFIX)}))

    @property
    def rules(self) -> BlendRules:
        return BlendRules(self.config.blend_weights, self.config.max_epochs)

    @property
    def tests(self) -> dict[str, str]:
        """Digest of each test set, by its name."""
        return {name: self.digests[prefix] for prefix, name in prefix_names(self.test).items()}

    def key(self, masks: Mapping[str, SampleMask]) -> ArmKey:
        def of(prefixes) -> tuple[str, ...]:
            return tuple(self.digests[prefix] for prefix in prefixes)

        config, weights = self.config, self.blend.weights
        return ArmKey(
            self.checkpoint.digest,
            ((0, tuple(mask.digest for mask in {**masks, **self.parts}.values())),),
            of(self.blend.prefixes), config.blend_weights, config.max_epochs,
            config.lr_wsd_decay_iters, config.load_optim, self.job.model, self.job.optimizer,
            self.job.batch.global_batch_size, self.job.batch.seed,
            of(self.origin.valid_data_path), None if weights is None else tuple(weights),
            of(self.test), self.job.precision)


def checked_arm(request: AnnealRequest, origin: SelectionOrigin) -> AnnealedArm:
    """Raises UserError if anything has changed since the selection was made, and for flags that do
    not fit one another, before any work."""
    config, given = request.anneal, request.given
    checkpoint = open_checkpoint(config.anneal_load or origin.load)
    is_another = checkpoint.digest != origin.checkpoint_digest
    model_config = (model_of(checkpoint, Given(), origin.data_path)
                    if is_another and config.anneal_load else ModelConfig(**origin.model))
    job = dataclasses.replace(as_trained(checkpoint, model_config, request.layout, given),
                              execution=request.execution)
    _require_same_optimizer(config, job.optimizer, checkpoint)
    job.require_runs_on(parallel.world_size(), trains=True)
    asked, test = blend_of(config, origin)
    checks.require_disjoint(pool=list(origin.data_path), validation=list(origin.valid_data_path),
                            test=test)
    checks.require_names_of_their_own(origin.valid_data_path, test)
    if is_another and not config.anneal_load:
        raise UserError(f"{checkpoint.path} is not the checkpoint that the selection was made for. "
                        "Run select again in a new --run-dir, or give --anneal-load to anneal "
                        "another model on it.")
    digests = dataset_digests(list(dict.fromkeys(
        [*origin.data_path, *origin.valid_data_path, *asked.prefixes, *test])))
    for prefix, digest in origin.digests.items():
        if digests[prefix] != digest:
            raise UserError(f"{prefix} has changed since the selection was made. "
                            "Run select again in a new --run-dir.")
    asked = _with_names_of_pools(asked, origin, digests)
    checks.require_one_vocabulary([*asked.prefixes, *test], job.model.vocab_size,
                                  checkpoint.tokenizer_digest)
    return AnnealedArm(config, origin, checkpoint, job, asked, test, digests)


def _with_names_of_pools(blend: Blend, origin: SelectionOrigin,
                         digests: Mapping[str, str]) -> Blend:
    """A dataset that is a pool of the run is that pool, and has its mask, however its path is spelt
    in the blend: unless it has a mask of its own beside it."""
    pools = {digests[prefix]: prefix for prefix in origin.data_path}
    return dataclasses.replace(blend, prefixes=[
        prefix if prefix in origin.data_path or os.path.isfile(prefix + mask_files.SUFFIX)
        else pools.get(digests[prefix], prefix) for prefix in blend.prefixes])


def blend_of(config: AnnealConfig, origin: SelectionOrigin) -> tuple[Blend, list[str]]:
    """(the blend, the datasets whose loss is reported), from the one flag that gives them."""
    pools, test = list(origin.data_path), list(config.test_data_path)
    data_path = list(config.data_path) if list(config.data_path) != pools else []
    given = [flag_name(name) for name, value in (
        ("data_path", data_path), ("data_args_path", config.data_args_path),
        ("per_split_data_args_path", config.per_split_data_args_path)) if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} both define the blend. Give only one of them.")
    if config.data_args_path:
        return blend_files.read_data_args(config.data_args_path), test
    if not config.per_split_data_args_path:
        return blend_files.parse_data_path(data_path or pools), test
    splits = blend_files.read_per_split_data_args(config.per_split_data_args_path)
    train, valid, reported = splits["train"], splits["valid"], splits["test"]
    if train is None:
        raise UserError(f"{config.per_split_data_args_path} has no train blend. Add one.")
    if valid and sorted(valid.prefixes) != sorted(origin.valid_data_path):
        raise UserError(f"{config.per_split_data_args_path} validates on "
                        f"{', '.join(valid.prefixes)}, but the selection was made for "
                        f"{', '.join(origin.valid_data_path)}. Set valid to null.")
    return train, test or (list(reported.prefixes) if reported else [])


def _require_same_optimizer(config: AnnealConfig, optimizer: OptimizerConfig,
                            checkpoint: Checkpoint) -> None:
    name = "use_distributed_optimizer"
    carried = checkpoint.arguments.get(name)
    if config.load_optim and carried is not None and carried != getattr(optimizer, name):
        raise UserError(
            f"the checkpoint's optimizer was saved with {flag_name(name)} {carried}: its state has "
            "another layout. Leave the flag as it was, or add --no-load-optim.")
