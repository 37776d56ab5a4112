"""What differs between the versions of megatron-core that are supported, 0.16.1 to 0.19.2.

One source serves them all. Versions are told apart by what they can do (a signature, the type of a
builder), not by their numbers: forks and images carry parts of other releases.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
import logging
import multiprocessing
import os
from collections.abc import Iterator
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

from megatron_direct import hybrid_pattern
from megatron_direct.errors import UserError
from megatron_direct.runtime import watch
from megatron_direct.settings import flag_name

_COMMON_FILE = "common.pt"
_METADATA_FILE = ".metadata"

# Loggers that tell users of this package what only its authors can change: that GPTModel, and a
# checkpoint's common.pt, will be dropped some day (both since 0.19).
_DEPRECATIONS = ("megatron.core.models.gpt.gpt_model",
                 "megatron.core.dist_checkpointing.strategies.common")


def version() -> str:
    return importlib.metadata.version("megatron-core")


def imported_version() -> str:
    """The same, once the import has shown that it is whole."""
    import megatron.core  # noqa: F401

    return version()


# --- models ------------------------------------------------------------------------------------


def is_mixture_of_experts(mlp: Any) -> bool:
    """Of a transformer layer's ``mlp``: a ModuleSpec, and since 0.18 a partial of a class."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    return (mlp.func if isinstance(mlp, functools.partial) else mlp.module) is MoELayer


def with_submodules(builder: Any, **submodules: Any) -> Any:
    """A ModuleSpec or a partial of a class, with some of its submodules replaced."""
    if isinstance(builder, functools.partial):
        replaced = dataclasses.replace(builder.keywords["submodules"], **submodules)
        return functools.partial(builder, submodules=replaced)
    return dataclasses.replace(
        builder, submodules=dataclasses.replace(builder.submodules, **submodules))


@functools.cache  # one class for all models: torch.compile compiles anew for another
def latent_self_attention() -> type:
    """MLASelfAttention that builds what its submodules say.

    Since 0.19 Megatron decides about norms itself. Where queries have no latents it then takes for
    granted that their projection has a norm of its own, as only Transformer Engine's can have: it
    would be another model, or none at all.
    """
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    class LatentSelfAttention(MLASelfAttention):
        def _resolve_qk_norm_config(self, submodules) -> dict:
            if self.config.q_lora_rank is not None:
                return super()._resolve_qk_norm_config(submodules)
            return {"linear_q_proj": submodules.linear_q_proj,
                    "linear_q_up_proj": IdentityOp,
                    "linear_kv_up_proj": submodules.linear_kv_up_proj,
                    "q_layernorm": IdentityOp,
                    "kv_layernorm": submodules.kv_layernorm}

    return LatentSelfAttention


def require_setting(config: type, name: str) -> None:
    """Raises UserError if a dataclass of Megatron's does not have a field yet."""
    if name not in {field.name for field in dataclasses.fields(config)}:
        raise UserError(f"megatron-core {version()} has no {flag_name(name)}. Install a newer one.")


def hybrid_stack() -> tuple[type, type]:
    """The stack of a hybrid model's layers, and the dataclass of its kinds of layers.

    Up to 0.17 they are in a module of Mamba's, which was one of the layers first.
    """
    block = _first_module("megatron.core.models.hybrid.hybrid_block",
                          "megatron.core.ssm.mamba_block")
    name = "HybridStack" if hasattr(block, "HybridStack") else "MambaStack"
    return getattr(block, name), getattr(block, f"{name}Submodules")


def hybrid_model(stack: Any, pattern: str, vp_stage: int | None, arguments: dict[str, Any]) -> Any:
    """A HybridModel, or up to 0.17 a MambaModel, with the layers of one stage of the pattern.

    The names of what it takes have changed, and 0.16 divides the layers into stages itself.
    """
    module = _first_module("megatron.core.models.hybrid.hybrid_model",
                           "megatron.core.models.mamba.mamba_model")
    model = module.HybridModel if hasattr(module, "HybridModel") else module.MambaModel
    known = inspect.signature(model.__init__).parameters
    stack_name = next(name for name in ("hybrid_stack_spec", "mamba_stack_spec") if name in known)
    if "hybrid_layer_pattern" in known:
        layers = {"hybrid_layer_pattern": pattern, "vp_stage": vp_stage}
    elif vp_stage is None:
        layers = {"hybrid_override_pattern": hybrid_pattern.layers(pattern)}
    else:
        raise UserError(
            f"megatron-core {version()} has no interleaved pipeline for --hybrid-layer-pattern. "
            "Leave out --num-layers-per-virtual-pipeline-stage, or install 0.17 or later.")
    return model(**{stack_name: stack}, **layers, **arguments)


def _first_module(*names: str) -> Any:
    """The first of these that there is: a module has moved."""
    for name in names[:-1]:
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(name)
    return importlib.import_module(names[-1])


@contextlib.contextmanager
def models_can_be_built() -> Iterator[None]:
    """Models of any kind can be built inside, without a word about GPTModel's end.

    Where Transformer Engine is missing, latent attention of 0.16 believes it is there.
    """
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import multi_latent_attention

    believed = multi_latent_attention.HAVE_TE
    multi_latent_attention.HAVE_TE = transformer_engine.HAVE_TE
    try:
        with _without_deprecations():
            yield
    finally:
        multi_latent_attention.HAVE_TE = believed


@contextlib.contextmanager
def _without_deprecations() -> Iterator[None]:
    def is_news(record: logging.LogRecord) -> bool:
        return "deprecated" not in record.getMessage().lower()

    loggers = [logging.getLogger(name) for name in _DEPRECATIONS]
    for logger in loggers:
        logger.addFilter(is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_news)


# --- checkpoints -------------------------------------------------------------------------------


def can_read_common_state(checkpoint: Path) -> bool:
    """Whether this version finds what a ``torch_dist`` checkpoint holds beside its tensors.

    Until 0.18 it is in a file of its own, for which ``load`` takes a strategy. Since 0.19 it is
    one of the sharded objects; the file is still read where there is one.
    """
    from megatron.core import dist_checkpointing

    return ((checkpoint / _COMMON_FILE).is_file()
            or "common_strategy" not in inspect.signature(dist_checkpointing.load).parameters)


def common_state_files(checkpoint: Path) -> Iterator[str]:
    """Names of what load_common_state reads, each before anything of it is read here.

    Since 0.19 the state itself is in a file of tensors, which ``.metadata`` names.
    """
    from torch.distributed.checkpoint import FileSystemReader

    yield from (_COMMON_FILE, _METADATA_FILE)
    if not (checkpoint / _COMMON_FILE).is_file():
        stored = FileSystemReader(checkpoint).read_metadata().storage_data
        yield from {place.relative_path for entry, place in stored.items()
                    if entry.fqn.startswith("common_state/")}


def load_common_state(checkpoint: Path) -> dict[str, Any]:
    """All that is not a tensor of the model or the optimizer; no other rank need call this."""
    from megatron.core import dist_checkpointing

    with _without_deprecations(), _damage_told(checkpoint):
        return dist_checkpointing.load_common_state_dict(str(checkpoint))


def load_sharded(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """What a sharded state dict describes, and the common state; all ranks call this."""
    from megatron.core import dist_checkpointing

    with _without_deprecations(), _damage_told(checkpoint):
        return dist_checkpointing.load(state, str(checkpoint))


@contextlib.contextmanager
def _damage_told(checkpoint: Path) -> Iterator[None]:
    """torch's CheckpointException, which is no Exception and holds those of all ranks, as a
    UserError."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        found = next(iter(error.failures.values()))[0]
        raise UserError(f"{checkpoint} cannot be read ({type(found).__name__}: {found}). It is "
                        "damaged or incomplete: copy it again from where it was made, or load an "
                        "older one.") from error


def load_sharded_objects(checkpoint: Path) -> dict[str, Any]:
    """{name: description} of what is in a checkpoint for parts of the model and is no tensor."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    with _without_deprecations():
        found = load_sharded_metadata(str(checkpoint))
    return {name: entry for name, entry in found.items() if isinstance(entry, ShardedObject)}


# What tells groups of an optimizer's parameters apart, and, since 0.19, their schedule too.
_KIND_OF_GROUP = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
_SCHEDULE_OF_GROUP = ("max_lr", "min_lr", "start_wd", "end_wd")


def take_schedules(groups: list[dict], stored: list[dict]) -> None:
    """An optimizer's groups of parameters take the rates that a checkpoint's were saved with.

    While it loads a checkpoint Megatron gives them these rates anyway; but since 0.19 it looks for
    groups by them, too, and no checkpoint could go on with a rate of another.
    """
    def kind(group: dict) -> list:
        return [group.get(key, group.get(f"pre_{key}")) for key in _KIND_OF_GROUP]

    schedules = [(kind(group), {key: group[key] for key in _SCHEDULE_OF_GROUP if key in group})
                 for group in stored]
    for group in groups:
        for of_kind, schedule in schedules:
            if of_kind == kind(group):
                for key in _SCHEDULE_OF_GROUP:
                    group.pop(key, None)
                group.update(schedule)


@functools.cache
def start_saver() -> None:
    """Before a checkpoint is saved: what Megatron starts for it ends with this process.

    It keeps a server process from its first save on, and forks writers for each. All of them would
    outlive a rank that is killed, and a writer might write into the folder of the next run.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    os.register_at_fork(after_in_child=_end_with_parent)
    if getattr(filesystem_async, "_results_queue", ()) is None:  # as Megatron would make it
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(watch.end_with_parent, (os.getpid(),))
        filesystem_async._results_queue = manager.Queue()


def _end_with_parent() -> None:
    watch.end_with_parent(os.getppid())
