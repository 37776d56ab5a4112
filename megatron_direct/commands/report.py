"""``megatron-direct report``: the table of a run, and one self-contained page about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_direct.config import ParallelConfig
from megatron_direct.reports import run_page
from megatron_direct.reports.run_files import read_report_files
from megatron_direct.reports.tables import text_table
from megatron_direct.runtime import parallel
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.settings import Settings, flag


@dataclass(frozen=True)
class ReportConfig(Settings):
    """Report."""

    run_dir: str = flag("", "run directory of a finished select", required=True)


@dataclass(frozen=True)
class ReportRequest:
    report: ReportConfig
    layout: ParallelConfig = field(default_factory=ParallelConfig)


def report(request: ReportRequest) -> None:
    """Writes ``report.html`` and prints the losses; all ranks may call this."""
    run = RunDirectory(request.report.run_dir)
    parallel.on_rank_zero(run.require)
    with run.entered("report"):
        parallel.on_rank_zero(lambda: _report(request.report))


def _report(config: ReportConfig) -> None:
    run = read_report_files(config.run_dir)
    path = Path(config.run_dir) / "report.html"
    run_page.write_page(run, path)
    for heading, table in run_page.loss_tables(run):
        print(f"{heading}\n{text_table(table)}\n")
    print(*run_page.headline(run), sep="\n")
    print(f"report: {path}", flush=True)
