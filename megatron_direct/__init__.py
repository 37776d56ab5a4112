"""Principled sample selection for the annealing phase of LLM pre-training, on Megatron-Core.

Importing the package is light: torch and megatron-core are imported with the first name that
needs them.
"""

from __future__ import annotations

import importlib

__version__ = "0.2.0"

_PUBLIC_NAMES = {
    "solve_selection": "megatron_direct.selection",
    "stiff_budget": "megatron_direct.selection",
    "InfeasibleSelection": "megatron_direct.selection",
    "Selection": "megatron_direct.selection",
    "lanczos": "megatron_direct.curvature.lanczos",
    "Spectrum": "megatron_direct.curvature.lanczos",
    "SampleMask": "megatron_direct.data.mask",
    "MaskedGPTDataset": "megatron_direct.mcore.masked_dataset",
    "MaskedGPTDatasetConfig": "megatron_direct.mcore.masked_dataset",
}
__all__ = sorted(_PUBLIC_NAMES)


def __getattr__(name: str):
    if name in _PUBLIC_NAMES:
        return getattr(importlib.import_module(_PUBLIC_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
