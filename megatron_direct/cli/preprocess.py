"""The command ``megatron-direct preprocess``: text into indexed datasets.

Nothing here imports megatron, and torch is imported only where there are several ranks, so that it
starts at once.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_direct.cli.flags import as_declared
from megatron_direct.errors import UserError
from megatron_direct.preprocessing.pipeline import preprocess
from megatron_direct.preprocessing.settings import SAMPLES, PreprocessSettings
from megatron_direct.preprocessing.shares import Ranks
from megatron_direct.preprocessing.splits import SPLITS
from megatron_direct.runtime import files, stopping
from megatron_direct.runtime.ranks import Rank, discover

PROG = "megatron-direct preprocess"
# A rank waits for one that has more to do; one that has died is noticed by its closed connection.
_LONGEST_MINUTES = 30 * 24 * 60


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Its flags are the attributes of PreprocessSettings, whose defaults it takes."""
    parser = argparse.ArgumentParser(
        prog=prog, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Turns text into Megatron indexed datasets: for each domain a pool, a "
                    "validation set and a test set.")
    default = {name: field.default for name, field in
               PreprocessSettings.__dataclass_fields__.items()}
    group = parser.add_argument_group("input")
    group.add_argument("--input", nargs="+", required=True, type=Path, metavar="FILE",
                       help="JSONL, Parquet or plain text; JSONL and text also as .gz or .zst")
    group.add_argument("--json-keys", nargs="+", metavar="KEY",
                       help="keys of a record whose texts are joined by line breaks; here and "
                            "below a key may be dotted, such as meta.title (default: text)")
    group.add_argument("--skip-bad-lines", action="store_true",
                       help="leave out lines that are not valid records, and list them in "
                            "OUTPUT_PREFIX_bad_lines.txt; without it the first one is an error")
    domain = group.add_mutually_exclusive_group()
    domain.add_argument("--domain", help="one domain for all files (default: each file's stem)")
    domain.add_argument("--domain-key", metavar="KEY", help="key of a record that names its "
                                                            "domain, such as meta.pile_set_name")
    group.add_argument("--split", metavar="SHARES",
                       help=f"shares of {', '.join(SPLITS)} (default {default['split']})")
    group.add_argument("--group-key", metavar="KEY",
                       help="key of a record; records with the same value are never divided "
                            "between pool, valid and test, nor, when scores are judged, "
                            "between halves of the validation set")
    group = parser.add_argument_group("duplicates")
    group.add_argument("--exclude", nargs="+", metavar="PREFIX",
                       help="indexed datasets, such as an earlier validation set, that the output "
                            "must share no document with")
    group.add_argument("--drop-duplicates", action="store_true",
                       help="keep one of equal documents: that of --exclude, test, valid or pool, "
                            "in this order; without it copies are counted, and a document that is "
                            "also held out is an error")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-model", type=Path, required=True, metavar="PATH",
                       help="a SentencePiece model, a Hugging Face tokenizer.json, or the folder "
                            "of one; with --train-tokenizer the file to write")
    group.add_argument("--train-tokenizer", action="store_true",
                       help="first train a SentencePiece model on the pool documents")
    group.add_argument("--vocab-size", type=int,
                       help=f"entries of a trained model (default {default['vocab_size']})")
    group.add_argument("--append-eod", action="store_true",
                       help="add the end-of-document token to the end of each document")
    group.add_argument("--eod-token", metavar="TOKEN",
                       help="that token (default: the end-of-sentence token of the model)")
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", required=True, metavar="PREFIX",
                       help="path before _DOMAIN_pool, _DOMAIN_valid and _DOMAIN_test")
    group.add_argument("--samples", choices=SAMPLES,
                       help="candidates for selection: the documents as they are, or the documents "
                            "of a dataset joined and cut into training sequences (default "
                            f"{default['samples']})")
    group.add_argument("--seq-length", type=int,
                       help="tokens of a window: the sequence length of the model")
    group = parser.add_argument_group("runtime")
    group.add_argument("--workers", type=int,
                       help=f"processes per rank (default {default['workers']})")
    group.add_argument("--shard-size", type=float, metavar="MIB",
                       help="text that a worker tokenizes at a time, and loses when it is killed "
                            f"(default {default['shard_size']:g}: some seconds of work)")
    group.add_argument("--seed", type=int,
                       help="seed of the splits and of what is corrupted (default "
                            f"{default['seed']})")
    group = parser.add_argument_group("trials")
    group.add_argument("--corrupt-fraction", type=float,
                       help="share of pool candidates whose tokens are shuffled, so that there is "
                            "something to select against; the card lists them (default 0)")
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> None:
    """Runs the command. Exits with the message of an error that the user can correct."""
    flags: dict[str, Any] = {
        name: as_declared(value)
        for name, value in vars(make_parser(prog).parse_args(arguments)).items()}
    try:
        settings, here = PreprocessSettings(**flags), discover()
        if here.world_size == 1:
            with stopping.signals_noted():
                _preprocess(settings, here)
            return
    except stopping.Stopped as stopped:
        print(f"{prog}: {stopped}", file=sys.stderr, flush=True)
        sys.exit(stopped.exit_code)
    except OSError as error:
        if not files.is_of_disk(error):
            raise
        path = error.filename or flags["output_prefix"]
        sys.exit(f"{prog}: error: {files.cannot_use(path, error)}")
    except UserError as error:
        sys.exit(f"{prog}: error: {error}")
    from megatron_direct.cli import outcome
    from megatron_direct.runtime import parallel

    sys.exit(outcome.exit_status(lambda: _preprocess(settings, here),
                                 parallel.process_group(_LONGEST_MINUTES, "gloo"), prog))


def _preprocess(settings: PreprocessSettings, here: Rank) -> None:
    with stopping.interruptible():
        preprocess(settings, Ranks(here))
