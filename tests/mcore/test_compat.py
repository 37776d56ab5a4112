"""What the package relies on in Megatron, name by name, and what compat makes of differences.

A release that moves or changes one of these names fails here, with the name, before it shows as a
wrong number somewhere else.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import logging
from pathlib import Path

import pytest

import megatron_direct
from megatron_direct.mcore import compat, dual_functions

# Module below megatron.core, name in it, and the arguments that are given to it or overridden in
# it: by name, or in this order where they are given by place. (): only that it is there.
RELIED_ON = [
    # Private names, and functions that we replace or override.
    ("datasets.gpt_dataset", "GPTDataset._build_document_sample_shuffle_indices", ("self",)),
    ("models.common.embeddings.rope_utils", "_apply_rotary_pos_emb_bshd", ("t", "freqs")),
    ("optimizer.distrib_optimizer",
     "DistributedOptimizer.load_parameter_state_from_fully_reshardable", ("self", "state_dict")),
    ("optimizer.distrib_optimizer", "DistributedOptimizer.sharded_state_dict",
     ("self", "model_sharded_state_dict", "is_loading", "metadata")),
    ("parallel_state", "_global_process_group_list", ()),
    ("tensor_parallel.cross_entropy", "_VocabParallelCrossEntropy.forward",
     ("ctx", *dual_functions._CROSS_ENTROPY)),
    ("tensor_parallel.layers", "LinearWithGradAccumulationAndAsyncCommunication.forward",
     ("ctx", *dual_functions._LINEAR)),
    *(("tensor_parallel.mappings", f"{name}.forward", ("ctx", "input_", "group")) for name in (
        "_CopyToModelParallelRegion", "_ReduceFromModelParallelRegion",
        "_ScatterToSequenceParallelRegion", "_GatherFromModelParallelRegion",
        "_GatherFromSequenceParallelRegion", "_ReduceScatterToSequenceParallelRegion")),
    ("tensor_parallel.random", "_get_cuda_rng_state", ()),
    ("tensor_parallel.random", "_set_cuda_rng_state", ("new_state",)),
    ("transformer.dot_product_attention", "DotProductAttention.forward",
     ("self", *dual_functions._ATTENTION)),
    ("transformer.moe.router", "TopKRouter.gating", ("self", "input")),
    ("transformer.moe.router", "TopKRouter.routing", ("self", "logits", "padding_mask")),
    ("transformer.moe.token_dispatcher", "MoEAllGatherTokenDispatcher.dispatch_preprocess",
     ("self", "hidden_states", "routing_map", "probs")),
    ("transformer.moe.token_dispatcher", "MoEAllGatherTokenDispatcher.token_dispatch",
     ("self", "hidden_states", "probs")),
    ("transformer.moe.token_dispatcher", "MoEAllGatherTokenDispatcher.dispatch_postprocess",
     ("self", "hidden_states", "probs")),
    ("transformer.multi_latent_attention", "HAVE_TE", ()),
    ("utils", "MakeViewlessTensor", ()),
    # Public names whose arguments have moved before.
    ("dist_checkpointing", "load", ("sharded_state_dict", "checkpoint_dir")),
    ("dist_checkpointing", "save", ("sharded_state_dict", "checkpoint_dir")),
    ("dist_checkpointing", "load_common_state_dict", ("checkpoint_dir",)),
    ("models.gpt.gpt_layer_specs", "get_gpt_decoder_block_spec",
     ("config", "use_transformer_engine", "normalization", "vp_stage")),
    ("parallel_state", "get_data_parallel_group", ("with_context_parallel",)),
    ("parallel_state", "get_expert_tensor_model_pipeline_parallel_group", ()),
    ("ssm.mamba_layer", "MambaLayer.__init__",
     ("self", "config", "submodules", "layer_number", "pg_collection")),
    ("transformer.mlp", "MLP", ()),
    ("transformer.multi_latent_attention", "MLASelfAttention", ()),
]


def _found(module: str, name: str):
    return functools.reduce(getattr, name.split("."),
                            importlib.import_module(f"megatron.core.{module}"))


@pytest.mark.parametrize(("module", "name", "arguments"), RELIED_ON,
                         ids=[f"{module}.{name}" for module, name, _ in RELIED_ON])
def test_megatron_has_what_we_rely_on(module, name, arguments):
    found = _found(module, name)
    if arguments:
        parameters = list(inspect.signature(found).parameters)
        assert [p for p in parameters if p in arguments] == list(arguments), (
            f"megatron.core.{module}.{name}({', '.join(parameters)})")


def test_a_name_that_has_gone_or_changed_would_fail():
    with pytest.raises(AttributeError):
        test_megatron_has_what_we_rely_on("utils", "NotThere", ())
    with pytest.raises(AssertionError, match=r"megatron.core.dist_checkpointing.load\(sharded"):
        test_megatron_has_what_we_rely_on("dist_checkpointing", "load", ("not_there",))


def test_no_attribute_of_a_dataset_that_masks_need_has_gone():
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    assert "defer_npy_index_mmap" in {f.name for f in dataclasses.fields(GPTDatasetConfig)}
    source = "".join(inspect.getsource(c) for c in GPTDataset.__mro__[:-1]
                     if c.__module__.startswith("megatron."))
    for name in ("indices", "index_split", "dataset_path", "unique_identifiers",
                 "unique_description", "unique_description_hash"):
        assert f"self.{name}" in source, name


def _imported() -> set[tuple[str, str]]:
    """(module, name) of everything that the package imports from megatron.core."""
    found = set()
    for path in Path(megatron_direct.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.core"):
                found |= {(node.module, alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize(("module", "name"), sorted(_imported()), ids=".".join)
def test_what_is_imported_from_megatron_is_there(module, name):
    if not hasattr(importlib.import_module(module), name):
        importlib.import_module(f"{module}.{name}")


# --- compat -----------------------------------------------------------------------------------


def _experts_as_spec(submodules):
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.spec_utils import ModuleSpec

    return ModuleSpec(module=MoELayer, submodules=submodules)


def _experts_as_partial(submodules):
    from megatron.core.transformer.moe.moe_layer import MoELayer

    return functools.partial(MoELayer, submodules=submodules)


@dataclasses.dataclass(frozen=True)
class _Submodules:
    router: str = "router"
    experts: str = "experts"


@pytest.mark.parametrize("made", [_experts_as_spec, _experts_as_partial])
def test_layers_are_changed_as_specs_and_as_partials(made):
    """As up to 0.17, and as from 0.18 on: whichever megatron-core is installed."""
    builder = made(_Submodules())
    assert compat.is_mixture_of_experts(builder)
    changed = compat.with_submodules(builder, router="another")
    assert compat.is_mixture_of_experts(changed)
    given = (changed.keywords["submodules"] if made is _experts_as_partial
             else changed.submodules)
    assert given == _Submodules(router="another")
    kept = builder.keywords["submodules"] if made is _experts_as_partial else builder.submodules
    assert kept == _Submodules()


def test_a_dense_layer_is_no_mixture_of_experts():
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    assert not compat.is_mixture_of_experts(ModuleSpec(module=MLP))
    assert not compat.is_mixture_of_experts(functools.partial(MLP, submodules=None))


def test_only_deprecations_are_silent_and_only_inside(caplog):
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    caplog.set_level(logging.WARNING, logger=logger.name)
    with compat.models_can_be_built():
        logger.warning("GPTModel IS DEPRECATED.")
        logger.warning("something else")
    logger.warning("and deprecated outside")
    assert [r.getMessage() for r in caplog.records] == ["something else", "and deprecated outside"]


def test_a_hybrid_model_is_found_under_its_name_of_this_version():
    stack, kinds_of_layers = compat.hybrid_stack()
    parameters = inspect.signature(stack.__init__).parameters
    assert {"post_layer_norm", "post_process"} <= parameters.keys()
    assert {"attention_layer", "mlp_layer", "moe_layer", "mamba_layer"} <= {
        field.name for field in dataclasses.fields(kinds_of_layers)}


def test_what_building_changes_is_put_back():
    from megatron.core.extensions import transformer_engine
    from megatron.core.transformer import multi_latent_attention

    before = multi_latent_attention.HAVE_TE
    with pytest.raises(RuntimeError, match="inside"), compat.models_can_be_built():
        assert multi_latent_attention.HAVE_TE is transformer_engine.HAVE_TE
        raise RuntimeError("inside")
    assert multi_latent_attention.HAVE_TE is before


def test_groups_of_parameters_take_the_schedule_of_those_of_their_kind():
    """Whose rates a checkpoint has, and Megatron finds them by since 0.19."""
    def group(wd_mult, **schedule):
        return {"params": [wd_mult], "wd_mult": wd_mult, "lr_mult": 1.0, **schedule}

    groups = [group(0.0, max_lr=1.0, min_lr=0.1), group(1.0, max_lr=1.0, min_lr=0.1)]
    compat.take_schedules(groups, [
        group(1.0, max_lr=2.0, min_lr=0.0, start_wd=0.5, is_expert_parallel=None),
        {"pre_wd_mult": 0.0, "pre_lr_mult": 1.0, "min_lr": 0.3, "lr": 9.0}])
    assert groups == [group(0.0, min_lr=0.3), group(1.0, max_lr=2.0, min_lr=0.0, start_wd=0.5)]
