"""Text into Megatron indexed datasets: pools, a validation set and a test set.

    python tools/preprocess_selection.py --input wiki.jsonl.zst code.parquet --append-eod \\
        --tokenizer-model tokenizer.model --split 98,1,1 --output-prefix data/mine --workers 8
    mpirun -n 64 python tools/preprocess_selection.py ... --workers 32      # over many machines

Each input file is a *domain*, named by its stem (or see --domain, --domain-key), and becomes up to
three prefixes: ``data/mine_wiki_pool`` (what is selected from), ``data/mine_wiki_valid`` and
``data/mine_wiki_test``. Documents that are equal, or that share ``--group-key``, land in the same
one of the three. Beside each prefix stands a card, ``PREFIX.json``: domain, tokenizer, counts.

Input is JSONL (.jsonl, .json, .ndjson: an object a line), Parquet (.parquet), or any other text, in
which a document is a run of lines up to an empty one; text and JSONL also as .gz and .zst. The
output does not depend on the number of workers or ranks. A run that was killed is carried on by the
same command: finished shards wait in ``data/mine.shards``. See docs/data.md.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from pathlib import Path

from megatron_direct.errors import UserError
from megatron_direct.preprocessing.pipeline import preprocess
from megatron_direct.preprocessing.processes import Ranks
from megatron_direct.preprocessing.splits import SPLITS


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    group = parser.add_argument_group("input data")
    group.add_argument("--input", nargs="+", required=True, type=Path, help="the files")
    group.add_argument("--json-keys", nargs="+", default=["text"],
                       help="keys of a record whose texts are joined by line ends; here and below "
                            "a key may be dotted, such as meta.title (default: text)")
    group.add_argument("--skip-bad-lines", action="store_true",
                       help="leave out lines that are no records, and list them in "
                            "OUTPUT_PREFIX_bad_lines.txt; without it the first one is an error")
    domain = group.add_mutually_exclusive_group()
    domain.add_argument("--domain", help="the one domain of all files (default: each its stem)")
    domain.add_argument("--domain-key", help="key of a record that names its domain, such as "
                                             "meta.pile_set_name")
    group.add_argument("--split", default="100,0,0",
                       help=f"shares of {', '.join(SPLITS)} (default %(default)s)")
    group.add_argument("--group-key", help="key of a record; records that share its value are "
                                           "never divided between pool, valid and test")
    group = parser.add_argument_group("duplicates")
    group.add_argument("--exclude", nargs="+", default=[], metavar="PREFIX",
                       help="indexed datasets, such as a validation set made before, that the "
                            "output must share no document with")
    group.add_argument("--drop-duplicates", action="store_true",
                       help="of equal documents keep one: that of --exclude, test, valid or pool, "
                            "in this order; without it copies are counted, and a document that is "
                            "also held out is an error")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-model", type=Path, required=True,
                       help="SentencePiece model, or a Hugging Face tokenizer.json or its folder; "
                            "with --train-tokenizer, where to write a SentencePiece model")
    group.add_argument("--train-tokenizer", action="store_true",
                       help="train the SentencePiece model on the pool documents first")
    group.add_argument("--vocab-size", type=int, default=8192,
                       help="entries of a trained model (default %(default)s)")
    group.add_argument("--append-eod", action="store_true",
                       help="end each document with the end-of-document token")
    group.add_argument("--eod-token", help="that token (default: the model's end of a sentence)")
    group = parser.add_argument_group("output data")
    group.add_argument("--output-prefix", required=True,
                       help="path before _DOMAIN_pool, _DOMAIN_valid and _DOMAIN_test")
    group.add_argument("--samples", choices=["document", "window"], default="document",
                       help="candidates: the documents as they are, or all of a prefix joined and "
                            "cut into training sequences (default %(default)s)")
    group.add_argument("--seq-length", type=int, help="tokens of a window: the model's")
    group = parser.add_argument_group("runtime")
    group.add_argument("--workers", type=int, default=1, help="processes that tokenize, of a rank")
    group.add_argument("--shard-size", type=float, default=16, metavar="MIB",
                       help="text that a worker tokenizes at a time, and may lose when it is "
                            "killed (default %(default)s: some seconds of work)")
    group.add_argument("--seed", type=int, default=1234)
    group = parser.add_argument_group("trials")
    group.add_argument("--corrupt-fraction", type=float, default=0.0,
                       help="share of pool candidates whose tokens are shuffled, so that there is "
                            "something to select against; the card lists them")
    return parser


def main(arguments: list[str] | None = None) -> None:
    warnings.filterwarnings("ignore", module="megatron.core")  # of what is not installed
    flags, ranks = make_parser().parse_args(arguments), None
    try:
        ranks = Ranks()
        preprocess(flags, ranks)
    except UserError as error:
        message = f"preprocess_selection: error: {error}"
        if ranks is not None and ranks.count > 1:
            print(message, file=sys.stderr, flush=True)
            ranks.stop_all()
        sys.exit(message)
    except Exception:
        if ranks is not None and ranks.count > 1:
            traceback.print_exc()
            ranks.stop_all()
        raise


if __name__ == "__main__":
    main()
