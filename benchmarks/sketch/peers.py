"""Rows of bergson and of dattri (LoGra) beside ours: what they cost, and how much they err.

    make bench-peers

Ours goes through Megatron's model, theirs through the same architecture of transformers; all are
trained for some steps on the same text, and take the same samples. Time is over each model's own
training pass (forward and backward, with weight gradients), one after the other in turns. Error is
the root mean square of <a, b> / (|g| |h|) less the true cosine, over pairs of samples, times the
square root of the numbers stored for a sample: what as many numbers buy. The gradients g and h are
those that a library covers: theirs of the linear layers of the blocks, ours of all parameters. A
row's overall scale is the one that makes the mean squared norm right.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from bench import MICRO_BATCH, MODEL, SIZE, fastest_in_turns
from quality import bytes_of_python, norms_and_cosines, one_gradient, sketched_rows, train

from megatron_direct.cli import main as cli
from megatron_direct.config import Job, ParallelConfig
from megatron_direct.data.samples import MicroBatchLimits, Samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import grid, model, passes
from megatron_direct.mcore.shards import parameter_shards
from megatron_direct.mcore.without_gpu import megatron_runtime
from megatron_direct.runtime import parallel

SAMPLES, STEPS = 16, 30
SIDE = 16  # of a layer's gradient, bergson's and LoGra's usual one: 16 x 16 numbers are kept


@dataclass(frozen=True)
class Library:
    """training, rows: of tokens [n, length + 1], micro-batch by micro-batch; rows gives [n,
    numbers]; gradient: of one sample, of the parameters that the rows cover."""

    name: str
    training: Callable[[np.ndarray], object]
    rows: Callable[[np.ndarray], np.ndarray]
    gradient: Callable[[np.ndarray], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    os.environ["TQDM_DISABLE"] = "1"
    cli.quiet_imports()
    print(f"{'':20}{'training s':>11}{'rows s':>9}{'ratio':>7}{'numbers':>9}"
          f"{'error x sqrt(numbers)':>23}")
    with parallel.process_group(), tempfile.TemporaryDirectory() as folder:
        samples = Samples([bytes_of_python(folder, SAMPLES + STEPS * MICRO_BATCH,
                                           MODEL.seq_length)], MODEL.seq_length)
        text = np.stack([samples.tokens(number) for number in samples.usable])
        with megatron_runtime(), grid.model_parallel(ParallelConfig()):
            _report(ours(samples, text), text[:SAMPLES], rounds)
        _report(bergson(text, Path(folder)), text[:SAMPLES], rounds)
        _report(dattri(text, Path(folder)), text[:SAMPLES], rounds)


def _report(library: Library, text: np.ndarray, rounds: int) -> None:
    batch = text[:MICRO_BATCH]
    taken = fastest_in_turns({"training": lambda: library.training(batch),
                              "rows": lambda: library.rows(batch)}, rounds)
    rows = library.rows(text).astype(np.float64)
    gradients = torch.stack([library.gradient(text[[i]]) for i in range(len(text))])
    norms, cosines = norms_and_cosines(gradients)
    products = rows @ rows.T
    products *= np.sum(norms**2) / np.trace(products)
    errors = (products / np.outer(norms, norms) - cosines)[np.triu_indices(len(text), 1)]
    numbers = rows.shape[1]
    print(f"{library.name:20}{taken['training']:11.3f}{taken['rows']:9.3f}"
          f"{taken['rows'] / taken['training']:7.2f}{numbers:9}"
          f"{np.sqrt(np.mean(errors**2) * numbers):23.2f}", flush=True)


def ours(samples: Samples, text: np.ndarray) -> Library:
    chunks = model.build(Job(MODEL, ParallelConfig()))
    train(chunks, samples, samples.usable[SAMPLES:])
    for parameter in chunks[0].parameters():  # as in training: there is a place for gradients
        parameter.grad = torch.zeros_like(parameter)
    sketch, limits = Sketch(parameter_shards(chunks), SIZE, seed=1), MicroBatchLimits(MICRO_BATCH)

    def gradient(sample: np.ndarray) -> torch.Tensor:
        chunks[0].zero_grad()
        return one_gradient(chunks, samples, numbers(sample))

    def numbers(batch: np.ndarray) -> np.ndarray:
        """The samples' own: the text is in their order."""
        return samples.usable[[int((text == row).all(1).argmax()) for row in batch]]

    def training(batch: np.ndarray) -> None:
        for micro_batches in passes.of_samples(chunks, samples, numbers(batch), limits):
            passes.run_pass(chunks, micro_batches, backward=True)

    def rows(batch: np.ndarray) -> np.ndarray:
        return sketched_rows(chunks, samples, numbers(batch), sketch, MICRO_BATCH)

    return Library("ours", training, rows, gradient)


class TheirModel:
    """The same architecture, of transformers."""

    def __init__(self, text: np.ndarray):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(
            hidden_size=MODEL.hidden_size, num_hidden_layers=MODEL.num_layers,
            num_attention_heads=MODEL.num_attention_heads, vocab_size=MODEL.vocab_size,
            intermediate_size=MODEL.ffn_hidden_size, max_position_embeddings=MODEL.seq_length + 1,
            tie_word_embeddings=not MODEL.untie_embeddings_and_output_weights,
            attn_implementation="sdpa"))
        self.linears = [name for name, module in self.model.named_modules()
                        if isinstance(module, torch.nn.Linear) and name != "lm_head"]
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        for batch in _micro_batches(text[SAMPLES:]):
            (self.loss(batch) / batch[:, 1:].size).backward()
            optimizer.step()
            optimizer.zero_grad()

    def loss(self, batch: np.ndarray) -> torch.Tensor:
        """Summed over tokens and samples."""
        tokens = torch.from_numpy(batch.astype(np.int64))
        logits = self.model(tokens[:, :-1]).logits.float()
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")

    def training(self, text: np.ndarray) -> None:
        self.model.requires_grad_(True)
        for batch in _micro_batches(text):
            self.loss(batch).backward()

    def gradient(self, sample: np.ndarray) -> torch.Tensor:
        self.model.zero_grad()
        self.training(sample)
        modules = dict(self.model.named_modules())
        found = torch.cat([modules[name].weight.grad.flatten() for name in self.linears])
        self.model.zero_grad()
        return found


def _micro_batches(text: np.ndarray) -> Sequence[np.ndarray]:
    return [text[first: first + MICRO_BATCH] for first in range(0, len(text), MICRO_BATCH)]


def bergson(text: np.ndarray, folder: Path) -> Library:
    from bergson.collector.collector import CollectorComputer
    from bergson.collector.in_memory_collector import InMemoryCollector
    from bergson.config import IndexConfig
    from bergson.gradients import GradientProcessor
    from datasets import Dataset

    theirs = TheirModel(text)
    config = IndexConfig(run_path=str(folder / "bergson"), projection_dim=SIDE)
    config.partial_run_path.mkdir(parents=True)

    def rows(batch: np.ndarray) -> np.ndarray:
        # As its own set-up does: no weight gradients.
        theirs.model.requires_grad_(False)
        theirs.model.get_input_embeddings().requires_grad_(True)
        data = Dataset.from_dict({"input_ids": batch.tolist()})
        collector = InMemoryCollector(
            model=theirs.model.base_model, data=data, cfg=config,
            processor=GradientProcessor(projection_dim=SIDE))
        batches = [numbers.tolist() for numbers in _micro_batches(np.arange(len(batch)))]
        CollectorComputer(theirs.model, data, collector=collector, cfg=config,
                          batches=batches).run_with_collector_hooks()
        return collector.builder.grad_buffer.copy()

    return Library("bergson", theirs.training, rows, theirs.gradient)


def dattri(text: np.ndarray, folder: Path) -> Library:
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask

    theirs = TheirModel(text)
    task = AttributionTask(lambda _model, batch, _device: theirs.loss(batch["input_ids"].numpy()),
                           theirs.model, theirs.model.state_dict())

    attributor = LoGraAttributor(task, theirs.linears, hessian="Identity", proj_dim=SIDE**2,
                                 offload="none", cache_dir=str(folder))
    kept = attributor.offload_manager.cached_gradients

    def rows(batch: np.ndarray) -> np.ndarray:
        theirs.model.requires_grad_(True)
        kept.clear()
        attributor.cache(torch.utils.data.DataLoader(
            [{"input_ids": row} for row in batch.astype(np.int64)], batch_size=MICRO_BATCH))
        return torch.cat([kept[number] for number in sorted(kept)]).numpy()

    return Library("dattri (LoGra)", theirs.training, rows, theirs.gradient)


if __name__ == "__main__":
    main()
