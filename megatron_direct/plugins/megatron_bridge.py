"""Sample masks in NeMo's Megatron-Bridge: a dataset provider for ``ConfigContainer.dataset``.

It *holds* a GPTDatasetConfig. A subclass of one would be taken for one: Megatron-Bridge looks a
config up among its own classes first, and would build unmasked datasets without a word.

    from megatron_direct.plugins.megatron_bridge import MaskedDatasetProvider

    config.dataset = MaskedDatasetProvider(
        gpt=config.dataset,                      # the recipe's GPTDatasetConfig, with its blend
        sample_masks="runs/mine/masks")
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron.bridge.training.config import DatasetProvider, GPTDatasetConfig

from megatron_direct.data.blend_plan import MAX_EPOCHS, BlendRules
from megatron_direct.data.mask_files import find_mask_files, read_mask_files
from megatron_direct.errors import UserError
from megatron_direct.mcore.blend import masked_builder
from megatron_direct.runtime import parallel


@dataclass(kw_only=True)
class MaskedDatasetProvider(DatasetProvider):
    """gpt: the blend and everything else of the datasets, as without masks.

    sample_masks: folder of masks, each called by the last part of its prefix; sample_mask: {prefix:
    file}, for masks elsewhere; blend_weights, max_epochs: as the flags of the same names.
    """

    gpt: GPTDatasetConfig
    sample_masks: str | None = None
    sample_mask: dict[str, str] = field(default_factory=dict)
    blend_weights: str = "keep"
    max_epochs: float = MAX_EPOCHS

    def __post_init__(self):
        if type(self.gpt) is not GPTDatasetConfig:
            raise UserError(f"gpt is a {type(self.gpt).__name__}, but sample masks are for "
                            "pre-training data. Give a GPTDatasetConfig.")

    @property
    def seq_length(self) -> int:
        """Asked for by Megatron-Bridge's evaluation."""
        return self.gpt.seq_length

    def finalize(self) -> None:
        """Called by ConfigContainer.validate(). The held config is nobody else's to finalise."""
        super().finalize()
        self.gpt.finalize()

    def build_datasets(self, context) -> tuple[Any | None, Any | None, Any | None]:
        """Train, validation and test datasets. All ranks call this, and all build.

        context: Megatron-Bridge's DatasetBuildContext.
        """
        self.gpt.tokenizer = context.tokenizer
        blends = [self.gpt.blend] if self.gpt.blend else self.gpt.blend_per_split or []
        prefixes = list(dict.fromkeys(p for blend in blends if blend for p in blend[0]))
        masks = read_mask_files(parallel.on_rank_zero(lambda: find_mask_files(
            prefixes, list(self.sample_mask.items()), self.sample_masks)))
        builder, parts = masked_builder(
            [context.train_samples, context.valid_samples, context.test_samples], lambda: True,
            self.gpt, masks, BlendRules(self.blend_weights, self.max_epochs))
        for part in parts:
            parallel.say(f"> {part}")
        return tuple(builder.build())
