"""Wrong values and combinations: each error names the flag, the value and the remedy."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest

from megatron_direct.errors import UserError
from megatron_direct.preprocessing.settings import PreprocessSettings

GOOD = {"input": (Path("a.jsonl"),), "output_prefix": "x", "tokenizer_model": Path("t.model")}
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("changed", "match"), [
    ({"split": "1,2"}, "--split 1,2 is not three numbers such as 90,5,5"),
    ({"split": "a,b,c"}, "--split a,b,c is not three numbers"),
    ({"split": "-1,1,1"}, "--split -1,1,1 is not three numbers"),
    ({"split": "0,0,0"}, "--split 0,0,0 is not three numbers"),
    ({"split": "nan,1,1"}, "--split nan,1,1 is not three numbers"),
    ({"split": "1,inf,1"}, "--split 1,inf,1 is not three numbers"),
    ({"workers": 0}, "--workers 0 leaves no process.*Give 1 or more"),
    ({"workers": -3}, "--workers -3 leaves no process"),
    ({"shard_size": 0.0}, "--shard-size 0.0 is not a size.*above 0"),
    ({"shard_size": -1.0}, "--shard-size -1.0 is not a size"),
    ({"shard_size": INF}, "--shard-size inf is not a size"),
    ({"shard_size": NAN}, "--shard-size nan is not a size"),
    ({"corrupt_fraction": -0.1}, "--corrupt-fraction -0.1 is not a share.*from 0 to 1"),
    ({"corrupt_fraction": 1.1}, "--corrupt-fraction 1.1 is not a share"),
    ({"corrupt_fraction": NAN}, "--corrupt-fraction nan is not a share"),
    ({"seed": -1}, "--seed -1 is negative"),
    ({"input": ()}, "--input names no file"),
    ({"json_keys": ()}, "--json-keys names no key"),
    ({"json_keys": ("text", "")}, "--json-keys is empty"),
    ({"group_key": ""}, "--group-key is empty"),
    ({"domain_key": ""}, "--domain-key is empty"),
    ({"domain": ""}, "--domain is empty"),
    ({"eod_token": ""}, "--eod-token is empty"),
    ({"input": (Path("a.jsonl"), Path("b")), "group_key": "book"},
     "--group-key: b is read as plain text, for its name, and has no keys. Name records .jsonl"),
    ({"input": (Path("b.txt"),), "json_keys": ("content",), "domain_key": "set"},
     "--domain-key and --json-keys: b.txt is read as plain text"),
    ({"eod_token": "</s>"}, "--eod-token </s> ends no document without --append-eod"),
    ({"vocab_size": 99}, "--vocab-size 99 is of a tokenizer that --train-tokenizer trains"),
    ({"samples": "sentence"}, "--samples sentence is not one of document, window"),
    ({"samples": "window"}, "--samples window and --seq-length go together"),
    ({"seq_length": 8}, "--samples window and --seq-length go together"),
    ({"samples": "window", "seq_length": 1}, "--seq-length 1 leaves no token to predict"),
    ({"train_tokenizer": True, "vocab_size": 0}, "--vocab-size 0 holds no token"),
    ({"train_tokenizer": True, "tokenizer_model": Path("tokenizer.json")},
     "--tokenizer-model tokenizer.json names a Hugging Face tokenizer, but --train-tokenizer"),
    ({"domain": "a", "domain_key": "b"}, "--domain and --domain-key both name the domain"),
    ({"input": (Path("a/x.txt"), Path("b/x.jsonl.gz"))}, "have the same name.*: x. Rename"),
])
def test_wrong_values_are_refused(changed, match):
    PreprocessSettings(**GOOD)
    with pytest.raises(UserError, match=match):
        PreprocessSettings(**{**GOOD, **changed})


@pytest.mark.parametrize("changed", [
    {"split": "0,0,1"}, {"split": "98.5,1,0.5"}, {"shard_size": 1e-9}, {"corrupt_fraction": 1.0},
    {"samples": "window", "seq_length": 2}, {"train_tokenizer": True, "vocab_size": 1},
    {"input": (Path("a/x.txt"), Path("b/x.txt")), "domain": "one"},
    {"input": (Path("a.jsonl"), Path("b.txt")), "json_keys": ("content",)},
    {"exclude": ("held-out",), "eod_token": "</s>"},  # what ends the documents there
    {"input": (Path("a/x.jsonl"), Path("b/x.jsonl")), "domain_key": "set"},
])
def test_values_at_the_limits_are_taken(changed):
    settings = PreprocessSettings(**{**GOOD, **changed})
    assert sum(settings.shares) == pytest.approx(1) and settings.shard_bytes >= 1


def test_settings_reach_other_processes_as_they_are():
    settings = PreprocessSettings(**GOOD, workers=3)
    assert pickle.loads(pickle.dumps(settings)) == settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.workers = 4
