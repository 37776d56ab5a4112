"""Megatron-LM's pretrain_hybrid.py over masked datasets: every flag of it, and the plugin's own.

    PYTHONPATH=/path/to/Megatron-LM torchrun --nproc-per-node 8 launch/pretrain_hybrid_direct.py \\
        <flags of pretrain_hybrid.py> --sample-masks runs/mine/selections/direct/masks

For Megatron-LM 0.18 and later, where HybridModel takes the place of GPTModel: Mamba layers,
attention, MLP and experts. The masks are those of launch/pretrain_gpt_direct.py.
"""

from megatron_direct.plugins import megatron_lm

if __name__ == "__main__":
    megatron_lm.run_script("pretrain_hybrid")
