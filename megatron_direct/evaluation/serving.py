"""A sharded model that answers a program which runs on rank 0 alone.

The program (lm-evaluation-harness, say) knows of no ranks. It asks on rank 0; the question goes to
all ranks, which answer it together, and then wait for the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from megatron_direct.evaluation.choices import ChoiceSamples, EncodedChoice
from megatron_direct.evaluation.predictions import predict
from megatron_direct.mcore import grid
from megatron_direct.runtime import host, parallel

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Answers:
    """Of n texts, of which the last tokens are scored: [n] sums of their log-likelihoods, [n]
    whether each of them is the likeliest in its place, and [n] the likeliest last token."""

    log_likelihoods: np.ndarray
    are_likeliest: np.ndarray
    last_tokens: np.ndarray


Ask = Callable[[Sequence[EncodedChoice]], Answers]


@dataclass(frozen=True, eq=False)
class ServedModel:
    """chunks: with weights, on their ranks; vocab_size: entries of the tokenizer."""

    chunks: Sequence[torch.nn.Module]
    micro_batch_size: int
    vocab_size: int

    def answer(self, texts: Sequence[EncodedChoice]) -> Answers:
        """All ranks call this with the same texts."""
        samples = ChoiceSamples(texts)
        found = torch.zeros(3, len(texts), dtype=torch.float64, device=host.device())
        for sample, of_one in predict(self.chunks, samples, np.arange(len(texts)),
                                      self.micro_batch_size, self.vocab_size).items():
            scored = slice(samples.first_label(sample), None)
            labels = samples.tokens(sample)[1:]
            found[:, sample] = torch.tensor([
                of_one.log_likelihoods[scored].sum(),
                (of_one.likeliest[scored] == labels[scored]).all(), of_one.likeliest[-1]])
        sums, are, last = grid.sum_over_data(found).cpu().numpy()
        return Answers(sums, are > 0, last.astype(np.int64))

    def serve(self, program: Callable[[Ask], Result]) -> Result | None:
        """What the program returns, on rank 0; None elsewhere. All ranks call this; what the
        program raises is raised on all of them."""
        if not parallel.is_rank_zero():
            while (texts := parallel.on_rank_zero(lambda: None)) is not None:
                self.answer(texts)
            return None

        def ask(texts: Sequence[EncodedChoice]) -> Answers:
            return self.answer(parallel.on_rank_zero(lambda: list(texts)))

        try:
            result = program(ask)
        except Exception as error:
            failed = error
            parallel.on_rank_zero(lambda: _raise(failed))
        parallel.on_rank_zero(lambda: None)
        return result


def _raise(error: Exception):
    raise error
