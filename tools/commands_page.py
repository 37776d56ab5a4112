"""Writes docs/commands.md: every command and every flag, from the parsers themselves.

    python tools/commands_page.py > docs/commands.md

A test compares the page with what this prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from megatron_direct.cli import anneal_gpt, doctor, preprocess
from megatron_direct.cli import main as cli
from megatron_direct.cli.registry import COMMANDS

_HEAD = """\
# Commands and flags

Written by `tools/commands_page.py` from the parsers; `--help` prints the same. Every command runs
alone or on the ranks of torchrun, mpirun or srun ([launching.md](launching.md)). Flags have
Megatron's names where Megatron has them. A switch with `no-` before its name is its opposite."""


def parsers() -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """(name, help, parser) of each command."""
    commands, = (action for action in cli.make_parser()._actions
                 if isinstance(action, argparse._SubParsersAction))
    for name, command in COMMANDS.items():
        yield name, command.help, commands.choices[name]
    own = {"preprocess": preprocess, "anneal-gpt": anneal_gpt, "doctor": doctor}
    for name, (help_text, _) in cli._ENTRIES.items():
        yield name, help_text, own[name].make_parser()


def page() -> str:
    sections = [_HEAD]
    for name, help_text, parser in parsers():
        sections.append(f"## megatron-direct {name}\n{help_text[0].upper()}{help_text[1:]}.")
        for group in parser._action_groups:
            rows = [_row(action) for action in group._group_actions if action.dest != "help"]
            if rows:
                title = "" if group.title in ("options", "positional arguments") else group.title
                sections.append("\n".join([*([f"**{title}**", ""] if title else []),
                                           "| flag | |", "|---|---|", *rows]))
    return "\n\n".join(sections) + "\n"


def _row(action: argparse.Action) -> str:
    names = " ".join(f"`{name}`" for name in action.option_strings if not name.startswith("--no-")
                     or len(action.option_strings) == 1) or f"`{action.dest}`"
    if action.choices:
        names += " " + ", ".join(map(str, action.choices))
    elif action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction):
        names += f" {(action.metavar or action.dest).upper()}"
    help_text = (action.help or "").replace("%%", "%").replace("|", "\\|").rstrip(".")
    needed = " Required." if action.required else ""
    return f"| {names} | {help_text[:1].upper()}{help_text[1:]}.{needed} |"


if __name__ == "__main__":
    print(page(), end="")
