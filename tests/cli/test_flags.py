"""The flags of every command: which there are, and that a wrong value is reported as such.

``flags.txt`` lists them all, so that a new one, or one that goes, is a decision. After such a
decision: ``python tests/cli/test_flags.py > tests/cli/flags.txt``, and
``python tools/commands_page.py > docs/commands.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_direct.cli import anneal_gpt, doctor, flags, preprocess
from megatron_direct.cli.main import make_parser
from megatron_direct.cli.registry import COMMANDS
from megatron_direct.errors import UserError
from megatron_direct.settings import flag_name, flag_type

LISTED = Path(__file__).with_name("flags.txt")


def _parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    commands, = (action for action in make_parser()._actions
                 if isinstance(action, argparse._SubParsersAction))
    for name in COMMANDS:
        yield name, commands.choices[name]
    yield "anneal-gpt", anneal_gpt.make_parser()
    yield "preprocess", preprocess.make_parser()
    yield "doctor", doctor.make_parser()


def listing() -> str:
    lines = []
    for name, parser in _parsers():
        names = sorted(option for action in parser._actions for option in action.option_strings
                       if option not in ("-h", "--help"))
        lines += [f"{name}:", *(f"  {option}" for option in names)]
    return "\n".join(lines) + "\n"


def test_every_flag_is_listed():
    assert listing() == LISTED.read_text(), "python tests/cli/test_flags.py > tests/cli/flags.txt"


def test_the_page_of_commands_is_what_the_parsers_say():
    tool = Path(__file__).parents[2] / "tools" / "commands_page.py"
    page = runpy.run_path(str(tool))["page"]()
    assert page == (tool.parents[1] / "docs" / "commands.md").read_text(), \
        "python tools/commands_page.py > docs/commands.md"


def test_every_flag_says_what_it_is():
    for name, parser in _parsers():
        for action in parser._actions:
            assert action.help, f"{name} {action.option_strings}"


def test_no_default_is_claimed_for_what_a_checkpoint_supplies():
    found = dict(_parsers())
    assert "(default 128)" in found["pretrain"].format_help()
    help_text = found["select"].format_help()
    assert "Architecture (default: as the checkpoint was trained):" in help_text
    assert "(default 128)" not in help_text and "(default 2048)" in help_text


GROUPS = sorted({group for command in COMMANDS.values()
                 for group in flags.groups(command.load()[0])}, key=lambda group: group.__name__)
NUMBERS = [(group, f) for group in GROUPS for f in dataclasses.fields(group)
           if flag_type(f) in (int, float) and not f.metadata["nargs"]]


def _required(group) -> dict:
    """Something for the fields that must be given."""
    return {f.name: ("x",) if f.metadata["nargs"] else "x" for f in dataclasses.fields(group)
            if f.metadata["required"]}


@pytest.mark.parametrize(("group", "f"), NUMBERS,
                         ids=[f"{g.__name__}.{f.name}" for g, f in NUMBERS])
def test_every_number_has_a_range_and_what_is_outside_is_named(group, f):
    assert f.metadata["bounds"], f"{flag_name(f.name)} has no range"
    for value in (0, -1, math.nan, math.inf, -math.inf, 1e20, "", "many", True, None):
        try:
            made = group(**{**_required(group), f.name: value})
        except UserError as error:
            assert flag_name(f.name) in str(error)
        else:  # accepted: then it is a number in its range, or left out
            found = getattr(made, f.name)
            assert found is None and f.default is None or (
                not isinstance(found, bool) and found >= min(
                    bound for key, bound in f.metadata["bounds"].items()
                    if key in ("at_least", "above")))


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_a_wrong_choice_is_an_error_in_python_too(group):
    for f in dataclasses.fields(group):
        if f.metadata["choices"]:
            with pytest.raises(UserError, match=f"{flag_name(f.name)} is 'nonsense': expected "):
                value = ("nonsense",) if f.metadata["nargs"] else "nonsense"
                group(**{**_required(group), f.name: value})


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
def test_what_is_required_is_missed(group):
    for f in dataclasses.fields(group):
        if f.metadata["required"]:
            values = {**_required(group), f.name: () if f.metadata["nargs"] else ""}
            with pytest.raises(UserError, match=f"{flag_name(f.name)} is missing"):
                group(**values)


if __name__ == "__main__":
    print(listing(), end="")
