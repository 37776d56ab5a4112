"""Megatron's blend over masked prefixes: the training data of the annealing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_direct.config import Job
from megatron_direct.data import indexed
from megatron_direct.data.blend_plan import (
    Blend,
    BlendPart,
    BlendRules,
    Demand,
    num_sequences_in,
    plan_blend,
    require_something_left,
)
from megatron_direct.data.mask import SampleMask
from megatron_direct.errors import UserError
from megatron_direct.mcore import index_caches
from megatron_direct.mcore.blend_cache import sound_cache
from megatron_direct.mcore.object_storage import dataset_options, read_object_stores
from megatron_direct.runtime import parallel

_SPLITS = ("train", "valid", "test")
_COUNTS = "--per-dataset-sequences-path"
_COUNT_AGAIN = "Write it again with Megatron-LM's tools/build_sequences_per_dataset.py."


@dataclass(frozen=True)
class Vocabulary:
    """What Megatron's datasets ask of a tokenizer: its size, its ends, and who it is."""

    vocab_size: int
    name: str

    @property
    def unique_identifiers(self) -> dict:
        return {"class": type(self).__name__, "name": self.name, "vocab_size": self.vocab_size}

    @property
    def eod(self) -> int:
        """Behind the last token: nothing is reset or masked at a document's end."""
        return self.vocab_size

    @property
    def pad(self) -> int:
        """No token: training sequences are full."""
        return -1


@dataclass(frozen=True)
class BlendRequest:
    """Training sequences of ``seq_length`` tokens, at least ``num_sequences`` of them, in an order
    that ``seed`` gives; rank 0 builds the indices into ``cache``."""

    seq_length: int
    num_sequences: int
    seed: int
    cache: Path
    vocabulary: Vocabulary

    @classmethod
    def for_job(cls, job: Job, iterations: int, seed: int, cache: Path,
                tokenizer_digest: str | None) -> BlendRequest:
        """As many sequences as a job takes in so many iterations."""
        return cls(job.model.seq_length, iterations * job.batch.global_batch_size, seed, cache,
                   Vocabulary(job.model.known_vocab_size, str(tokenizer_digest)))


def build_blend(blend: Blend, masks: Mapping[str, SampleMask], request: BlendRequest,
                rules: BlendRules | None = None):
    """(dataset of at least the sequences requested, its BlendParts); all ranks call this.

    Without weights a prefix counts by the tokens that its mask leaves, so that every kept document
    is seen equally often. For what is dropped and what is refused see plan_blend.
    """
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    rules = rules or BlendRules()
    if blend.weights is None:
        rules = dataclasses.replace(rules, blend_weights="tokens")
    config = GPTDatasetConfig(
        random_seed=request.seed,
        sequence_length=request.seq_length,
        blend_per_split=[_as_megatron(blend), None, None],
        path_to_cache=str(request.cache),
        tokenizer=request.vocabulary,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **dataset_options(blend.prefixes),
    )
    with sound_cache(request.cache):  # first of all: what is in pieces is deleted, not refused
        builder, parts = masked_builder([request.num_sequences, 0, 0], lambda: True, config, masks,
                                        rules)
        dataset, _, _ = builder.build()
    return dataset, parts


def is_gpt_dataset(dataset_class: type) -> bool:
    """Whether it is the very class that a MaskedGPTDataset can stand in for."""
    from megatron.core.datasets.gpt_dataset import GPTDataset

    return dataset_class is GPTDataset


def prefixes_of(config) -> list[str]:
    """All prefixes of a GPTDatasetConfig, each once."""
    blends = [config.blend] if config.blend else config.blend_per_split or []
    return list(dict.fromkeys(prefix for blend in blends if blend for prefix in blend[0]))


def masked_builder(sizes: Sequence[int | None], is_built_on_rank: Callable, config,
                   masks: Mapping[str, SampleMask], rules: BlendRules | None = None,
                   num_consumed: int = 0):
    """(BlendedMegatronDatasetBuilder over MaskedGPTDatasets, BlendParts of the training split).

    config: a GPTDatasetConfig, for which Megatron would have built GPTDatasets; what masks empty is
    taken out of its blends, and weights are rescaled. sizes: sequences that the training draws from
    each split, of which ``num_consumed`` of the first were drawn before, from whatever blend.
    rules: of the training's blend, and of no other.

    A blend of several prefixes without weights is one epoch, as in Megatron; asked for more it
    raises UserError, unless ``blend_weights="tokens"`` gives it weights. All ranks call this.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from megatron_direct.mcore.masked_dataset import MaskedGPTDataset, MaskedGPTDatasetConfig

    if config.object_storage_cache_path:
        read_object_stores(config.object_storage_cache_path)
    if config.path_to_cache:
        parallel.on_rank_zero(lambda: index_caches.require_plain_caches(config.path_to_cache))
    left = [sizes[0] and max(sizes[0] - num_consumed, 0), *sizes[1:]]
    plan = _plan_one_blend if config.blend is not None else _plan_each_split
    blends, parts = parallel.on_rank_zero(
        lambda: plan(_Plan(config, masks, rules or BlendRules()),
                     list(zip(_SPLITS, sizes, left, strict=True))))
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(GPTDatasetConfig)
              if f.init}
    masked = MaskedGPTDatasetConfig(**{**values, **blends, "sample_masks": dict(masks)})
    parallel.on_rank_zero(lambda: _require_counts_of_files(masked))
    return BlendedMegatronDatasetBuilder(MaskedGPTDataset, list(sizes), is_built_on_rank,
                                         masked), parts


def _require_counts_of_files(config) -> None:
    """Raises UserError where ``sequences_per_dataset`` says other than the datasets' own files.

    With it (--per-dataset-sequences-path) Megatron reads no header: it takes the counts from there,
    and the type of tokens from the size of the vocabulary. Wrong ones give other tokens.
    """
    if config.sequences_per_dataset is None:
        return
    for prefix in prefixes_of(config):
        if prefix not in config.sequences_per_dataset:
            raise UserError(f"{_COUNTS} has no entry for {prefix}. {_COUNT_AGAIN}")
        given = list(config.sequences_per_dataset[prefix])
        dataset = indexed.open_indexed(prefix)
        found = [len(dataset), len(dataset.document_indices)]
        if given != found:
            raise UserError(f"{_COUNTS} gives {prefix} {given} sequences and document boundaries, "
                            f"but the dataset has {found}. {_COUNT_AGAIN}")
        size = {4: 4, 8: 2}[config.token_dtype_code]
        if dataset.dtype.itemsize != size:
            raise UserError(
                f"{prefix} stores tokens in {dataset.dtype.itemsize} bytes each, but with "
                f"{_COUNTS} Megatron reads {size}, from the size of the vocabulary. Leave the flag "
                "out, or make the dataset again.")


def _as_megatron(blend: Blend) -> tuple[list[str], list[float] | None]:
    return list(blend.prefixes), None if blend.weights is None else list(blend.weights)


# (split, sequences that the training draws from it, those that were not drawn before)
_Size = tuple[str, int | None, int | None]


def _plan_one_blend(plan: _Plan, sizes: list[_Size]) -> tuple[dict, list[BlendPart]]:
    """One blend that ``split`` divides: what is dropped from the training is dropped throughout."""
    shares = dict(zip(_SPLITS, plan.config.split_matrix, strict=True))
    first = next(size for size in sizes if shares[size[0]] is not None)
    blend, parts = plan.of(plan.config.blend, first, shares[first[0]])
    for split in _SPLITS:
        if split != first[0] and shares[split] is not None:
            require_something_left(
                Blend(*blend), plan.masks,
                Demand(plan.config.sequence_length, 0, shares[split]), split)
    return {"blend": blend}, parts


def _plan_each_split(plan: _Plan, sizes: list[_Size]) -> tuple[dict, list[BlendPart]]:
    """A blend for each split, of which any may be None."""
    blends: list[tuple | None] = []
    training: list[BlendPart] = []
    for blend, size in zip(plan.config.blend_per_split, sizes, strict=True):
        planned, parts = None, list[BlendPart]()
        if blend is not None:
            planned, parts = plan.of(blend, size, trained=size[0] == "train")
        blends.append(planned)
        training = parts if size[0] == "train" else training
    return {"blend_per_split": blends}, training


@dataclass(frozen=True)
class _Plan:
    """config: a GPTDatasetConfig."""

    config: Any
    masks: Mapping[str, SampleMask]
    rules: BlendRules

    def of(self, blend: tuple, size: _Size, share: tuple[float, float] = (0.0, 1.0), *,
           trained: bool = True) -> tuple[tuple, list[BlendPart]]:
        """Megatron's blend without what masks empty, and its parts."""
        asked = Blend(*blend)
        _, whole, left = size
        rules = self.rules if trained else BlendRules()
        parts = plan_blend(asked, self.masks,
                           Demand(self.config.sequence_length, left or 0, share), rules)
        vocab_size = getattr(self.config.tokenizer, "vocab_size", None)
        for part in parts:
            if vocab_size is not None:
                indexed.require_tokens_below(part.prefix, vocab_size)
        used = [part.prefix for part in parts]
        if rules.blend_weights == "tokens" and whole is not None and len(asked.prefixes) > 1:
            return (used, [part.weight for part in parts]), parts
        if asked.weights is not None:
            # As given, to the last bit: Megatron rounds up counts that are computed from them.
            given = dict(zip(asked.prefixes, asked.weights, strict=True))
            return (used, [given[prefix] for prefix in used]), parts
        available = num_sequences_in(parts, self.config.sequence_length)
        if trained and len(used) > 1 and whole is not None and whole > available:
            raise UserError(
                f"a blend without weights is one epoch, which has {available} sequences, but the "
                f"training needs {whole}. Give weights, or --blend-weights tokens, so that "
                "datasets are repeated, or train on less.")
        return (used, None), parts
