"""``megatron-direct report``: the losses of a run, and one page about it that needs no other file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_direct.config import flag
from megatron_direct.reports import run_page
from megatron_direct.reports.run_files import read_run
from megatron_direct.reports.tables import text_table


@dataclass(frozen=True)
class ReportConfig:
    """Report."""

    run_dir: str = flag("", "folder of a finished select", required=True)


def report(config: ReportConfig) -> None:
    """Writes ``report.html`` and prints the losses (rank 0)."""
    run = read_run(config.run_dir)
    path = Path(config.run_dir) / "report.html"
    run_page.write_page(run, path)
    for heading, table in run_page.loss_tables(run):
        print(f"{heading}\n{text_table(table)}\n")
    print(*run_page.headline(run), sep="\n")
    print(f"report: {path}", flush=True)
