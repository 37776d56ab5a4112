"""Plain text and JSONL into Megatron indexed datasets: pools, a validation set and a test set.

    python tools/preprocess_selection.py --input wiki.jsonl code.jsonl --output-prefix data/mine \\
        --train-tokenizer --vocab-size 32000 --split 98,1,1 --append-eod --workers 8

Each input file is a *domain*, named by its stem, and becomes up to three prefixes:
``data/mine_wiki_pool`` (what is selected from), ``data/mine_wiki_valid``, ``data/mine_wiki_test``.
Documents that are equal, or that share ``--group-key``, always land in the same one of the three.
Beside each prefix stands a card, ``PREFIX.json``: domain, tokenizer, counts.

A ``.jsonl`` file has one JSON object a line; in any other file a document is a run of lines up to
an empty one. The output does not depend on ``--workers``.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_direct import files
from megatron_direct.errors import UserError

SPLITS = ("pool", "valid", "test")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    group = parser.add_argument_group("input data")
    group.add_argument("--input", nargs="+", required=True, type=Path,
                       help="text or JSONL files, one a domain")
    group.add_argument("--json-keys", nargs="+", default=["text"],
                       help="keys of a JSON record whose texts are joined (default: text)")
    group.add_argument("--group-key", help="key of a JSON record; records that share its value "
                                           "are never divided between pool, valid and test")
    group.add_argument("--split", default="100,0,0",
                       help="shares of pool, valid and test (default %(default)s)")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-model", type=Path, required=True,
                       help="SentencePiece model; with --train-tokenizer, where to write it")
    group.add_argument("--train-tokenizer", action="store_true",
                       help="train the SentencePiece model on the pool documents first")
    group.add_argument("--vocab-size", type=int, default=8192,
                       help="entries of a trained model (default %(default)s)")
    group.add_argument("--append-eod", action="store_true",
                       help="end each document with the end-of-document token")
    group = parser.add_argument_group("output data")
    group.add_argument("--output-prefix", required=True,
                       help="path before _DOMAIN_pool, _DOMAIN_valid and _DOMAIN_test")
    group = parser.add_argument_group("runtime")
    group.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    group.add_argument("--seed", type=int, default=1234)
    group = parser.add_argument_group("trials")
    group.add_argument("--corrupt-fraction", type=float, default=0.0,
                       help="share of pool documents whose tokens are shuffled, so that there is "
                            "something to select against; the card lists them")
    return parser


@dataclass
class Document:
    text: str
    group: str
    where: str  # file and line, for messages


def read_documents(path: Path, keys: list[str], group_key: str | None) -> Iterator[Document]:
    if not path.is_file():
        raise UserError(f"{path} does not exist. Correct --input.")
    with open(path, encoding="utf-8") as file:
        yield from (_json_documents(path, file, keys, group_key) if path.suffix == ".jsonl"
                    else _text_documents(path, file))


def _json_documents(path, file, keys, group_key):
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
            text = "\n".join(record[key] for key in keys)
            group = text if group_key is None else str(record[group_key])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            wanted = [*keys, *([group_key] if group_key else [])]
            raise UserError(f"{where} is no JSON object with the keys {', '.join(wanted)} "
                            f"({type(error).__name__}: {error}). Mend the line, or --json-keys."
                            ) from error
        yield Document(text, group, where)


def _text_documents(path, file):
    lines: list[str] = []
    for number, line in enumerate([*file, "\n"], 1):
        if line.strip():
            lines.append(line.rstrip("\n"))
        elif lines:
            text = "\n".join(lines)
            yield Document(text, text, f"{path}:{number - len(lines)}")
            lines = []


def split_of(group: str, shares: tuple[float, ...], seed: int) -> int:
    """Which of SPLITS a group falls into: a hash of it alone, so that equal documents meet."""
    place = _uniform(f"{seed}\x1fsplit\x1f{group}")
    return int(np.searchsorted(np.cumsum(shares)[:-1], place, side="right"))


def _uniform(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def parse_split(text: str) -> tuple[float, ...]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) < 0 or sum(shares) <= 0:
        raise UserError(f"--split {text} is not three numbers such as 90,5,5.")
    return tuple(share / sum(shares) for share in shares)


def train_tokenizer(flags: argparse.Namespace, shares: tuple[float, ...]) -> None:
    import sentencepiece

    texts = (document.text for path in flags.input
             for document in read_documents(path, flags.json_keys, flags.group_key)
             if split_of(document.group, shares, flags.seed) == 0)
    flags.tokenizer_model.parent.mkdir(parents=True, exist_ok=True)
    with files.written_whole(flags.tokenizer_model) as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts, model_writer=model, vocab_size=flags.vocab_size,
            # Text is kept as it is, line ends and indentation included: some of it is code.
            model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=False, user_defined_symbols=["\n"], byte_fallback=True,
            character_coverage=0.9995, input_sentence_size=1_000_000,
            shuffle_input_sentence=False, max_sentence_length=1 << 20, num_threads=1,
            minloglevel=2)


_tokenizer = None


def _start_worker(model: str) -> None:
    import sentencepiece

    global _tokenizer
    _tokenizer = sentencepiece.SentencePieceProcessor(model_file=model)


def _tokenize(append_eod: bool, document: Document) -> tuple[Document, np.ndarray]:
    tokens = _tokenizer.encode(document.text)
    return document, np.array([*tokens, *([_tokenizer.eos_id()] if append_eod and tokens else [])],
                              dtype=np.int32)


def tokenized(documents: Iterator[Document], flags: argparse.Namespace):
    """(document, tokens) in the order of the documents, whatever the number of workers."""
    work = functools.partial(_tokenize, flags.append_eod)
    if flags.workers <= 1:
        _start_worker(str(flags.tokenizer_model))
        yield from map(work, documents)
        return
    with multiprocessing.Pool(flags.workers, _start_worker, (str(flags.tokenizer_model),)) as pool:
        yield from pool.imap(work, documents, chunksize=64)


@dataclass
class PrefixWriter:
    """One indexed dataset; its files take their places when it is finished."""

    prefix: str
    vocab_size: int
    documents: int = 0
    tokens: int = 0
    corrupted: list[int] = field(default_factory=list)

    def __post_init__(self):
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self._partial = f"{self.prefix}.partial"
        self._builder = IndexedDatasetBuilder(
            self._partial + ".bin", dtype=DType.optimal_dtype(self.vocab_size))

    def add(self, tokens: np.ndarray) -> None:
        import torch

        self._builder.add_document(torch.from_numpy(tokens), [len(tokens)])
        self.documents += 1
        self.tokens += len(tokens)

    def finish(self, card: dict) -> None:
        """The card first and the index last: a dataset with an index is whole."""
        self._builder.finalize(self._partial + ".idx")
        files.write_json(self.prefix + ".json", {
            **card, "vocab_size": self.vocab_size, "documents": self.documents,
            "tokens": self.tokens, "corrupted": self.corrupted})
        os.replace(self._partial + ".bin", self.prefix + ".bin")
        os.replace(self._partial + ".idx", self.prefix + ".idx")


def write_domain(path: Path, flags: argparse.Namespace, shares: tuple[float, ...],
                 vocab_size: int, tokenizer_digest: str) -> list[PrefixWriter]:
    writers: dict[int, PrefixWriter] = {}
    too_short = 0
    documents = read_documents(path, flags.json_keys, flags.group_key)
    for document, tokens in tqdm(tokenized(documents, flags), desc=path.stem, unit="document",
                                 disable=None):
        if len(tokens) < 2:
            too_short += 1
            continue
        split = split_of(document.group, shares, flags.seed)
        if split not in writers:
            writers[split] = PrefixWriter(f"{flags.output_prefix}_{path.stem}_{SPLITS[split]}",
                                          vocab_size)
        writer = writers[split]
        if split == 0 and _uniform(f"{flags.seed}\x1fcorrupt\x1f{path.stem}\x1f{writer.documents}"
                                   ) < flags.corrupt_fraction:
            writer.corrupted.append(writer.documents)
            tokens = shuffled(tokens, flags.append_eod, flags.seed, writer.documents)
        writer.add(tokens)
    for split, writer in writers.items():
        writer.finish({"domain": path.stem, "split": SPLITS[split],
                       "tokenizer_digest": tokenizer_digest})
    if too_short:
        print(f"{path}: {too_short} documents of fewer than two tokens left out")
    return list(writers.values())


def shuffled(tokens: np.ndarray, ends_with_eod: bool, seed: int, number: int) -> np.ndarray:
    """The same tokens in a random order; an end-of-document token stays at the end."""
    body = tokens[:-1] if ends_with_eod else tokens
    order = np.random.default_rng([seed, number]).permutation(len(body))
    return np.concatenate([body[order], tokens[len(body):]])


def preprocess(flags: argparse.Namespace) -> None:
    import sentencepiece

    stems = [path.stem for path in flags.input]
    if len(set(stems)) < len(stems):
        raise UserError("two files of --input have one name, and so would be one domain: rename "
                        f"one of {', '.join(sorted(s for s in set(stems) if stems.count(s) > 1))}.")
    shares = parse_split(flags.split)
    if flags.train_tokenizer:
        train_tokenizer(flags, shares)
    if not flags.tokenizer_model.is_file():
        raise UserError(f"{flags.tokenizer_model} does not exist. Correct --tokenizer-model, or "
                        "add --train-tokenizer to make it.")
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(flags.tokenizer_model))
    Path(flags.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    for path in flags.input:
        for writer in write_domain(path, flags, shares, tokenizer.vocab_size(),
                                   files.file_digest(flags.tokenizer_model)):
            print(f"{writer.prefix}: {writer.documents} documents, {writer.tokens} tokens"
                  + (f", {len(writer.corrupted)} corrupted" if writer.corrupted else ""))


def main(arguments: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", module="megatron.core")  # of what is not installed
    try:
        preprocess(make_parser().parse_args(arguments))
    except UserError as error:
        sys.exit(f"preprocess_selection: error: {error}")


if __name__ == "__main__":
    main()
