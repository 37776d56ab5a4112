"""Keys of artefacts: what differs is named, and a field that is new changes nothing."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass, field

import pytest

from megatron_direct.config import BatchConfig
from megatron_direct.errors import UserError
from megatron_direct.runtime import run_directory
from megatron_direct.runtime.manifest import Artefact, Key, State


@dataclass(frozen=True)
class Rows(Key):
    checkpoint_digest: str
    sizes: tuple[int, ...] = (1, 2)
    batch: BatchConfig = field(default_factory=BatchConfig)


@dataclass(frozen=True)
class RowsOfALaterVersion(Rows):
    precision: str = "fp32"


def test_an_artefact_goes_from_new_to_finished(tmp_path):
    artefact, key = Artefact(tmp_path / "rows", "rows"), Rows("a")
    assert artefact.state(key) is State.NEW and not artefact.is_finished()
    artefact.begin(key)
    assert artefact.state(key) is State.BEGUN and not artefact.matches(key)
    artefact.finish(key, {"seconds": 3})
    assert artefact.state(key) is State.FINISHED and artefact.matches(key)
    assert artefact.read()["details"] == {"seconds": 3}
    assert not artefact.matches(Rows("b")) and artefact.differs(Rows("b"))


@pytest.mark.parametrize(("key", "match"), [
    (Rows("b"), r"another checkpoint \(digest a, now b\)"),
    (Rows("a", (1, 3)), r"--sizes was \[1, 2\], now it is \[1, 3\]"),
    (Rows("a", batch=BatchConfig(seed=5)), "--seed was 1234, now it is 5"),
])
def test_what_differs_is_named_with_what_to_do(tmp_path, key, match):
    artefact = Artefact(tmp_path / "rows", "rows")
    artefact.finish(Rows("a"))
    with pytest.raises(UserError, match=f"rows made with other settings: {match}. Choose another"):
        artefact.state(key)


def test_a_field_that_an_older_version_did_not_know_counts_as_its_default(tmp_path):
    artefact = Artefact(tmp_path / "rows", "rows")
    artefact.finish(Rows("a"))
    assert artefact.matches(RowsOfALaterVersion("a"))
    with pytest.raises(UserError, match="--precision was fp32, now it is bf16"):
        artefact.state(RowsOfALaterVersion("a", precision="bf16"))


@dataclass(frozen=True)
class Shape:
    width: int
    depth: int = 2


@dataclass(frozen=True)
class ShapeOfALaterVersion(Shape):
    heads: int = 4


@dataclass(frozen=True)
class Weights(Key):
    shape: Shape


@dataclass(frozen=True)
class WeightsOfALaterVersion(Key):
    shape: ShapeOfALaterVersion


def test_so_does_a_field_of_a_group_that_has_to_be_given(tmp_path):
    """As --mtp-detach-heads, among a model's flags: folders from before it are still good."""
    artefact = Artefact(tmp_path / "weights", "weights")
    artefact.finish(Weights(Shape(8)))
    assert artefact.matches(WeightsOfALaterVersion(ShapeOfALaterVersion(8)))
    with pytest.raises(UserError, match="--heads was 4, now it is 8"):
        artefact.state(WeightsOfALaterVersion(ShapeOfALaterVersion(8, heads=8)))
    with pytest.raises(UserError, match="--width was 8, now it is 9"):
        artefact.state(WeightsOfALaterVersion(ShapeOfALaterVersion(9)))


def test_a_digest_is_of_what_is_not_default_and_of_the_kind_of_key():
    @dataclass(frozen=True)
    class Rows(Key):  # the same name, one field more
        checkpoint_digest: str
        sizes: tuple[int, ...] = (1, 2)
        batch: BatchConfig = field(default_factory=BatchConfig)
        precision: str = "fp32"

    here = globals()["Rows"]
    assert here("a").digest() == Rows("a").digest() != Rows("a", precision="bf16").digest()
    digests = {here("a").digest(), here("b").digest(), here("a", (2, 1)).digest(),
               here("a", batch=BatchConfig(seed=5)).digest(), RowsOfALaterVersion("a").digest()}
    assert len(digests) == 5


def test_a_package_that_runs_from_a_path_has_no_known_version(monkeypatch, tmp_path):
    def version(package):
        if package == "megatron-core":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert run_directory.versions()["megatron-core"] == "unknown"
    Artefact(tmp_path / "rows", "rows").finish(Rows("a"))
    written = json.loads((tmp_path / "rows" / "manifest.json").read_text())
    assert written["provenance"]["versions"]["megatron-core"] == "unknown"
