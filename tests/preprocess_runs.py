"""Runs of preprocessing for tests: by the command, and shards written by hand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_direct.cli.preprocess import main
from megatron_direct.data import indexed
from megatron_direct.preprocessing import catalogue, duplicates, shards
from megatron_direct.preprocessing.catalogue import Catalogue
from megatron_direct.preprocessing.reading import Shard
from megatron_direct.preprocessing.shards import Columns, Manifest

COMMAND = [sys.executable, str(Path(__file__).parents[1] / "tools" / "preprocess_selection.py")]


def flags(inputs: Sequence, prefix: Path, model: Path, *more: str) -> list[str]:
    return ["--input", *map(str, inputs), "--output-prefix", str(prefix), "--tokenizer-model",
            str(model), *more]


def run(inputs: Sequence, prefix: Path, model: Path, *more: str) -> None:
    main(flags(inputs, prefix, model, *more))


def read(prefix: Path | str) -> list[tuple[int, ...]]:
    """The documents of a dataset."""
    dataset = indexed.open_indexed(str(prefix))
    return [tuple(indexed.document_tokens(dataset, d).tolist())
            for d in range(indexed.num_documents(dataset))]


def outputs(prefix: Path) -> dict[str, bytes]:
    """All files of a prefix, by the rest of their names."""
    return {path.name[len(prefix.name):]: path.read_bytes()
            for path in prefix.parent.iterdir() if path.name.startswith(prefix.name + "_")}


def write_shards(folder: Path, documents: Sequence[Sequence[tuple[str, str, np.ndarray]]],
                 eod: int = 0) -> Catalogue:
    """documents: for each shard (domain, split, tokens with their end), one to a line of the input.

    Returns the catalogue; no document is flagged as a duplicate.
    """
    folder.mkdir(exist_ok=True)
    for number, mine in enumerate(documents):
        parts: dict[tuple[str, str], Columns] = {}
        for line, (domain, split, tokens) in enumerate(mine):
            columns = parts.setdefault((domain, split), Columns())
            columns.tokens.append(tokens)
            columns.lines.append(line)
            columns.hashes.append(shards.document_hash(tokens.astype(np.int32), frozenset({eod})))
        written = shards.write_parts(folder, Shard(Path("in.jsonl"), 0, number, 0, 0), parts)
        shards.write_manifest(folder, Manifest(
            path="in.jsonl", file=0, shard=number, lines=len(mine), is_last=False, too_short=0,
            bad=[], dtype=mine[0][2].dtype.name, parts=written))
    contents = catalogue.build_catalogue(folder, str(folder / "out"))
    (folder / duplicates.FLAGS).write_bytes(bytes(contents.documents))
    return contents
