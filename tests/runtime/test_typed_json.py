"""Dataclasses that go through JSON and come back equal, and files that hold something else."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_direct.errors import UserError
from megatron_direct.runtime.typed_json import from_json, read_record, to_json


@dataclass(frozen=True)
class Part:
    count: int
    share: float | None
    twice: int = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "twice", 2 * self.count)


@dataclass(frozen=True)
class Whole:
    name: str
    parts: dict[int, Part]
    pair: tuple[float, float] | None
    rows: tuple[tuple[int, ...], ...]
    anything: dict[str, Any]
    done: bool = False


WHOLE = Whole("a", {3: Part(1, None), 5: Part(2, 0.25)}, (1.0, 2.5), ((1, 2), ()),
              {"x": [1, None, {"y": "z"}]})


def test_what_is_written_is_read_back_equal():
    value = json.loads(json.dumps(to_json(WHOLE)))
    assert from_json(Whole, value) == WHOLE
    assert value["parts"]["5"] == {"count": 2, "share": 0.25, "twice": 4}


def test_derived_fields_are_computed_anew_and_unknown_keys_ignored():
    value = to_json(WHOLE)
    value["parts"]["3"]["twice"] = 99
    value["later"] = "unknown to this version"
    assert from_json(Whole, value) == WHOLE


def test_a_default_stands_for_a_missing_key_and_whole_numbers_for_floats():
    value = to_json(WHOLE)
    del value["done"]
    value["pair"] = [1, 2.5]
    found = from_json(Whole, value)
    assert found == WHOLE and isinstance(found.pair[0], float)


@pytest.mark.parametrize(("change", "match"), [
    ({"name": 3}, r"Whole.name: expected str, got 3"),
    ({"parts": {"3": {"count": 1}}}, r"Whole.parts\['3'\].share is missing"),
    ({"parts": {"x": {}}}, r"Whole.parts: expected int as keys, got 'x'"),
    ({"parts": {"3": {"count": True, "share": 1}}}, r"count: expected int, got True"),
    ({"pair": [1.0]}, r"Whole.pair: expected 2 values, got 1"),
    ({"rows": [[1], 2]}, r"Whole.rows\[1\]: expected list, got 2"),
    ({"done": 1}, r"Whole.done: expected bool, got 1"),
])
def test_a_value_of_another_type_is_named_with_its_place(change, match):
    with pytest.raises(ValueError, match=match):
        from_json(Whole, {**to_json(WHOLE), **change})


@pytest.mark.parametrize("text", ['{"name": 3}', '{"name": ', "[]"])
def test_a_file_that_holds_something_else_is_named(tmp_path, text):
    path = tmp_path / "whole.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"whole.json cannot be read: .*(create it|make) again"):
        read_record(Whole, path)
