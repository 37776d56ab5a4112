"""Sample masks in NeMo's Megatron-Bridge: a dataset config for ``ConfigContainer.dataset``.

    from megatron_direct.plugins.megatron_bridge import MaskedBlendConfig

    config.dataset = MaskedBlendConfig.from_recipe(
        config.dataset, sample_masks="runs/mine/selections/direct/masks")

Megatron-Bridge looks up who builds the datasets in a registry, by the class of the config: the
first entry that fits. MaskedBlendConfig is a GPTDatasetConfig in all respects, and importing this
module puts it before that one; otherwise its blend would be built without masks. docs/nemo.md turns
a recipe into an annealing.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.data import utils
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.config import GPTDatasetConfig
from torch.utils.data import Dataset

from megatron_direct.data.blend_plan import MAX_EPOCHS, BlendRules
from megatron_direct.data.mask_files import find_mask_files, read_mask_files
from megatron_direct.errors import UserError
from megatron_direct.mcore.blend import masked_builder, prefixes_of
from megatron_direct.runtime import parallel


@dataclass
class MaskedBlendConfig(GPTDatasetConfig):
    """The blend of a GPTDatasetConfig, and masks over its prefixes.

    sample_masks: folder of masks, each named after the last part of its prefix; sample_mask:
    {prefix: file}, for masks elsewhere; blend_weights, max_epochs: as the flags of these names.

    onset_samples: training samples that the checkpoint has consumed with which this blend begins.
    Its first sequence is then the first that is trained on; with 0 Megatron-Bridge skips as many
    sequences of the blend as were consumed of another one.
    """

    sample_masks: str | None = field(default=None, kw_only=True)
    sample_mask: dict[str, str] = field(default_factory=dict, kw_only=True)
    blend_weights: str = field(default="keep", kw_only=True)
    max_epochs: float = field(default=MAX_EPOCHS, kw_only=True)
    onset_samples: int = field(default=0, kw_only=True)

    def __init__(self, **values):
        self.sample_masks = values.pop("sample_masks", None)
        self.sample_mask = values.pop("sample_mask", {})
        self.blend_weights = values.pop("blend_weights", "keep")
        self.max_epochs = values.pop("max_epochs", MAX_EPOCHS)
        self.onset_samples = values.pop("onset_samples", 0)
        super().__init__(**values)

    @classmethod
    def from_recipe(cls, dataset: GPTDatasetConfig, **masks) -> MaskedBlendConfig:
        """A recipe's own config with masks; ``masks``: the fields above."""
        if type(dataset) is not GPTDatasetConfig:
            raise UserError(f"the recipe's dataset is a {type(dataset).__name__}, but sample masks "
                            "are for pre-training data. Give a GPTDatasetConfig.")
        values = {f.name: getattr(dataset, f.name) for f in dataclasses.fields(dataset)
                  if f.init and f.name != "sequence_length"}
        values["skip_getting_attention_mask_from_dataset"] = \
            dataset.skip_getting_attention_mask_from_dataset
        return cls(**values, **masks)

    def finalize(self) -> None:
        """Called by ConfigContainer.validate()."""
        super().finalize()
        if not prefixes_of(self):
            raise UserError("sample masks need a blend: set blend or blend_per_split of the "
                            "dataset config.")
        if self.onset_samples and self.dataloader_type != "single":
            raise UserError(f"onset_samples needs dataloader_type 'single', which reads a blend in "
                            f"order; it is {self.dataloader_type!r}.")
        if utils.get_dataset_provider(self) is not build_masked_datasets:
            raise UserError("this Megatron-Bridge does not look up who builds the datasets of a "
                            "MaskedBlendConfig where version 0.6 does, and would leave the masks "
                            "out. Use megatron-bridge 0.6.")


def build_masked_datasets(train_val_test_num_samples: list[int], dataset_config: MaskedBlendConfig,
                          ) -> tuple[Any | None, Any | None, Any | None]:
    """Train, validation and test datasets, as Megatron-Bridge asks for them.

    All ranks call this, and all build. Raises UserError for what cannot be honoured.
    """
    config, onset = dataset_config, dataset_config.onset_samples
    train, valid, test = train_val_test_num_samples
    if onset >= train:
        raise UserError(f"onset_samples is {onset}, but the training ends after {train} samples. "
                        "Set train_iters to those before the onset and those of the annealing.")
    masks = read_mask_files(parallel.on_rank_zero(lambda: find_mask_files(
        prefixes_of(config), list(config.sample_mask.items()), config.sample_masks)))
    builder, parts = masked_builder(
        [train - onset, valid, test], lambda: True, config, masks,
        BlendRules(config.blend_weights, config.max_epochs))
    for part in parts:
        parallel.say(f"> {part}")
    train_dataset, valid_dataset, test_dataset = builder.build()
    if onset and train_dataset is not None:
        train_dataset = _FromOnset(train_dataset, onset)
    return train_dataset, valid_dataset, test_dataset


class _FromOnset(Dataset):
    """A dataset whose first sequence has the number of samples that were consumed before it."""

    def __init__(self, dataset: Any, onset: int):
        self.dataset, self.onset = dataset, onset

    def __len__(self) -> int:
        return self.onset + len(self.dataset)

    def __getitem__(self, index: int):
        if index < self.onset:
            raise UserError(f"sample {index} was asked for, but the blend begins at "
                            f"onset_samples = {self.onset}. Load the checkpoint of the onset, or a "
                            "later one of this annealing.")
        return self.dataset[index - self.onset]


def _come_first() -> None:
    registry = utils._REGISTRY
    others = {kind: build for kind, build in registry.items() if kind is not MaskedBlendConfig}
    registry.clear()
    registry.update({MaskedBlendConfig: build_masked_datasets, **others})


_come_first()


class AnnealingRates(Callback):
    """The learning rates of the annealing, from its first iteration on, for ``pretrain``.

    start: left out, as the checkpoint has it. A checkpoint's groups of parameters bring the rates
    that they were trained with, which the schedule prefers to the config's; since megatron-core
    0.19 its optimizer also finds them by these rates. So config.optimizer has to have the rates of
    the checkpoint that is loaded, and others can be set only then.
    """

    def __init__(self, *, start: float | None = None, end: float = 0.0):
        self.start, self.end = start, end

    def on_train_start(self, context: CallbackContext) -> None:
        assert context.optimizer is not None and context.scheduler is not None
        for group in context.optimizer.param_groups:
            group["min_lr"] = self.end
            if self.start is not None:
                group["max_lr"] = self.start
        context.scheduler.step(0)  # the rate of the first iteration was computed on loading
