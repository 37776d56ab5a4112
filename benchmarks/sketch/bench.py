"""What a sketching pass costs, against a training pass over the same batch, measured in one run.

    python benchmarks/sketch/bench.py [cost] [attention] [kernels] [quality] [bf16]
    torchrun --nproc-per-node 2 benchmarks/sketch/bench.py ranks

cost: time and peak memory of a sketching pass over those of a training pass (forward and backward,
with weight gradients), for a model of 23 M parameters, and how they change with the sketch's size,
the samples' length and the depth; beside it, passes without weight gradients (bare, and with hooks
that hash nothing), the plain way (a backward pass a sample, and one index_add_), a training pass of
a plain decoder, and a dense Gaussian that is drawn anew for each sample. In processor time.
attention: samples of 2048 tokens, with fused attention and without.
bf16: rows of a model in bfloat16 beside those in float32 (see bf16.py).
kernels: the ways to hash a linear layer's gradients, and the choice among them (see kernels.py).
quality: errors of inner products and norms of true gradients (of other libraries: peers.py).
ranks: samples per second of two data-parallel ranks over one.
Ratios are what to read, not times.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bf16 import print_bf16
from gpu_yardstick import Decoder, Shape
from kernels import print_kernels
from measuring import (
    fastest_in_turns,
    peak_bytes,
    processor_seconds,
    random_documents,
    seconds,
)
from quality import print_quality
from sketch_baselines import plain_sketch, without_weight_gradients

from megatron_direct.cli import main as cli
from megatron_direct.config import Job, ModelConfig, ParallelConfig
from megatron_direct.data.samples import MicroBatchLimits, Samples
from megatron_direct.gradients.hooks import PieceHooks
from megatron_direct.gradients.per_sample import GradientModel, sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import grid, model, passes
from megatron_direct.mcore.shards import num_parameters, parameter_shards
from megatron_direct.mcore.without_gpu import megatron_runtime
from megatron_direct.runtime import host, parallel

# 23.5 M parameters, 19.3 M of them in the layers.
MODEL = ModelConfig(num_layers=6, hidden_size=512, num_attention_heads=8, ffn_hidden_size=1408,
                    vocab_size=8192, seq_length=512)
SIZE, MICRO_BATCH = 2048, 4
LONG = 2048  # tokens
LIMITS = MicroBatchLimits(MICRO_BATCH)
# Forward pass, gradients of activations, gradients of weights: three passes of like cost, of which
# a sketch needs two.
LIMIT = 2 / 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*",
                        default=["cost", "attention", "kernels", "quality", "bf16"],
                        help="cost, attention, kernels, quality, bf16 or ranks")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    cli.quiet_imports()
    with megatron_runtime(), parallel.process_group(), \
            grid.model_parallel(ParallelConfig()), tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts:
            {"cost": print_cost, "ranks": print_ranks,
             "attention": print_attention,
             "kernels": lambda _, rounds: print_kernels(host.device().type, rounds),
             "bf16": lambda folder, _: print_bf16(folder),
             "quality": lambda *_: print_quality()}[part](folder, arguments.rounds)


def print_cost(folder: str, rounds: int) -> None:
    print(f"{'':34}{'training s':>11}{'sketch s':>10}{'ratio':>7}{'memory':>8}")
    cases = [(f"23.5 M parameters, 512 tokens, k {SIZE}", {}, SIZE)]
    cases += [(f"k {size}", {}, size) for size in (512, 8192)]
    cases += [(f"{length} tokens", {"seq_length": length}, SIZE) for length in (128, 1024, LONG)]
    cases += [(f"{depth} layers", {"num_layers": depth}, SIZE) for depth in (3, 12)]
    for name, change, size in cases:
        architecture = dataclasses.replace(MODEL, **change)
        chunks, shards, samples = _model(architecture, folder, MICRO_BATCH)
        sketch = Sketch(shards, size, seed=1)
        calls = {"training": lambda c=chunks, s=samples: _train(c, s),
                 "sketch": lambda c=chunks, h=shards, k=sketch, s=samples: _sketch(c, h, k, s)}
        if not change and size == SIZE:
            calls["passes"] = lambda c=chunks, h=shards, s=samples: _passes_alone(c, h, s)
            calls["bare"] = lambda c=chunks, s=samples: _bare_passes(c, s)
            calls["plain"] = plain_sketch(chunks, samples, samples.usable, size)
            calls["yardstick"] = _yardstick(architecture)
        taken = fastest_in_turns(calls, rounds, processor_seconds)
        memory = {key: peak_bytes(calls[key]) for key in ("training", "sketch")}
        print(f"{name:34}{taken['training']:11.3f}{taken['sketch']:10.3f}"
              f"{taken['sketch'] / taken['training']:7.2f}"
              f"{memory['sketch'] / memory['training']:8.2f}", flush=True)
        if not change and size == SIZE:
            ours = taken["sketch"] / MICRO_BATCH
            hashing = ours - taken["passes"] / MICRO_BATCH
            count = num_parameters(chunks)
            for label, call in (("without weight gradients", "bare"),
                                ("the passes alone", "passes"), ("the plain way", "plain"),
                                ("training, a plain decoder", "yardstick")):
                print(f"{label:34}{'':11}{taken[call]:10.3f}{taken[call] / taken['training']:7.2f}"
                      f"{peak_bytes(calls[call]) / memory['training']:8.2f}", flush=True)
    print(f"the limit where matrix products are all that takes time: {LIMIT:.2f}")
    gaussian = _dense_gaussian_seconds(SIZE, count)
    print(f"a dense Gaussian drawn anew for a sample, gradient not counted: {gaussian:.0f} s, "
          f"{gaussian / ours:.0f} times a sketch, {gaussian / hashing:.0f} times one without "
          "the passes over the model")


def _model(architecture: ModelConfig, folder: str, count: int, spec: str | None = None):
    """(chunks, shards, samples of full length) of one rank."""
    prefix = parallel.on_rank_zero(lambda: random_documents(
        folder, count, architecture.seq_length + 1, architecture.vocab_size))
    chunks = model.build(Job(architecture, ParallelConfig()), spec=spec)
    for parameter in chunks[0].parameters():  # as in training: there is a place for gradients
        parameter.grad = torch.zeros_like(parameter)
    return chunks, parameter_shards(chunks), Samples([prefix], architecture.seq_length)


def _train(chunks, samples: Samples, limits: MicroBatchLimits = LIMITS) -> None:
    for micro_batches in passes.of_samples(chunks, samples, samples.usable, limits):
        passes.run_pass(chunks, micro_batches, backward=True)


def _sketch(chunks, shards, sketch: Sketch, samples: Samples,
            limits: MicroBatchLimits = LIMITS) -> None:
    for _ in sketch_samples(GradientModel(chunks, shards, sketch, micro_batch=limits), samples,
                            samples.usable):
        pass


def _bare_passes(chunks, samples: Samples) -> None:
    """Forward pass and gradients of activations, without any hook."""
    with without_weight_gradients(chunks):
        _train(chunks, samples)


def _passes_alone(chunks, shards, samples: Samples) -> None:
    """What a sketch takes of the model: no weight gradients, and every piece, but no hashing."""
    for micro_batches in passes.of_samples(chunks, samples, samples.usable, LIMITS):
        with PieceHooks(chunks, shards, lambda *_: None) as hooks:
            passes.run_pass(chunks, micro_batches, backward=True, before_forward=hooks.begin)


def _yardstick(architecture: ModelConfig) -> Callable[[], None]:
    """A training pass of a plain decoder of the same shape, in float32, with flash attention."""
    shape = Shape("", architecture.num_layers, architecture.hidden_size,
                  architecture.num_attention_heads, architecture.num_attention_heads,
                  architecture.ffn_hidden_size, architecture.vocab_size, architecture.seq_length,
                  MICRO_BATCH)
    decoder = Decoder(shape, host.device(), torch.float32)
    tokens, labels = torch.randint(0, shape.vocabulary, (2, shape.at_once, shape.tokens))

    def run() -> None:
        decoder.loss(tokens, labels).backward()

    return run


def print_attention(folder: str, rounds: int) -> None:
    """Long samples, one at a time: passes with fused attention, and with that of Megatron's local
    layers, whose scores are as many as tokens squared."""
    print(f"{'':34}{'training s':>11}{'MiB':>7}{'sketch s':>10}{'MiB':>7}")
    lengths, one = (LONG // 2, LONG), MicroBatchLimits(1)
    taken: dict[tuple[str, int], dict[str, float]] = {}
    memory: dict[tuple[str, int], dict[str, int]] = {}
    for length in lengths:
        calls = {}
        for spec in ("local", "fused"):
            architecture = dataclasses.replace(MODEL, seq_length=length)
            chunks, shards, samples = _model(architecture, folder, 1, spec)
            sketch = Sketch(shards, SIZE, seed=1)
            calls[spec, "training"] = lambda c=chunks, s=samples: _train(c, s, one)
            calls[spec, "sketch"] = (
                lambda c=chunks, h=shards, k=sketch, s=samples: _sketch(c, h, k, s, one))
        seconds_of = fastest_in_turns(calls, rounds, processor_seconds)
        sizes = {key: peak_bytes(call) for key, call in calls.items()}
        for spec in ("local", "fused"):
            taken[spec, length] = {what: seconds_of[spec, what] for what in ("training", "sketch")}
            memory[spec, length] = {what: sizes[spec, what] for what in ("training", "sketch")}
            print(f"{f'{length} tokens, spec {spec}':34}" + "".join(
                f"{taken[spec, length][what]:{width}.3f}{memory[spec, length][what] / 2**20:7.0f}"
                for what, width in (("training", 11), ("sketch", 10))), flush=True)
    short, long = lengths
    print(f"{LONG} tokens, local / fused: training "
          f"{taken['local', long]['training'] / taken['fused', long]['training']:.2f}, sketch "
          f"{taken['local', long]['sketch'] / taken['fused', long]['sketch']:.2f} (bar 1.5); "
          f"memory of a sketch, {long} / {short} tokens: "
          f"{memory['fused', long]['sketch'] / memory['fused', short]['sketch']:.2f} "
          f"(linear: at most 2)")


def _dense_gaussian_seconds(size: int, num_parameters: int, slice_size: int = 50_000) -> float:
    """Of one sample, from a slice of the parameters: the work is proportional to their number."""
    gradient = torch.randn(slice_size)
    begun = time.perf_counter()
    sketch = torch.zeros(size)
    for row in range(size):
        sketch[row] = torch.randn(slice_size) @ gradient
    return (time.perf_counter() - begun) * num_parameters / slice_size


def print_ranks(folder: str, rounds: int) -> None:
    """Every rank a copy: its share alone, while the others wait, and all at once."""
    chunks, shards, samples = _model(MODEL, folder, 2 * MICRO_BATCH * parallel.world_size())
    sketch = Sketch(shards, SIZE, seed=1)

    def share(of_ranks) -> None:
        if grid.data_rank() in of_ranks:
            _sketch(chunks, shards, sketch, samples)

    size = parallel.world_size()
    alone, together = [], []
    for _ in range(rounds):
        alone.append(seconds(lambda: share([0])))
        together.append(seconds(lambda: share(range(size))))
    parallel.say(f"{size} data-parallel ranks: {size * min(alone) / min(together):.2f} times the "
                 f"samples/s of one ({len(samples) / min(together):.1f} a second)")


if __name__ == "__main__":
    main()
