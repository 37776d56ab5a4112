"""What each step of a kernel costs, per type of device: what the choice among kernels rests on.

Each table comes from

    python benchmarks/sketch/kernels.py --device cpu
    python benchmarks/sketch/kernels.py --device cuda

which times every kernel on a list of shapes, fits the coefficients, and prints them as a literal.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Coefficients:
    """Nanoseconds of one step of each kind, all samples and tokens one after another."""

    call: float  # of one operation on tensors, however small
    multiply_add: float  # of a matrix product in float32
    bf16_multiply_add: float  # of one in bfloat16, summed in float32
    scattered_entry: float  # of a gradient added at its coordinate
    gathered: float  # number of a factor gathered into its bucket
    transform: float  # of a token's factors, there and multiplied: each of k log2 k
    frame: float  # entry of a frame read and written


_TABLES = {
    # One core of an Intel Xeon with AVX-512, torch 2.13.
    "cpu": Coefficients(call=26300, multiply_add=0.0182, bf16_multiply_add=0.0182,
                        scattered_entry=2.07, gathered=1.74, transform=0.229, frame=0.0186),
    # Estimated from timings of single layers on an H100: 650 TFLOP/s and 1.5 TB/s in products of
    # frames, 50 TFLOP/s in float32 without TF32. No entry is scattered. The kernel that they choose
    # was then the fastest on each of the benchmark's 34 shapes.
    "cuda": Coefficients(call=6e3, multiply_add=4e-5, bf16_multiply_add=3.1e-6, scattered_entry=0.0,
                         gathered=0.0018, transform=0.005, frame=0.0052),
}


def of(device_type: str) -> Coefficients:
    return _TABLES[device_type]
