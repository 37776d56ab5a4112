"""Every reader of a file that this package has, with sound files for it and a call that reads one.

A reader's call reads all that a command would, so that what passes it has been used, too. It
returns, or raises UserError that names the file.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.comparison.earlier_calls import SmallerModel
from megatron_direct.data import blend_files, indexed
from megatron_direct.data.cards import Card, corrupted_documents, read_card
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.samples import Samples
from megatron_direct.data.sources import read_sources
from megatron_direct.evaluation import questions
from megatron_direct.gradients.store import SketchStore
from megatron_direct.mcore import training_folder
from megatron_direct.preprocessing import documents, reading, shard_folder, tokenizer, windows
from megatron_direct.preprocessing.documents import Fields
from megatron_direct.runtime import arrays
from megatron_direct.runtime.manifest import Artefact, Key
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.runtime.typed_json import read_record
from megatron_direct.steps.annealed import ArmResult

VOCAB_SIZE = 60


@dataclass(frozen=True)
class Reader:
    """file: the name of what is damaged; sound: its contents; beside: files that stay sound;
    read(folder): reads it; unpacks: whether the file is compressed, so that what it holds may be
    larger than it is."""

    name: str
    file: str
    sound: tuple[bytes, ...]
    read: Callable[[Path], object]
    beside: dict[str, bytes] = dataclasses.field(default_factory=dict)
    unpacks: bool = False
    pieces: tuple[bytes, ...] = ()  # others of the kind, which do not fit what is beside


@dataclass(frozen=True)
class _Settings(Key):
    """A key, as artefacts have one."""

    checkpoint_digest: str = "d"
    sketch_size: int = 8


def all_readers() -> list[Reader]:
    index, tokens = _dataset()
    return [
        Reader("index", "a.idx", (index,), _read_dataset, {"a.bin": tokens},
               pieces=(_dataset(5)[0],)),
        Reader("tokens", "a.bin", (tokens,), _read_dataset, {"a.idx": index},
               pieces=(_dataset(5)[1],)),
        Reader("card", "a.json", tuple(json.dumps(card).encode() for card in _cards()),
               lambda folder: (read_card(str(folder / "a")),
                               corrupted_documents(str(folder / "a"), 3))),
        Reader("mask", "a.mask.npz", tuple(_masks()),
               lambda folder: SampleMask.load(folder / "a.mask.npz").keep, unpacks=True),
        Reader("sources of documents", "a.sources.npy", (_npy([3, 3, 5]), _npy([12, 0, 7])),
               lambda folder: read_sources(str(folder / "a"), 3)),
        Reader("lengths of documents", "a.documents.npy", (_npy([3, 4, 5]), _npy([12])),
               lambda folder: windows.read_lengths(str(folder / "a"), {"tokens": 12})),
        Reader("arrays of a run", "a.npz", (_npz(), _npz(9)), lambda folder: arrays.read_named(
            folder / "a.npz", ("values", "rank"), arrays.MAKE_AGAIN)),
        Reader("manifest", "manifest.json", (_manifest(),), _read_manifest),
        Reader("run record", "run.json", (json.dumps({
            "format": 2, "commands": [{"command": "select", "flags": {}, "provenance": {
                "versions": {"megatron-direct": "0.2.0"}}}]}).encode(),),
            lambda folder: RunDirectory(folder).record()),
        Reader("stops of a training", "stops.json", (b"[\n  50,\n  73\n]\n",),
               training_folder._stops),
        Reader("smaller model", "proxy.json", (
            b'{"load": "small", "checkpoint_digest": "d"}',), lambda folder: read_record(
                SmallerModel, folder / "proxy.json")),
        Reader("result of an arm", "result.json", (_result(),), ArmResult.read),
        Reader("rows", "rows-0.f32", (_store()[0],), _read_store, _store()[2] | {
            "entries-0.bin": _store()[1]}),
        Reader("entries of rows", "entries-0.bin", (_store()[1],), _read_store, _store()[2] | {
            "rows-0.f32": _store()[0]}),
        Reader("numbers of datasets", "datasets.json", (_store()[2]["datasets.json"],),
               _read_store, {"rows-0.f32": _store()[0], "entries-0.bin": _store()[1]}),
        Reader("task", "task.jsonl", tuple(_tasks()),
               lambda folder: questions.read_questions(folder / "task.jsonl")),
        Reader("JSONL", "a.jsonl", tuple(_jsonl()), _read_text("a.jsonl")),
        Reader("JSONL in gzip", "a.jsonl.gz", tuple(map(gzip.compress, _jsonl())),
               _read_text("a.jsonl.gz"), unpacks=True),
        Reader("JSONL in Zstandard", "a.jsonl.zst", tuple(map(_zstd, _jsonl())),
               _read_text("a.jsonl.zst"), unpacks=True),
        Reader("text", "a.txt", (b"One line\nand more.\n\nAnother.\n", "\ufeffMärz\n\n".encode()),
               _read_text("a.txt")),
        Reader("Parquet", "a.parquet", (_parquet(), _parquet(9)), _read_text("a.parquet"),
               unpacks=True),
        Reader("Hugging Face tokenizer", "tokenizer.json", (_hugging_face(),), _read_tokenizer(
            "tokenizer.json"), {"tokenizer_config.json": b'{"eos_token": "<e>"}'}),
        Reader("tokenizer's settings", "tokenizer_config.json", (
            b'{"eos_token": "<e>"}', b'{"eos_token": {"content": "<e>"}}'),
            _read_tokenizer("tokenizer.json"), {"tokenizer.json": _hugging_face()}),
        Reader("SentencePiece model", "tokenizer.model", (_sentencepiece(),),
               _read_tokenizer("tokenizer.model")),
        Reader("blend", "blend", (b"0.3 a 0.7 b\n", b"a b c"),
               lambda folder: blend_files.read_data_args(str(folder / "blend"))),
        Reader("blend by split", "splits.json", (
            b'{"train": "0.3 a 0.7 b", "valid": ["c"], "test": null}',),
            lambda folder: blend_files.read_per_split_data_args(str(folder / "splits.json"))),
        Reader("plan of shards", "plan.json", (b'{"version": "0.2.0", "tokenizer": {"digest": '
                                               b'"d", "eod": 1}, "seed": 1}',),
               lambda folder: shard_folder.tokenizer_digest(folder)),
    ]


def _dataset(count: int = 3) -> tuple[bytes, bytes]:
    """(.idx, .bin) of documents with a few tokens each, of which one has two sequences."""
    lengths = np.array([2, 3, *range(1, count)], np.int32)
    offsets = (np.cumsum(lengths.astype(np.int64)) - lengths) * 2
    boundaries = np.array([0, 2, *range(3, len(lengths) + 1)], np.int64)
    tokens = np.random.default_rng(count).integers(0, VOCAB_SIZE, lengths.sum(), np.uint16)
    header = indexed._HEADER.pack(indexed._MAGIC, 1, 8, len(lengths), len(boundaries))
    return header + lengths.tobytes() + offsets.tobytes() + boundaries.tobytes(), tokens.tobytes()


def _read_dataset(folder: Path) -> None:
    for known in (indexed._SOUND, indexed._DIGESTS):  # two files may be written within one tick
        known.clear()
    samples = Samples([str(folder / "a")], 8, VOCAB_SIZE)
    for sample in samples.usable:
        samples.tokens(int(sample))
    for document in range(indexed.num_documents(samples.datasets[0])):
        indexed.document_tokens(samples.datasets[0], document)


def _cards() -> list[dict]:
    plain = Card(tokenizer_digest="d", vocab_size=60, domain="web", split="pool", documents=3,
                 tokens=12, corrupted=[0, 2])
    cut = dataclasses.replace(plain, samples="window", seq_length=4, tokens_cut=1, rest=[5])
    return [plain.as_json(), cut.as_json()]


def _masks() -> list[bytes]:
    found = []
    for count in (3, 900):
        mask = SampleMask(np.arange(count) % 3 != 1, "a digest", "a run")
        found.append(_written(lambda path, mask=mask: mask.save(path), "m.mask.npz"))
    return found


def _written(write: Callable[[Path], object], name: str) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()


def _npy(values: list[int]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(values, "<i4"))
    return file.getvalue()


def _npz(count: int = 4) -> bytes:
    file = io.BytesIO()
    np.savez(file, values=np.arange(count * 2.0).reshape(count, 2), rank=count)
    return file.getvalue()


def _manifest() -> bytes:
    return json.dumps({"what": "sketches", "finished": True, "key": _Settings().plain(),
                       "digest": _Settings().digest(), "provenance": {}, "details": {}}).encode()


def _read_manifest(folder: Path) -> None:
    artefact = Artefact(folder, "sketches")
    artefact.state(_Settings())
    artefact.matches(_Settings())


def _result() -> bytes:
    losses = {"valid": {"all": 1.5}, "test": {}}
    return json.dumps({"arm": "direct", "before": losses, "after": losses, "tokens": 9, "blend": [
        {"prefix": "a", "documents": 1, "tokens": 9, "weight": 1.0, "epochs": 1.0,
         "masked": True}]}).encode()


def _store() -> tuple[bytes, bytes, dict[str, bytes]]:
    """(rows, entries, the other files)"""
    import tempfile

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store = SketchStore(Path(folder), 8)
        store.number_datasets(["d", "e"])
        writer = store.writer(0)
        writer.append(rng.normal(size=(5, 8)), np.array([0, 0, 1, 1, 1]), np.arange(5),
                      rng.normal(size=5))
        writer.close()
        found = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return found.pop("rows-0.f32"), found.pop("entries-0.bin"), found


def _read_store(folder: Path) -> None:
    store = SketchStore(folder, 8)
    store.datasets()
    entries = store.entries()
    store.read(entries, np.arange(len(entries)))


def _tasks() -> list[bytes]:
    records = [
        {"context": "It is", "choices": ["hot", "cold"], "answer": 0},
        {"question": "Of what colour?", "choices": {"text": ["a", "b"], "label": ["A", "B"]},
         "answerKey": "B"},
        {"question": {"stem": "What?", "choices": [{"text": "a", "label": "1"},
                                                   {"text": "b", "label": "2"}]}, "answerKey": "1"},
        {"question": "Q", "correct_answer": "a", "distractor1": "b", "distractor2": "c",
         "distractor3": "d", "support": "s"},
        {"ctx": "[header] A [title] b", "endings": ["c", "d"], "label": "1"}]
    return [json.dumps(record).encode() + b"\n" for record in records]


def _jsonl() -> list[bytes]:
    return [b'{"text": "The river rose.", "book": "one"}\n{"text": "It fell.", "book": 2}\n',
            b'\xef\xbb\xbf{"text": "Emoji \\ud83d\\ude00", "book": "x"}\r\n\n']


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def _parquet(count: int = 3) -> bytes:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [f"row {n}" for n in range(count)],
                           "book": [str(n % 2) for n in range(count)]})
    return _written(lambda path: pyarrow.parquet.write_table(table, path, row_group_size=4), "p")


def _read_text(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        fields = Fields(group="book") if name != "a.txt" else Fields()
        for unit in reading.plan([folder / name], 20):
            for shard in reading.shards_of(unit, 20):
                for _ in documents.checked(shard, fields, skip_bad_lines=False):
                    pass
                reading.num_lines(shard)

    return read


def _hugging_face() -> bytes:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.train_from_iterator(["the river rose and fell"], tokenizers.trainers.BpeTrainer(
        vocab_size=40, special_tokens=["<e>"], show_progress=False))
    return made.to_str().encode()


def _sentencepiece() -> bytes:
    texts = [f"On day {n} the boats came with {3 * n} crates." for n in range(60)]
    return _written(lambda path: tokenizer.train_model(path, iter(texts), 320), "m.model")


def _read_tokenizer(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        found = tokenizer.load_tokenizer(folder / name, None, append_eod=True)
        for ids in found.encode(["The river rose.", ""]):
            found.decode(ids)
        tokenizer.end_tokens(found)

    return read


def place(reader: Reader, folder: Path) -> None:
    """The sound files beside the damaged one."""
    for name, data in reader.beside.items():
        (folder / name).write_bytes(data)


def overwrite(path: Path, data: bytes) -> None:
    """Faster than a new file each time; a map of the old one keeps what it has."""
    if path.exists():
        os.unlink(path)
    with open(path, "wb", buffering=0) as file:
        file.write(data)
