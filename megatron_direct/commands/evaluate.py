"""``megatron-direct evaluate``: multiple-choice questions, and lm-evaluation-harness's tasks."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_direct.config import Given, Job, ModelConfig, ParallelConfig, Precision
from megatron_direct.errors import UserError
from megatron_direct.evaluation import choices
from megatron_direct.evaluation import questions as questions_of
from megatron_direct.evaluation.choices import ChoiceSamples, EncodedChoice
from megatron_direct.evaluation.harness import (
    HarnessConfig,
    evaluate_tasks,
    known_tasks,
    require_harness,
)
from megatron_direct.evaluation.multiple_choice import (
    METRICS,
    accuracies,
    answers,
    log_likelihoods,
)
from megatron_direct.evaluation.questions import Question
from megatron_direct.evaluation.serving import ServedModel
from megatron_direct.evaluation.tokenizers import tokenizer_of
from megatron_direct.mcore import grid, model
from megatron_direct.mcore.checkpoint import Checkpoint, load_model, open_checkpoint
from megatron_direct.preprocessing import tokenizer
from megatron_direct.reports.tables import Table, make_table, text_table
from megatron_direct.runtime import digests, files, parallel
from megatron_direct.runtime.run_directory import versions
from megatron_direct.settings import Settings, flag
from megatron_direct.steps.onset import model_of


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Questions and tasks."""

    load: str = flag("", "checkpoint to score (a Megatron distributed one)", required=True)
    tasks: tuple = flag((), "JSONL files of multiple-choice questions; each is a task, named after "
                        "its stem", nargs="+")
    tokenizer_model: str = flag("", "the model's tokenizer: a SentencePiece model, or a Hugging "
                                "Face tokenizer.json or the folder that holds it", required=True)
    eod_token: str = flag("", "end-of-document token, as it was given to `preprocess`; default: "
                          "the tokenizer's own")
    output: str = flag("", "JSON file for the results and every choice's score", required=True)
    micro_batch_size: int = flag(8, "choices per rank in one pass", at_least=1)


@dataclass(frozen=True)
class Task:
    """encoded: [questions][choices]"""

    file: str
    digest: str
    questions: list[Question]
    encoded: list[list[EncodedChoice]]


@dataclass(frozen=True)
class EvaluateRequest:
    evaluate: EvaluateConfig
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    layout: ParallelConfig = field(default_factory=ParallelConfig)
    given: Given = field(default_factory=Given, metadata={"groups": ("model", "precision")})


def evaluate(request: EvaluateRequest) -> None:
    """Scores the tasks, prints a table and writes the output (rank 0); all ranks call this."""
    config = request.evaluate
    if not config.tasks and not request.harness.lm_eval:
        raise UserError("--tasks and --lm-eval are both missing. Give one, or both.")
    checkpoint = open_checkpoint(config.load)
    job = Job(model_of(checkpoint, request.given, []), request.layout,
              precision=checkpoint.settings(Precision, request.given.precision))
    job.require_runs_on(parallel.world_size(), trains=False)
    tasks = parallel.on_rank_zero(lambda: _read(config, checkpoint, job.model))
    manager = parallel.kept_on_rank_zero(lambda: _manager(request.harness))
    harness = None
    samples = ChoiceSamples([choice for task in tasks.values() for of_one in task.encoded
                             for choice in of_one])
    scores = np.empty(0)
    with grid.model_parallel(job.layout, job.num_model_chunks):
        chunks = model.build(job.of_main_loss)
        load_model(checkpoint.path, chunks)
        if tasks:
            scores = log_likelihoods(chunks, samples, config.micro_batch_size)
        if request.harness.lm_eval:
            harness = ServedModel(chunks, config.micro_batch_size, job.model.known_vocab_size
                                  ).serve(lambda ask: evaluate_tasks(
                                      request.harness, manager, ask,
                                      _tokenizer(config, checkpoint, job.model),
                                      job.model.seq_length))
    parallel.on_rank_zero(lambda: _report(config, _Context(checkpoint, job), _scored(
        checkpoint, tasks, scores), harness))


def _tokenizer(config: EvaluateConfig, checkpoint: Checkpoint, model: ModelConfig):
    return tokenizer_of(config.tokenizer_model, checkpoint, model, config.eod_token or None)


def _manager(config: HarnessConfig):
    """lm-evaluation-harness's, if any of its tasks are asked for (rank 0)."""
    if not config.lm_eval:
        return None
    require_harness()
    return known_tasks(config)


def _read(config: EvaluateConfig, checkpoint: Checkpoint, model: ModelConfig) -> dict[str, Task]:
    """The tasks by name, tokenized."""
    if Path(config.output).is_dir():
        raise UserError(f"{config.output} is a folder. Name a file with --output.")
    names = [Path(file).stem for file in config.tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two files of --tasks have the name {', '.join(twice)}, which names the "
                        "task. Rename one, or list each file once.")
    tokens = _tokenizer(config, checkpoint, model)
    tasks = {}
    for name, file in zip(names, config.tasks, strict=True):
        questions = questions_of.read_questions(file)
        encoded = choices.encode(questions, tokens, model.seq_length, file)
        tasks[name] = Task(file, digests.file_digest(file), questions, encoded)
    return tasks


@dataclass(frozen=True)
class _Context:
    checkpoint: Checkpoint
    job: Job


@dataclass(frozen=True)
class _Answered:
    """answers: of each task, by question."""

    tasks: dict[str, Task]
    answers: dict[str, list[dict]]


def _scored(checkpoint: Checkpoint, tasks: dict[str, Task], scores: np.ndarray) -> _Answered:
    """scores: [choices of all tasks]"""
    answered: dict[str, list[dict]] = {}
    first = 0
    for name, task in tasks.items():
        answered[name] = []
        for question, encoded in zip(task.questions, task.encoded, strict=True):
            of_one = scores[first: first + len(encoded)]
            first += len(encoded)
            if not np.isfinite(of_one).all():
                raise UserError(f"{checkpoint.path} gives no finite likelihood to {task.file}:"
                                f"{question.line}. Its weights are damaged, or training diverged: "
                                "load an earlier checkpoint.")
            answered[name].append(answers(question, encoded, of_one))
    return _Answered(tasks, answered)


def _report(config: EvaluateConfig, context: _Context, answered: _Answered, harness: dict | None,
            ) -> None:
    checkpoint, job = context.checkpoint, context.job
    results = {name: accuracies(of_task) for name, of_task in answered.answers.items()}
    files.write_json(config.output, {
        "results": results,
        **({} if harness is None else {"lm_eval": _plain(harness)}),
        "checkpoint": {"path": str(checkpoint.path), "digest": checkpoint.digest,
                       "iteration": checkpoint.iteration},
        "tokenizer": {"path": str(config.tokenizer_model), "digest": digests.file_digest(
            tokenizer.model_file(Path(config.tokenizer_model))),
            "named_by_checkpoint": checkpoint.tokenizer_digest is not None},
        "seq_length": job.model.seq_length,
        "layout": {**vars(job.layout), "ranks": parallel.world_size()},
        "precision": vars(job.precision),
        "versions": versions(),
        "tasks": {name: {"file": str(task.file), "digest": task.digest,
                         "questions": answered.answers[name]}
                  for name, task in answered.tasks.items()},
    })
    if results:
        print(text_table(_table(results)), flush=True)
    if harness is not None:
        print(text_table(_harness_table(harness["results"])), flush=True)
    print(f"scores: {config.output}", flush=True)


def _plain(harness: dict) -> dict:
    """What of lm-evaluation-harness's results does not depend on when and where it ran."""
    kept = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")
    return json.loads(json.dumps({key: harness[key] for key in kept if key in harness},
                                 default=str))


def _harness_table(results: dict[str, dict]) -> Table:
    """A row for each metric and filter of each task."""
    rows = []
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, of_filter = key.partition(",")
            if not of_filter or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{of_filter}")
            rows.append([task, metric, of_filter, f"{value:.4f}" + (
                f" ± {error:.4f}" if isinstance(error, float) else "")])
    return make_table(["task", "metric", "filter", "value"], rows, left=(0, 1, 2))


def _table(results: dict[str, dict]) -> Table:
    rows = []
    for name, result in results.items():
        shares = [f"{result[m]:.4f}" + ("" if result[f"{m}_stderr"] is None else
                                        f" ± {result[f'{m}_stderr']:.4f}") for m in METRICS]
        rows.append([name, str(result["questions"]), *shares, f"{result['chance']:.4f}",
                     str(result["cut"]), str(result["merged"])])
    return make_table(["task", "questions", *METRICS, "chance", "cut", "merged"], rows)
