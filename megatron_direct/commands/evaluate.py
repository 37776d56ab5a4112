"""``megatron-direct evaluate``: multiple-choice questions, answered by likelihood.

The model is given the question with each choice behind it, and answers with the choice whose tokens
it finds likeliest: by the sum of their log-likelihoods (``acc``), by the sum over the choice's
bytes (``acc_norm``), or by the mean over its tokens (``acc_token``). The first two are
lm-evaluation-harness's; its code divides by characters, which are bytes in English text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from megatron_direct.commands.select import model_of
from megatron_direct.config import ModelConfig, ParallelConfig, flag
from megatron_direct.errors import UserError
from megatron_direct.evaluation import choices
from megatron_direct.evaluation import questions as multiple_choice
from megatron_direct.evaluation.choices import ChoiceSamples, EncodedChoice
from megatron_direct.evaluation.questions import Question
from megatron_direct.mcore import checkpoint, grid, model, passes
from megatron_direct.preprocessing import tokenizer
from megatron_direct.reports.tables import Table, make_table, text_table
from megatron_direct.runtime import files, host, parallel
from megatron_direct.runtime.run_directory import versions

METRICS = ("acc", "acc_norm", "acc_token")

# Scores closer than this, relative to the best, are ties: layouts sum in different orders, which
# changes fp32 log-likelihoods by about 1e-6. Ties go to the choice of the lower number.
TIE = 1e-5


@dataclass(frozen=True)
class EvaluateConfig:
    """Multiple-choice questions."""

    load: str = flag("", "checkpoint to score (a Megatron distributed one)", required=True)
    tasks: tuple = flag((), "JSONL files of multiple-choice questions; each is a task, named by "
                        "its stem", nargs="+", required=True)
    tokenizer_model: str = flag("", "the model's tokenizer: a SentencePiece model, or a Hugging "
                                "Face tokenizer.json or the folder that holds it", required=True)
    output: str = flag("", "JSON file for the results and every choice's score", required=True)
    micro_batch_size: int = flag(8, "choices a rank computes at once")


@dataclass(frozen=True)
class Task:
    """encoded: [questions][choices]"""

    file: str
    digest: str
    questions: list[Question]
    encoded: list[list[EncodedChoice]]


def evaluate(config: EvaluateConfig, given_architecture: dict, layout: ParallelConfig) -> None:
    """Scores the tasks, prints a table and writes the output (rank 0); all ranks call this.

    given_architecture: the architecture flags that were given; the rest comes from the checkpoint.
    """
    found = checkpoint.require(config.load)
    architecture = model_of(found, given_architecture, [])
    layout.check(architecture, parallel.world_size())
    if config.micro_batch_size < 1:
        raise UserError(f"--micro-batch-size {config.micro_batch_size} must be at least 1.")
    tasks = parallel.on_rank_zero(lambda: _read(config, found, architecture))
    samples = ChoiceSamples([choice for task in tasks.values() for of_one in task.encoded
                             for choice in of_one])
    with grid.model_parallel(layout, layout.num_model_chunks(architecture)):
        chunks = model.build(architecture, layout)
        checkpoint.load_model(found, chunks)
        scores = log_likelihoods(chunks, samples, config.micro_batch_size)
    parallel.on_rank_zero(lambda: _report(config, found, architecture, layout, tasks, scores))


def log_likelihoods(chunks: Sequence[torch.nn.Module], samples: ChoiceSamples,
                    micro_batch_size: int) -> np.ndarray:
    """[choices] sum of the log-likelihoods of each choice's tokens, on every rank."""
    scores = torch.zeros(len(samples), dtype=torch.float64, device=host.device())
    with torch.no_grad(), tqdm(total=len(samples), desc="evaluate", unit="choice",
                               disable=None if parallel.is_rank_zero() else True) as progress:
        for micro_batches in passes.of_samples(chunks, samples, np.arange(len(samples)),
                                             micro_batch_size):
            losses = passes.run_pass(chunks, micro_batches, backward=False)
            sums = -losses.double() * torch.stack([b.num_labels for b in micro_batches])
            numbers = np.concatenate([batch.samples for batch in micro_batches])
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
            "log_likelihood": scores.tolist(), "bytes": num_bytes, "tokens": num_tokens,
            "cut": any(choice.is_cut for choice in encoded),
            "merged": any(choice.is_merged for choice in encoded)}


def summary(answered: Sequence[dict]) -> dict:
    """Accuracies of a task with their standard errors (None for one question), and counts."""
    count = len(answered)
    result = {"questions": count}
    for name in METRICS:
        share = sum(a["answered"][name] == a["answer"] for a in answered) / count
        # Of a mean of independent questions, from the unbiased variance of right and wrong.
        error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None
        result |= {name: share, f"{name}_stderr": error}
    return {**result, "chance": sum(1 / len(a["bytes"]) for a in answered) / count,
            "cut": sum(a["cut"] for a in answered), "merged": sum(a["merged"] for a in answered)}


def _read(config: EvaluateConfig, found: Path, architecture: ModelConfig) -> dict[str, Task]:
    """The tasks by name, tokenized."""
    if Path(config.output).is_dir():
        raise UserError(f"{config.output} is a folder. Name a file with --output.")
    names = [Path(file).stem for file in config.tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two files of --tasks are called {', '.join(twice)}, and so would be one "
                        "task. Rename one, or list each once.")
    tokens = tokenizer_of(config.tokenizer_model, found, architecture)
    tasks = {}
    for name, file in zip(names, config.tasks, strict=True):
        questions = multiple_choice.read(file)
        encoded = choices.encode(questions, tokens, architecture.seq_length, file)
        tasks[name] = Task(file, files.file_digest(file), questions, encoded)
    return tasks


def tokenizer_of(path: str, found: Path, architecture: ModelConfig):
    """The tokenizer of ``--tokenizer-model``, on rank 0.

    Raises UserError if it is not the one that the model was trained with.
    """
    if not Path(path).exists():
        raise UserError(f"{path} does not exist. Correct --tokenizer-model.")
    file = tokenizer.model_file(Path(path))
    wanted, digest = _trained_with(found), files.file_digest(file)
    if wanted is not None and digest != wanted:
        raise UserError(f"{file} (digest {digest}) is not the tokenizer that {found} was trained "
                        f"with (digest {wanted}). Give that one with --tokenizer-model.")
    loaded = tokenizer.load(file, None, append_eod=False)
    if loaded.vocab_size > architecture.vocab_size:
        raise UserError(f"{file} has {loaded.vocab_size} entries, the model in {found} has "
                        f"{architecture.vocab_size}. Give the model's tokenizer with "
                        "--tokenizer-model.")
    if wanted is None:
        print(f"{found} does not say which tokenizer it was trained with; {file} is taken for it",
              flush=True)
    return loaded


def _trained_with(found: Path) -> str | None:
    return checkpoint.read_args(found).get("tokenizer_digest")


def _report(config: EvaluateConfig, found: Path, architecture: ModelConfig,
            layout: ParallelConfig, tasks: dict[str, Task], scores: np.ndarray) -> None:
    """scores: [choices of all tasks]"""
    answered: dict[str, list[dict]] = {}
    first = 0
    for name, task in tasks.items():
        answered[name] = []
        for question, encoded in zip(task.questions, task.encoded, strict=True):
            of_one = scores[first: first + len(encoded)]
            first += len(encoded)
            if not np.isfinite(of_one).all():
                raise UserError(f"{found} gives no finite likelihood to {task.file}:"
                                f"{question.line}. Its weights are damaged, or diverged: load an "
                                "earlier checkpoint.")
            answered[name].append(answers(question, encoded, of_one))
    results = {name: summary(of_task) for name, of_task in answered.items()}
    files.write_json(config.output, {
        "results": results,
        "checkpoint": {"path": str(found), "digest": checkpoint.digest(found),
                       "iteration": checkpoint.read_iteration(found)},
        "tokenizer": {"path": str(config.tokenizer_model), "digest": files.file_digest(
            tokenizer.model_file(Path(config.tokenizer_model))),
            "named_by_checkpoint": _trained_with(found) is not None},
        "seq_length": architecture.seq_length,
        "layout": {**vars(layout), "ranks": parallel.world_size()},
        "versions": versions(),
        "tasks": {name: {"file": str(task.file), "digest": task.digest,
                         "questions": answered[name]} for name, task in tasks.items()},
    })
    print(text_table(_table(results)), flush=True)
    print(f"scores: {config.output}", flush=True)


def _table(results: dict[str, dict]) -> Table:
    rows = []
    for name, result in results.items():
        shares = [f"{result[m]:.4f}" + ("" if result[f"{m}_stderr"] is None else
                                        f" ± {result[f'{m}_stderr']:.4f}") for m in METRICS]
        rows.append([name, str(result["questions"]), *shares, f"{result['chance']:.4f}",
                     str(result["cut"]), str(result["merged"])])
    return make_table(["task", "questions", *METRICS, "chance", "cut", "merged"], rows)
