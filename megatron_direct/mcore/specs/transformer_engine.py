"""Transformer Engine's layers, where it is installed: their kinds."""

from __future__ import annotations

from megatron_direct.mcore.specs.kinds import KindsOfClasses, LayerKind


def kinds_of_classes() -> KindsOfClasses:
    """Nothing where Transformer Engine is not installed."""
    from megatron.core.extensions import transformer_engine as megatron_te

    if not megatron_te.HAVE_TE:
        return ()
    import transformer_engine.pytorch as te

    return (
        (megatron_te.TELayerNormColumnParallelLinear, LayerKind.NORM_AND_COLUMN_PARALLEL),
        (megatron_te.TERowParallelLinear, LayerKind.ROW_PARALLEL),
        # TEColumnParallelLinear, and linear layers that are not divided.
        (megatron_te.TELinear, LayerKind.COLUMN_PARALLEL),
        (te.LayerNorm, LayerKind.LAYER_NORM),
        (te.RMSNorm, LayerKind.RMS_NORM),
    )
