"""What a checkpoint holds, read without running anything that it holds.

torch reads a checkpoint's ``.metadata`` with ``pickle``, which calls whatever the file names. Here
only the classes that torch itself writes there are built, and a file that names another one is
refused; so a checkpoint can be looked at before it is trusted enough to be loaded.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_direct.errors import UserError
from megatron_direct.mcore.checkpoint_formats import PARTS_OF_MODELS, require_torch_dist

METADATA = ".metadata"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_type_of_numbers = module == "torch" and isinstance(getattr(torch, name, None),
                                                              torch.dtype)
        if is_type_of_numbers or name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is none of what torch "
                                     "writes")


@dataclass(frozen=True)
class TensorEntry:
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_weight(self) -> bool:
        """Whether it is of the model, not of its optimizer."""
        return self.name.startswith(PARTS_OF_MODELS)


def tensors_in(checkpoint: Path) -> Sequence[TensorEntry]:
    """Raises UserError for a checkpoint whose ``.metadata`` torch has not written as it is."""
    require_torch_dist(checkpoint)
    path = checkpoint / METADATA
    try:
        with open(path, "rb") as file:
            entries = _Unpickler(file).load().state_dict_metadata
        return [TensorEntry(name, tuple(entry.size), str(entry.properties.dtype))
                for name, entry in sorted(entries.items()) if hasattr(entry, "properties")]
    except Exception as error:  # of bytes that are no pickle almost anything is raised
        raise UserError(f"{path} is damaged, or is not what it seems ({error}). Do not load the "
                        "checkpoint; copy it again from where it was made.") from error
