"""What a sketch costs on one GPU, beside the training pass that a team pays for.

    python benchmarks/gpu.py                          # an H100: under 150 s
    python benchmarks/gpu.py --tiny                   # a CPU, a test of the benchmark itself

The yardstick is a plain decoder of the same shape (``gpu_yardstick``) in bfloat16 with flash
attention, forward and backward with weight gradients, eager and compiled. Ours are Megatron's
layers in bfloat16 with the layer spec "fused". A shape's parts are measured one after another, each
with nothing else on the GPU; one that fails is reported, and the others go on. Times are medians of
CUDA events after warm-up, per micro-batch; memory is the most that was allocated, weights included.
The plain way is a backward pass for each sample, and one ``index_add_``.
The sketch is timed again without each of the package's kernels (``gpu_parts``); beside the results
stands, for each shape, a list of the kernels that take most of its time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import gpu_parts
import gpu_results
from gpu_yardstick import Decoder, Shape
from sketch_baselines import plain_sketch, without_weight_gradients

from megatron_direct.cli import main as cli
from megatron_direct.config import Job, ModelConfig, ParallelConfig, Precision
from megatron_direct.data.samples import MicroBatch, MicroBatchLimits, SampleSource
from megatron_direct.gradients.hooks import PieceHooks
from megatron_direct.gradients.per_sample import GradientModel, sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import grid, model, passes
from megatron_direct.mcore.shards import parameter_shards
from megatron_direct.mcore.without_gpu import megatron_runtime
from megatron_direct.runtime import files, host, parallel

SECONDS = 150  # of all parts together
SKETCH_SIZE = 2048
GPT2_MEDIUM = Shape("GPT-2 Medium", 24, 1024, 16, 16, 2752, 50304, tokens=1024, at_once=16)
# In which the host starts as many kernels for twice the work.
TWICE_AT_ONCE = dataclasses.replace(GPT2_MEDIUM, name="GPT-2 Medium, twice as many", at_once=32)
# As many layers as fit, and a vocabulary that leaves the layers to be what is measured.
LLAMA_8B = Shape("layers of Llama 3 8B", 32, 4096, 32, 8, 14336, 8192, tokens=4096, at_once=2)
TINY = Shape("tiny", 2, 64, 4, 2, 96, 128, tokens=32, at_once=2)
# Weights and gradients of a layer, and what it keeps for the backward pass, in multiples of its
# widths: of Megatron's unfused layers, with room to spare.
_KEPT_WIDTHS, _KEPT_FFN_WIDTHS, _SHARE_OF_MEMORY = 24, 6, 0.7


@dataclass(frozen=True)
class Timing:
    """milliseconds, gigabytes: None where a part failed, and ``error`` says why."""

    part: str
    milliseconds: float | None = None
    gigabytes: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Runs:
    """How often each part runs, after how many that do not count."""

    warm_up: int = 2
    repeats: int = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a shape for a CPU, in seconds")
    parser.add_argument("--output", default="build/gpu.json", help="JSON file for the results")
    parser.add_argument("--results", type=Path,
                        help="Markdown file in which the device's block is replaced, or added")
    parser.add_argument("--seconds", type=float, default=SECONDS,
                        help="time after which no further part begins")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU. Add --tiny to try the benchmark itself on a CPU.")
    cli.quiet_imports()
    ends = time.monotonic() + arguments.seconds
    shapes = [TINY] if arguments.tiny else [
        GPT2_MEDIUM, _as_deep_as_fits(LLAMA_8B), TWICE_AT_ONCE]
    runs = Runs(1, 2) if arguments.tiny else Runs()
    results, environment = {}, gpu_results.environment()
    for shape in shapes:
        profile = Path(arguments.output).with_suffix(f".{len(results)}.txt")
        timings = [*_yardstick(shape, runs, ends), *_ours(shape, runs, ends, profile)]
        results[shape.name] = {"shape": dataclasses.asdict(shape),
                               "parts": [dataclasses.asdict(timing) for timing in timings]}
        _print(shape, timings)
        files.write_json(arguments.output, {"environment": environment, "shapes": results})
    everything = {"environment": environment, "shapes": results,
                  "count sketches": _count_sketches(ends)}
    files.write_json(arguments.output, everything)
    if arguments.results is not None:
        gpu_results.put_into(arguments.results, gpu_results.block(
            everything, datetime.date.today().isoformat()))
    print(f"results: {arguments.output} {arguments.results or ''}", flush=True)
    if not arguments.tiny:
        _time_kernels(ends)


def _as_deep_as_fits(shape: Shape) -> Shape:
    """The shape with no more layers than the GPU's memory holds."""
    weights = shape.width * (2 * shape.width * (1 + shape.groups / shape.heads) + 3 * shape.ffn)
    kept = shape.at_once * shape.tokens * (
        _KEPT_WIDTHS * shape.width + _KEPT_FFN_WIDTHS * shape.ffn)
    of_layer = 2 * (2 * weights + kept)  # bytes: weights, their gradients, activations
    free = _SHARE_OF_MEMORY * torch.cuda.mem_get_info()[0]
    return dataclasses.replace(shape, layers=max(1, min(shape.layers, int(free / of_layer))))


def _yardstick(shape: Shape, runs: Runs, ends: float) -> Iterator[Timing]:
    device = host.device()
    tokens, labels = torch.randint(
        0, shape.vocabulary, (2, shape.at_once, shape.tokens), device=device)

    def training_pass(compiled: bool) -> Callable[[], None]:
        decoder = Decoder(shape, device, torch.bfloat16)
        if compiled:  # without a GPU the compiler itself is not what is tested
            decoder.compile("inductor" if device.type == "cuda" else "aot_eager")

        def run() -> None:
            decoder.zero_grad(set_to_none=True)
            decoder.loss(tokens, labels).backward()

        return run

    yield _timed("yardstick, eager", lambda: training_pass(False), runs, ends)
    yield _timed("yardstick, compiled", lambda: training_pass(True), runs, ends)


class _RandomSamples(SampleSource):
    """Samples of full length, with random tokens."""

    def __init__(self, shape: Shape, count: int):
        self.num_labels = np.full(count, shape.tokens)
        self._tokens = np.random.default_rng(0).integers(
            0, shape.vocabulary, (count, shape.tokens + 1))

    def tokens(self, sample: int) -> np.ndarray:
        return self._tokens[sample]


def _ours(shape: Shape, runs: Runs, ends: float, profile: Path) -> list[Timing]:
    architecture = ModelConfig(
        num_layers=shape.layers, hidden_size=shape.width, num_attention_heads=shape.heads,
        num_query_groups=shape.groups, ffn_hidden_size=shape.ffn, vocab_size=shape.vocabulary,
        seq_length=shape.tokens)
    layout = ParallelConfig()
    with megatron_runtime(), parallel.process_group(), grid.model_parallel(layout):
        try:
            chunks = model.build(Job(architecture, layout, precision=Precision(bf16=True)))
            return list(_parts(chunks, shape, runs, ends, profile))
        except Exception as error:
            return [Timing("ours", error=_in_words(error))]


def _parts(chunks: list[torch.nn.Module], shape: Shape, runs: Runs, ends: float, profile: Path,
           ) -> Iterator[Timing]:
    passes_at_once = 3  # as in a run, in which one pass is queued while another's rows are copied
    source = _RandomSamples(shape, passes_at_once * shape.at_once)
    numbers = np.arange(len(source.num_labels))
    micro_batches = next(passes.of_samples(chunks, source, numbers[: shape.at_once],
                                           MicroBatchLimits(shape.at_once)))
    shards = parameter_shards(chunks)

    def training_pass() -> None:
        for parameter in chunks[0].parameters():
            parameter.grad = None
        passes.run_pass(chunks, micro_batches, backward=True)

    def pieces_alone() -> None:
        with PieceHooks(chunks, shards, lambda *_: None) as hooks:
            passes.run_pass(chunks, micro_batches, backward=True, before_forward=hooks.begin)

    def sketches() -> Callable[[], None]:
        gradients = GradientModel(chunks, shards, Sketch(shards, SKETCH_SIZE, seed=1),
                                  micro_batch=MicroBatchLimits(shape.at_once))

        def sketch() -> None:
            for _ in sketch_samples(gradients, source, numbers):
                pass

        return sketch

    yield _timed("training pass", lambda: training_pass, runs, ends)
    for parameter in chunks[0].parameters():
        parameter.grad = None
    with without_weight_gradients(chunks):
        yield _timed("pass without weight gradients",
                     lambda: lambda: _pass(chunks, micro_batches), runs, ends)
    yield _timed("pass with hooks, nothing hashed", lambda: pieces_alone, runs, ends)
    fewer = Runs(1, max(2, runs.repeats // 2))
    yield _timed("sketch", sketches, fewer, ends, passes_at_once)
    with _in_any_order():
        yield _timed("sketch, sums in any order", sketches, fewer, ends, passes_at_once)
        yield _timed("the plain way: a pass a sample", lambda: plain_sketch(
            chunks, source, numbers[: shape.at_once], SKETCH_SIZE), Runs(1, 2), ends)
    for parameter in chunks[0].parameters():
        parameter.grad = None
    for part, context in gpu_parts.variants().items():
        with context:
            yield _timed(f"  {part}", sketches, Runs(1, 2), ends, passes_at_once)
    profile.unlink(missing_ok=True)
    yield _timed("  with the profiler", lambda: lambda: gpu_parts.write_profile(
        sketches(), profile), Runs(0, 1), ends, 2 * passes_at_once)
    if profile.is_file():
        print(f"\nsketch of {passes_at_once} micro-batches, {shape.name}:")
        print(profile.read_text(), flush=True)


def _count_sketches(ends: float) -> list[dict[str, float]]:
    print(f"\ncount sketch of a factor, ms:\n{'width':>8}{'tokens':>8}{'kernel':>10}{'torch':>10}"
          f"{'by bytes':>10}{'narrow':>10}")
    rows = []
    try:
        for row in gpu_parts.count_sketches(SKETCH_SIZE, _milliseconds):
            rows.append(row)
            print(f"{row['width']:8}{row['tokens']:8}{row['kernel']:10.3f}{row['torch']:10.3f}"
                  f"{row['bytes']:10.3f}{row['narrow']:10.3f}", flush=True)
            if time.monotonic() > ends:
                break
    except Exception as error:
        print(f"failed: {_in_words(error)}")
    return rows


def _pass(chunks: list[torch.nn.Module], micro_batches: list[MicroBatch]) -> None:
    passes.run_pass(chunks, micro_batches, backward=True)


@contextlib.contextmanager
def _in_any_order():
    """Without the demand that sums are in one order from run to run: what that demand costs."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


def _timed(part: str, prepare: Callable[[], Callable[[], None]], runs: Runs, ends: float,
           passes_of_call: int = 1) -> Timing:
    """The time of what ``prepare()`` returns, over the passes of a call."""
    if time.monotonic() > ends:
        return Timing(part, error="no time was left")
    try:
        call = prepare()
        for _ in range(runs.warm_up):
            call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        times = [_milliseconds(call)]
        while len(times) < runs.repeats and time.monotonic() < ends:
            times.append(_milliseconds(call))
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        return Timing(part, statistics.median(times) / passes_of_call, peak)
    except Exception as error:
        return Timing(part, error=_in_words(error))
    finally:
        call = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _milliseconds(call: Callable[[], None]) -> float:
    if not torch.cuda.is_available():
        begun = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begun)
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    call()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _print(shape: Shape, timings: list[Timing]) -> None:
    compiled = next((timing.milliseconds for timing in timings
                     if timing.part == "yardstick, compiled"), None)
    print(f"\n{shape.name} on {_device_name()}: {shape.layers} layers, {shape.at_once} samples of "
          f"{shape.tokens} tokens per micro-batch, k = {SKETCH_SIZE}")
    print(f"{'':34}{'ms':>10}{'/ compiled':>12}{'GiB':>8}")
    for timing in timings:
        if timing.error is not None:
            print(f"{timing.part:34}  failed: {timing.error}")
            continue
        ratio = f"{timing.milliseconds / compiled:12.2f}" if compiled else f"{'-':>12}"
        memory = "-" if timing.gigabytes is None else f"{timing.gigabytes:.1f}"
        print(f"{timing.part:34}{timing.milliseconds:10.2f}{ratio}{memory:>8}", flush=True)


def _time_kernels(ends: float) -> None:
    """The table of the kernels that hash a layer, in a process of its own."""
    script, left = HERE / "sketch" / "kernels.py", ends - time.monotonic()
    if not script.is_file():
        return
    if left < 5:
        print("kernels: no time was left. Run benchmarks/sketch/kernels.py --device cuda.")
        return
    try:
        subprocess.run([sys.executable, str(script), "--device", "cuda", "--rounds", "3"],
                       timeout=left, check=False)
    except subprocess.TimeoutExpired:
        print(f"kernels: stopped after {left:.0f} s.")


if __name__ == "__main__":
    main()
