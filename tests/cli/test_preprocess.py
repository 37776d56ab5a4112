"""The flags of ``megatron-direct preprocess``, and how it starts and ends."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from preprocess_runs import COMMAND

from megatron_direct.cli import preprocess
from megatron_direct.preprocessing.settings import PreprocessSettings

NEEDED = ["--input", "a.jsonl", "--output-prefix", "x", "--tokenizer-model", "t.model"]


def test_importing_it_loads_neither_torch_nor_megatron():
    code = ("import sys, megatron_direct.cli.preprocess; "
            "print({name.partition('.')[0] for name in sys.modules} & {'torch', 'megatron'})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_each_flag_is_a_setting_and_each_setting_a_flag():
    flags = {action.dest for action in preprocess.make_parser()._actions} - {"help"}
    assert flags == {field.name for field in dataclasses.fields(PreprocessSettings)}


def test_flags_that_are_not_given_leave_the_defaults(monkeypatch):
    seen = []
    monkeypatch.setattr(preprocess, "preprocess", lambda settings, ranks: seen.append(settings))
    preprocess.main(NEEDED)
    preprocess.main([*NEEDED, "--json-keys", "a", "b.c", "--exclude", "v", "--shard-size", "2"])
    needed = {"input": (Path("a.jsonl"),), "output_prefix": "x", "tokenizer_model": Path("t.model")}
    assert seen == [PreprocessSettings(**needed), PreprocessSettings(
        **needed, json_keys=("a", "b.c"), exclude=("v",), shard_size=2.0)]


def test_an_error_is_the_exit_message():
    with pytest.raises(SystemExit, match="^megatron-direct preprocess: error: --workers 0 leaves"):
        preprocess.main([*NEEDED, "--workers", "0"])
    with pytest.raises(SystemExit, match="^mine: error: --workers 0 leaves"):
        preprocess.main([*NEEDED, "--workers", "0"], prog="mine")


def test_the_script_is_the_command():
    done = subprocess.run([*COMMAND, *NEEDED, "--workers", "0"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("preprocess_selection: error: --workers 0 leaves no process")
    assert "usage: preprocess_selection" in subprocess.run(
        [*COMMAND, "--help"], capture_output=True, text=True, check=True).stdout
