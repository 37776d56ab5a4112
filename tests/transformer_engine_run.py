"""What layers of Transformer Engine compute, against local ones, on two ranks of a stand-in.

Run by torchrun with a folder; rank r writes rank-r.json: {case: {what: largest difference}}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import transformer_engine_on_cpu

transformer_engine_on_cpu.install()

import torch  # noqa: E402
from indexed_files import random_documents, write_dataset  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec  # noqa: E402
from ranks import Layout  # noqa: E402
from spec_parity import build_filled, errors  # noqa: E402
from tiny_models import MODELS, VOCAB_SIZE  # noqa: E402

from megatron_direct.mcore import checkpoint, compat, grid, training_folder  # noqa: E402
from megatron_direct.mcore.shards import parameter_shards  # noqa: E402
from megatron_direct.mcore.specs import SPECS, LayerSpec, transformer_engine  # noqa: E402
from megatron_direct.mcore.without_gpu import megatron_runtime  # noqa: E402
from megatron_direct.runtime import parallel  # noqa: E402

OURS = ("local", "transformer_engine")
# As Megatron builds it, with the norms in linear layers: what others may have built.
MEGATRONS = ("local", "megatrons")
SPECS["megatrons"] = LayerSpec(
    lambda config, vp_stage: get_gpt_decoder_block_spec(
        config, use_transformer_engine=True, vp_stage=vp_stage),
    SPECS["local"].stack, compat.models_can_be_built, transformer_engine.finish)
CASES = [*((name, Layout(dp=2), OURS) for name in ("gpt2-tied", "qwen3")),
         ("llama-untied", Layout(tp=2), OURS), ("gpt2-untied", Layout(tp=2, sp=True), OURS),
         ("qwen3", Layout(tp=2, sp=True), OURS), ("llama-tied", Layout(pp=2), OURS),
         ("qwen2-moe", Layout(dp=2), OURS), ("mixtral", Layout(dp=2, ep=2), OURS),
         ("qwen2-moe", Layout(tp=2, sp=True), OURS), ("gpt2-tied", Layout(tp=2), MEGATRONS),
         ("qwen3", Layout(tp=2, sp=True), MEGATRONS)]


def _layers(model, layout, spec) -> dict[str, int]:
    """How many of Transformer Engine's there are on this rank, and of Megatron's own."""
    import transformer_engine.pytorch as te
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    modules = [module for chunk in build_filled(model, layout, spec) for module in chunk.modules()]
    return {"of Transformer Engine": sum(isinstance(
                module, (te.Linear, te.GroupedLinear, te.RMSNorm, te.LayerNorm,
                         te.DotProductAttention)) for module in modules),
            "of Megatron": sum(isinstance(module, (ColumnParallelLinear, RowParallelLinear,
                                                   torch.nn.RMSNorm, torch.nn.LayerNorm))
                               for module in modules)}


def _in_checkpoints(model, layout, folder: Path) -> dict[str, float]:
    """Weights that a model of either spec saved, less those that one of the other loads."""
    found = {}
    for saved, loaded in (OURS, OURS[::-1]):
        written, read = (build_filled(model, layout, spec) for spec in (saved, loaded))
        for shard in parameter_shards(read):
            torch.nn.init.zeros_(shard.parameter)
        checkpoint.save(folder / saved, 1, written, None, None, {})
        path = training_folder.latest(folder / saved)
        assert path is not None
        checkpoint.load_model(path, read)
        expected = {shard.name: shard.parameter for shard in parameter_shards(written)}
        found[f"{saved} into {loaded}"] = max(
            float((shard.parameter - expected[shard.name]).abs().max())
            for shard in parameter_shards(read))
    return found


def main(folder: Path) -> None:
    found = {}
    with megatron_runtime(), parallel.process_group():
        torch.set_num_threads(1)
        parallel.on_rank_zero(lambda: write_dataset(
            folder / "pool", random_documents(20, VOCAB_SIZE, seed=1, longest=14)))
        for name, layout, specs in CASES:
            with grid.model_parallel(layout.config()):
                found[f"{name} {layout} {specs[1]}"] = errors(
                    MODELS[name], layout.config(), str(folder / "pool"), specs)
                found[f"{name} {layout} {specs[1]}"] |= _layers(
                    MODELS[name], layout.config(), specs[1])
        for name, layout in (("qwen3", Layout(tp=2)), ("mixtral", Layout(dp=2, ep=2))):
            with grid.model_parallel(layout.config()):
                found[f"{name} {layout} in checkpoints"] = _in_checkpoints(
                    MODELS[name], layout.config(), folder / f"{name}-{layout}")
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
