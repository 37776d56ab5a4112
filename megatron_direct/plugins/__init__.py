"""Masked blends inside other training loops: Megatron-LM's and NeMo's."""
