"""The commands: what each is called, what it is asked (a *request*), and what answers.

A command is a module of :mod:`megatron_direct.commands` with a request dataclass and a function
that takes one, and a line here. The module is imported when the command is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """request, function: names in ``module``."""

    name: str
    help: str
    module: str
    request: str
    function: str

    def load(self) -> tuple[type, Callable]:
        module = importlib.import_module(f"megatron_direct.commands.{self.module}")
        return getattr(module, self.request), getattr(module, self.function)


COMMANDS = {command.name: command for command in (
    Command("pretrain", "the stable phase of a WSD schedule, up to the onset of annealing",
            "pretrain", "PretrainRequest", "pretrain"),
    Command("select", "pilot, sketches, curvature and the selection problem, in one launch",
            "select", "SelectRequest", "select"),
    Command("anneal", "the decay phase over a selection, or over random samples",
            "anneal", "AnnealRequest", "anneal"),
    Command("merge", "the weights of several checkpoints, averaged into one",
            "merge", "MergeRequest", "merge"),
    Command("alternate", "the decay phase in segments, each on a selection made at its beginning",
            "alternate", "AlternateRequest", "alternate"),
    Command("evaluate", "multiple-choice questions, answered by likelihood",
            "evaluate", "EvaluateRequest", "evaluate"),
    Command("compare", "microannealings: arms of selection, and datasets, compared over seeds",
            "compare", "CompareRequest", "compare"),
    Command("report", "the table of a run, and its report.html",
            "report", "ReportRequest", "report"),
    Command("plan", "time, memory and traffic of a selection, before it is run",
            "plan", "PlanRequest", "plan_run"),
    Command("inspect", "what masks hold; masks combined, or written out as datasets",
            "inspect", "InspectRequest", "inspect"),
)}
