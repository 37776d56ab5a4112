"""Imports Megatron-Bridge where there is neither a GPU nor Transformer Engine.

Its wheel is pure Python; ``import_bridge()`` puts stand-ins where it imports packages that need
CUDA. Whatever is asked of a stand-in is a class whose attributes are classes again: some are base
classes, some stand in annotations. Nothing of them runs in building datasets.
"""

from __future__ import annotations

import abc
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types

# What it imports at once, and what its training modules and recipes import beyond that.
_ABSENT_FROM_CONFIG = ("transformer_engine", "transformer_engine_torch", "megatron.energon")
_ABSENT_FROM_TRAINING = ("modelopt", "nvidia_resiliency_ext", "diffusers")


class _Class(abc.ABCMeta):  # some are bases beside ABC
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(name)

    def __or__(cls, other):
        return cls

    __ror__ = __or__


def _stand_in(name: str) -> type:
    return _Class(name, (), {"__init__": lambda self, *_args, **_kwargs: None,
                             # as a decorator that was given arguments
                             "__call__": lambda self, function, *_args, **_kwargs: function,
                             "__class_getitem__": classmethod(lambda cls, _item: cls)})


class _Module(types.ModuleType):
    __version__ = "0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(name)


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, absent: tuple[str, ...]):
        self.absent = absent

    def find_spec(self, name, path=None, target=None):
        if any(name == absent or name.startswith(f"{absent}.") for absent in self.absent):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


def why_not() -> str | None:
    """Why it cannot be imported here, or None."""
    try:
        version = importlib.metadata.version("megatron-bridge")
    except importlib.metadata.PackageNotFoundError:
        return "megatron-bridge is not installed (make test-megatron-bridge)"
    if tuple(map(int, version.split(".")[:2])) < (0, 6):
        return f"megatron-bridge {version} is installed, but 0.6 is needed"
    return None


def import_bridge() -> None:
    # First Megatron-Core's own modules, so that they find that Transformer Engine is missing.
    from megatron.core.extensions import transformer_engine  # noqa: F401
    from megatron.core.models.gpt import gpt_layer_specs  # noqa: F401
    from megatron.core.models.hybrid import hybrid_layer_specs  # noqa: F401

    if not any(isinstance(finder, _StandIns) for finder in sys.meta_path):
        sys.meta_path.append(_StandIns(_ABSENT_FROM_CONFIG))
        import megatron.bridge.training.config  # noqa: F401

        # Not before: other packages ask which of these are installed.
        sys.meta_path.append(_StandIns(_ABSENT_FROM_TRAINING))
