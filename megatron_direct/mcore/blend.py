"""Megatron's blend over masked prefixes: the training data of the annealing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_direct.data import indexed
from megatron_direct.data.blend_plan import (
    Blend,
    BlendPart,
    num_sequences_in,
    plan_blend,
    require_something_left,
)
from megatron_direct.data.mask import SampleMask
from megatron_direct.errors import UserError
from megatron_direct.runtime import parallel

_SPLITS = ("train", "valid", "test")


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


def parse_data_path(data_path: Sequence[str]) -> Blend:
    """``--data-path`` as Megatron takes it: prefixes, or weights and prefixes by turns."""
    values = list(data_path)
    if len(values) % 2 == 0 and all(_is_number(value) for value in values[::2]):
        return values[1::2], [float(value) for value in values[::2]]
    return values, None


def read_data_args(path: str) -> Blend:
    """``--data-args-path``: a file with what ``--data-path`` would say."""
    return parse_data_path(_read(path).split())


def read_per_split_data_args(path: str) -> dict[str, Blend | None]:
    """``--per-split-data-args-path``: JSON with a ``--data-path`` for train, valid and test."""
    try:
        found = json.loads(_read(path))
        texts = {split: found[split] for split in _SPLITS}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no JSON object with the keys train, valid and test "
                        f"({type(error).__name__}: {error}). Mend the file.") from error
    return {split: None if not text else
            parse_data_path(text.split() if isinstance(text, str) else text)
            for split, text in texts.items()}


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Correct the path.") from error


def build_blend(prefixes: Sequence[str], weights: Sequence[float] | None,
                masks: Mapping[str, SampleMask], *, seq_length: int, num_sequences: int, seed: int,
                vocabulary: Vocabulary, cache: Path, blend_weights: str = "keep",
                max_epochs: float | None = None):
    """(dataset of at least ``num_sequences`` training sequences, its BlendParts).

    Without weights a prefix counts by the tokens that its mask leaves, so that every kept document
    is seen equally often. All ranks call this; rank 0 builds the indices into ``cache`` and the
    others read them there. For what is dropped and what is refused see plan_blend.
    """
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[(list(prefixes), None if weights is None else list(weights)), None, None],
        path_to_cache=str(cache),
        tokenizer=vocabulary,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    builder, parts = masked_builder(
        [num_sequences, 0, 0], lambda: True, config, masks, max_epochs=max_epochs,
        blend_weights="tokens" if weights is None else blend_weights)
    dataset, _, _ = builder.build()
    return dataset, parts


def is_gpt_dataset(dataset_class: type) -> bool:
    """Whether it is the very class that a MaskedGPTDataset can stand in for."""
    from megatron.core.datasets.gpt_dataset import GPTDataset

    return dataset_class is GPTDataset


def masked_builder(sizes: Sequence[int | None], is_built_on_rank: Callable, config,
                   masks: Mapping[str, SampleMask], *, blend_weights: str = "keep",
                   max_epochs: float | None = None, num_consumed: int = 0):
    """(BlendedMegatronDatasetBuilder over MaskedGPTDatasets, BlendParts of the training split).

    config: a GPTDatasetConfig, for which Megatron would have built GPTDatasets; what masks empty is
    taken out of its blends, and weights are rescaled. sizes: sequences that the training draws from
    each split, of which ``num_consumed`` of the first were drawn before, from whatever blend.

    A blend of several prefixes without weights is one epoch, as in Megatron; asked for more it
    raises UserError, unless ``blend_weights="tokens"`` gives it weights. All ranks call this.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from megatron_direct.mcore.masked_dataset import MaskedGPTDataset, MaskedGPTDatasetConfig

    rules = _Rules(blend_weights, max_epochs, num_consumed)
    plan = _plan_one_blend if config.blend is not None else _plan_each_split
    blends, parts = parallel.on_rank_zero(lambda: plan(config, sizes, masks, rules))
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(GPTDatasetConfig)
              if f.init}
    masked = MaskedGPTDatasetConfig(**{**values, **blends, "sample_masks": dict(masks)})
    return BlendedMegatronDatasetBuilder(MaskedGPTDataset, list(sizes), is_built_on_rank,
                                         masked), parts


@dataclass(frozen=True)
class _Rules:
    """What is asked of the training's blend, and of no other."""

    blend_weights: str
    max_epochs: float | None
    num_consumed: int


def _plan_one_blend(config, sizes, masks, rules: _Rules) -> tuple[dict, list[BlendPart]]:
    """One blend that ``split`` divides: what is dropped from the training is dropped throughout."""
    shares = dict(zip(_SPLITS, config.split_matrix, strict=True))
    first = next(split for split in _SPLITS if shares[split] is not None)
    blend, parts = _plan(config, config.blend, sizes[_SPLITS.index(first)], masks, rules,
                         shares[first])
    for split in _SPLITS:
        if split != first and shares[split] is not None:
            require_something_left(blend[0], masks, shares[split], split)
    return {"blend": blend}, parts


def _plan_each_split(config, sizes, masks, rules: _Rules) -> tuple[dict, list[BlendPart]]:
    """A blend for each split, of which any may be None."""
    blends, training = [], []
    for split, blend, size in zip(_SPLITS, config.blend_per_split, sizes, strict=True):
        planned, parts = None, []
        if blend is not None:
            planned, parts = _plan(config, blend, size, masks, rules if split == "train" else None)
        blends.append(planned)
        training = parts if split == "train" else training
    return {"blend_per_split": blends}, training


def _plan(config, blend: Blend, size: int | None, masks, rules: _Rules | None,
          share: tuple[float, float] = (0.0, 1.0)) -> tuple[Blend, list[BlendPart]]:
    """The blend without what masks empty, and its parts. rules: None if it is not trained on."""
    prefixes, weights = blend
    size_left = max((size or 0) - (rules.num_consumed if rules else 0), 0)
    rule = rules.blend_weights if rules else "keep"
    parts = plan_blend(prefixes, weights, masks, seq_length=config.sequence_length,
                       num_sequences=size_left, blend_weights=rule,
                       max_epochs=rules.max_epochs if rules else None, share=share)
    vocab_size = getattr(config.tokenizer, "vocab_size", None)
    for part in parts:
        if vocab_size is not None:
            indexed.require_tokens_below(part.prefix, vocab_size)
    used = [part.prefix for part in parts]
    if rule == "tokens" and size is not None and len(prefixes) > 1:
        return (used, [part.weight for part in parts]), parts
    if weights is not None:
        # As given, to the last bit: Megatron rounds up counts that are computed from them.
        given = dict(zip(prefixes, weights, strict=True))
        return (used, [given[prefix] for prefix in used]), parts
    available = num_sequences_in(parts, config.sequence_length)
    if rules and len(used) > 1 and size is not None and size > available:
        raise UserError(
            f"a blend without weights is one epoch, and that has {available} sequences where "
            f"the training asks for {size}. Give weights, or --blend-weights tokens, so that "
            "datasets are seen more than once, or train on less.")
    return (used, None), parts


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
