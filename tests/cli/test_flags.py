"""The flags of every command: which there are, and that a wrong value is reported as such.

``flags.txt`` lists them all, so that a new one, or one that goes, is a decision. After such a
decision: ``python tests/cli/test_flags.py > tests/cli/flags.txt``, and
``python tools/commands_page.py > docs/commands.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import runpy
from pathlib import Path

import pytest

from megatron_direct.cli import anneal_gpt, doctor, flags, preprocess
from megatron_direct.cli.main import make_parser
from megatron_direct.cli.registry import COMMANDS
from megatron_direct.commands.doctor import DoctorRequest
from megatron_direct.errors import UserError
from megatron_direct.settings import flag_name, flag_type

LISTED = Path(__file__).with_name("flags.txt")


@functools.cache
def _parsers() -> list[tuple[str, argparse.ArgumentParser]]:
    commands, = (action for action in make_parser()._actions
                 if isinstance(action, argparse._SubParsersAction))
    return [*((name, commands.choices[name]) for name in COMMANDS),
            ("anneal-gpt", anneal_gpt.make_parser()), ("preprocess", preprocess.make_parser()),
            ("doctor", doctor.make_parser())]


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


def test_a_switch_says_whether_it_is_on():
    found = {name: {action.dest: action.help for action in parser._actions}
             for name, parser in _parsers()}
    assert found["select"]["contrast"].endswith(" (default on)")
    assert found["select"]["weight_by_tokens"].endswith(" (default off)")
    assert found["anneal"]["load_optim"].endswith(" (default on)")
    assert found["pretrain"]["swiglu"].endswith(" (default on)")
    assert "(default" not in found["select"]["swiglu"]  # as the checkpoint was trained


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


# Every flag that takes a value, of every command, at these. What is accepted is stated below.
ODD = ("0", "-1", "nan", "1e20", "inf", "")
_NEEDED = {
    "pretrain": {"--data-path": "a", "--save": "s"},
    "select": {"--load": "l", "--data-path": "a", "--valid-data-path": "v", "--run-dir": "r"},
    "anneal": {"--run-dir": "r"}, "report": {"--run-dir": "r"}, "inspect": {"--mask": "m"},
    "evaluate": {"--load": "l", "--tasks": "t", "--tokenizer-model": "m", "--output": "o"},
    "preprocess": {"--input": "i.jsonl", "--output-prefix": "o", "--tokenizer-model": "t"}}
_NEEDED["compare"] = {**_NEEDED["select"], "--test-data-path": "t"}
_NEEDED["alternate"] = _NEEDED["select"]
_NEEDED["merge"] = {"--merge-load": "m", "--save": "s"}
_NEEDED["anneal-gpt"] = _NEEDED["select"]

# Names, paths, patterns and keys: any text is one; whether it is there is seen when it is opened.
_ANY_TEXT = set("""--anneal-load --checkpoint --data-args-path --data-path --domain --domain-key
    --eod-token --exclude --group-key --input --json-keys --lm-eval --load --mask --materialize
    --measured-file --merge-load --name --object-storage-cache-path --output --output-prefix
    --per-split-data-args-path --proxy-load --run-dir --save --selection --selection-name
    --shared-folder --size-of --sketch-parameters --tasks --test-data-path --tokenizer-model
    --valid-data-path""".split())
# Texts with a form of their own, which depends on the model or the pools: seen when these are.
_FORMED = {"--hybrid-layer-pattern", "--moe-layer-freq", "--quotas"}
_ACCEPTED = {
    # 0 stands for none of it, all of it, or is in the range.
    "0": _ANY_TEXT | _FORMED | set("""--adam-beta1 --adam-beta2 --average-last --clip-grad
        --corrupt-fraction --density-samples --kept-deviation --lr-warmup-iters
        --lr-wsd-decay-iters --merge-last --micro-batch-tokens --min-lr --mscale
        --mscale-all-dim --mtp-loss-scaling-factor --mtp-num-layers
        --num-curvature-samples --num-valid-samples --only-replicate --pilot-iters --seed
        --shrinkage-clusters --stiff-budget --stiff-budget-fraction --text-weight
        --valid-clusters
        --weight-decay""".split()),
    "-1": _ANY_TEXT | _FORMED, "nan": _ANY_TEXT | _FORMED,
    # No clipping, no limit, no budget; and a step of any length.
    "1e20": _ANY_TEXT | _FORMED | {"--candidates", "--clip-grad", "--max-epochs", "--stiff-budget",
                                   "--step-size", "--text-weight", "--weights"},
    "inf": _ANY_TEXT | _FORMED | {"--stiff-budget"},
    # As if it was not given, where that is allowed; preprocess reads "" as the folder it is in,
    # which is neither a file nor holds a tokenizer.
    "": {"--anneal-load", "--checkpoint", "--data-args-path", "--eod-token", "--load",
         "--materialize", "--measured-file", "--name", "--object-storage-cache-path", "--output",
         "--proxy-load", "--lm-eval-include-path", "--per-split-data-args-path",
         "--tokenizer-model", "--input"},
}


def _is_accepted(command: str, parser: argparse.ArgumentParser, flag: str, value: str) -> bool:
    """Until the command itself begins. Raises unless what is refused is named."""
    others = [word for pair in _NEEDED.get(command, {}).items() if pair[0] != flag for word in pair]
    others += ["--selection", "random"] if flag == "--size-of" else []
    try:
        found = parser.parse_args([*others, f"{flag}={value}"])
        if command == "preprocess":
            preprocess.PreprocessSettings(**{
                name: tuple(v) if isinstance(v, list) else v for name, v in vars(found).items()})
        else:
            kind = {"anneal-gpt": anneal_gpt.LaunchRequest, "doctor": DoctorRequest}.get(command)
            flags.request_from(kind or COMMANDS[command].load()[0], found)
    except SystemExit as error:
        assert error.code == 2
        return False
    except UserError as error:
        assert flag in str(error)
        return False
    return True


def test_every_flag_at_every_odd_value(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    walked = 0
    for command, parser in _parsers():
        for action in parser._actions:
            if not action.option_strings or action.nargs == 0 or isinstance(
                    action, argparse._HelpAction | argparse.BooleanOptionalAction):
                continue
            flag = action.option_strings[0]
            for value in ODD:
                walked += 1
                accepted = _is_accepted(command, parser, flag, value)
                assert not accepted or flag in _ACCEPTED[value], (command, flag, value)
    capsys.readouterr()
    assert walked > 1500 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", sorted(set().union(*_ACCEPTED.values()) - _FORMED))
def test_what_is_said_to_be_accepted_is(flag, capsys):
    """By some command at least, so that the table holds nothing that is not so."""
    parsers = [(command, parser) for command, parser in _parsers()
               if flag in parser._option_string_actions]
    for value in ODD:
        found = any(_is_accepted(command, parser, flag, value) for command, parser in parsers)
        assert found == (flag in _ACCEPTED[value]), (flag, value)


if __name__ == "__main__":
    print(listing(), end="")


def test_settings_out_of_flags_can_be_keys():
    """What is found once for one selection is looked up by its settings."""
    found = make_parser().parse_args(
        "select --load x --data-path a b --valid-data-path c --run-dir r --num-select 5 "
        "--quotas a:1:2 b::3".split())
    request = flags.request_from(COMMANDS["select"].load()[0], found)
    assert request.selection.quotas == ("a:1:2", "b::3")
    assert hash(request.selection) == hash(dataclasses.replace(request.selection))
