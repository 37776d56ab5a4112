"""Megatron-LM's pretrain_gpt.py over masked datasets: every flag of it, and the plugin's own.

    PYTHONPATH=/path/to/Megatron-LM torchrun --nproc-per-node 8 launch/pretrain_gpt_direct.py \\
        <flags of pretrain_gpt.py> --sample-masks runs/mine/selections/direct/masks

Masks come from ``megatron-direct select``: a folder of them with ``--sample-masks DIR``, or one by
one with ``--sample-mask PREFIX FILE``. docs/blends.md explains how to change a blend in mid-run.
"""

from megatron_direct.plugins import megatron_lm

if __name__ == "__main__":
    megatron_lm.run_script("pretrain_gpt")
