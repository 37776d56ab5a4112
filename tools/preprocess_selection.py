"""Text into Megatron indexed datasets: pools, a validation set and a test set.

    python tools/preprocess_selection.py --input wiki.jsonl.zst code.parquet --append-eod \\
        --tokenizer-model tokenizer.model --split 98,1,1 --output-prefix data/mine --workers 8
    mpirun -n 64 python tools/preprocess_selection.py ... --workers 32      # over many machines

The same as ``megatron-direct preprocess``. Each input file is a *domain*, named by its stem (or
see --domain, --domain-key), and becomes up to three datasets: ``data/mine_wiki_pool`` (from which
samples are selected), ``data/mine_wiki_valid`` and ``data/mine_wiki_test``. Documents whose
texts are equal, or that share ``--group-key``, go to the same one of the three. Beside each is its
card, ``PREFIX.json``: domain, tokenizer, counts.

Input is JSONL (.jsonl, .jsonlines, .json, .ndjson: one object to a line), Parquet (.parquet), or
any other text, in which an empty line ends a document; text and JSONL also as .gz and .zst. The
output does not depend on the number of workers or ranks. A killed run is resumed by the same
command: finished shards are kept in ``data/mine.shards``. See docs/data.md.
"""

from __future__ import annotations

from megatron_direct.cli.preprocess import main

if __name__ == "__main__":
    main(prog="preprocess_selection")
