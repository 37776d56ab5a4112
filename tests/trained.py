"""What the checkpoints of the tests are trained as, and on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from indexed_files import random_documents
from ranks import Layout

from megatron_direct.commands.pretrain import PretrainConfig, PretrainRequest, pretrain
from megatron_direct.config import BatchConfig, ModelConfig, OptimizerConfig


@dataclass(frozen=True)
class Trained:
    """A model, how it is trained, and the datasets of its folder that it is trained on."""

    model: ModelConfig
    optimizer: OptimizerConfig
    batch: BatchConfig
    iterations: int
    pools: tuple[str, ...]


_SIZES = {"num_layers": 2, "num_attention_heads": 4, "num_query_groups": 2,
          "make_vocab_size_divisible_by": 32}
SMALL = Trained(ModelConfig(hidden_size=16, ffn_hidden_size=24, seq_length=12, vocab_size=60,
                            **_SIZES),
                OptimizerConfig(lr_warmup_iters=2), BatchConfig(2, 4), 6, ("pool",))
LEARNT = Trained(ModelConfig(hidden_size=32, ffn_hidden_size=48, seq_length=16, vocab_size=90,
                             **_SIZES),
                 OptimizerConfig(lr=5e-3, lr_warmup_iters=4), BatchConfig(2, 8), 12, ("a", "b"))


def documents(seed: int, count: int) -> list:
    """Two kinds of text: runs that count up, which can be learnt, and noise."""
    found = random_documents(count, 90, seed=seed, longest=30)
    for number in range(0, count, 2):
        start, length = number % 50, 4 + number % 20
        found[number] = [list(range(start, start + length))]
    return found


def train(folder: Path, layout: Layout, trained: Trained, name: str) -> None:
    """Pre-trains on the folder's pools; all ranks call this."""
    pretrain(PretrainRequest(
        PretrainConfig(data_path=tuple(str(folder / pool) for pool in trained.pools),
                       save=str(folder / name), train_iters=trained.iterations,
                       save_interval=trained.iterations),
        trained.model, layout.config(), trained.optimizer, trained.batch))
