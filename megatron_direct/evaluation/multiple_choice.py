"""Which choice a model finds likeliest, and how often that is right.

The model is given the question with each choice after it, and answers with the choice whose tokens
it finds likeliest: by the sum of their log-likelihoods (``acc``), by the sum over the choice's
bytes (``acc_norm``), or by the mean over its tokens (``acc_token``). The first two are
lm-evaluation-harness's; its code divides by characters, which are bytes in English text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm

from megatron_direct.data.samples import MicroBatchLimits
from megatron_direct.evaluation.choices import ChoiceSamples, EncodedChoice
from megatron_direct.evaluation.questions import Question
from megatron_direct.mcore import grid, passes
from megatron_direct.runtime import host, parallel

METRICS = ("acc", "acc_norm", "acc_token")

# Scores closer than this, relative to the best, are ties: layouts sum in different orders, which
# changes fp32 log-likelihoods by about 1e-6. Ties go to the choice of the lower number.
TIE = 1e-5


def log_likelihoods(chunks: Sequence[torch.nn.Module], samples: ChoiceSamples,
                    micro_batch_size: int) -> np.ndarray:
    """[choices] sum of the log-likelihoods of each choice's tokens, on every rank."""
    scores = torch.zeros(len(samples), dtype=torch.float64, device=host.device())
    with torch.no_grad(), tqdm(total=len(samples), desc="evaluate", unit="choice",
                               disable=None if parallel.is_rank_zero() else True) as progress:
        for micro_batches in passes.of_samples(chunks, samples, np.arange(len(samples)),
                                               MicroBatchLimits(micro_batch_size)):
            losses = passes.run_pass(chunks, micro_batches, backward=False)
            sums = -losses.double() * torch.stack([b.num_labels for b in micro_batches])
            numbers = passes.sample_numbers(micro_batches)
            scores[torch.from_numpy(numbers)] = sums.flatten()[
                passes.sample_rows(micro_batches)]
            # The other data-parallel ranks are about as far.
            progress.update(min(len(numbers) * grid.data_size(), len(samples) - progress.n))
    return grid.sum_over_data(scores).cpu().numpy()


def best_choice(scores: np.ndarray) -> int:
    """The number of the largest score, of the lowest number among ties."""
    best = scores.max()
    return int(np.flatnonzero(scores >= best - TIE * abs(best))[0])


def answers(question: Question, encoded: Sequence[EncodedChoice], scores: np.ndarray) -> dict:
    """What the model answers, by each metric, and what that is made of; scores: [choices]."""
    num_bytes = [question.num_bytes(number) for number in range(len(question.choices))]
    num_tokens = [choice.num_scored for choice in encoded]
    by_metric = {"acc": scores, "acc_norm": scores / num_bytes, "acc_token": scores / num_tokens}
    return {"line": question.line, "answer": question.answer,
            "answered": {name: best_choice(by_metric[name]) for name in METRICS},
            "distinct": question.num_distinct, "log_likelihood": scores.tolist(),
            "bytes": num_bytes, "tokens": num_tokens,
            "cut": any(choice.is_cut for choice in encoded),
            "merged": any(choice.is_merged for choice in encoded)}


def accuracies(answered: Sequence[dict]) -> dict:
    """Accuracies of a task with their standard errors (None for one question), and counts."""
    count = len(answered)
    result: dict[str, float | None] = {"questions": count}
    for name in METRICS:
        share = sum(a["answered"][name] == a["answer"] for a in answered) / count
        # Of a mean of independent questions, from the unbiased variance of right and wrong.
        error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
        result |= {name: share, f"{name}_stderr": error}
    return {**result, "chance": sum(1 / a["distinct"] for a in answered) / count,
            "cut": sum(a["cut"] for a in answered), "merged": sum(a["merged"] for a in answered)}
