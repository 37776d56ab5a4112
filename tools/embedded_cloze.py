"""Cloze questions from test sets: which of four continuations belongs to this passage?

    python tools/embedded_cloze.py --data-path build/data/embedded_source_test \\
        --tokenizer-model build/data/tokenizer.model --output-dir build/cloze

writes ``build/cloze/embedded_source_test.jsonl``, one file per dataset. A question is made from a
passage of the test set: its beginning is the context, and the choices are its continuation and
those of three other passages of the same test set from the same place. The text is decoded from
the indexed dataset, so a question is on held-out text if the dataset is held out. Everything is
drawn by a hash of seed and text, so one dataset always gives the same questions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_direct.data import indexed
from megatron_direct.data.cards import read_card
from megatron_direct.errors import UserError
from megatron_direct.runtime import digests, files

NUM_CHOICES = 4
# Many docstrings are short, and longer contexts would leave too few of them.
CONTEXT_CHARACTERS = 120
# A word or two. The likelihoods of long texts themselves differ more than how well they fit: with
# 60 characters the embedded checkpoint was at chance.
CHOICE_CHARACTERS = 8


def passages(prefix: str, model) -> list[str]:
    """The dataset's documents as text, each once. Raises UserError if it is not a test set."""
    card = read_card(prefix)
    if card.get("split") != "test":
        raise UserError(f"{prefix} is {card.get('split', 'no split known')}, not a test set: "
                        "questions out of text that was trained on show nothing. Correct "
                        "--data-path.")
    dataset = indexed.open_indexed(prefix)
    texts = (model.decode(indexed.document_tokens(dataset, number).tolist())
             for number in range(indexed.num_documents(dataset)))
    return list(dict.fromkeys(texts))


def cut(text: str) -> tuple[str, str] | None:
    """(context, continuation), split at one space between words; None if the text is too short."""
    place = text.find(" ", CONTEXT_CHARACTERS)
    while place >= 0 and (text[place - 1].isspace() or text[place + 1: place + 2].isspace()):
        place = text.find(" ", place + 1)
    end = text.find(" ", place + 1 + CHOICE_CHARACTERS)
    if place < 0 or end < 0:
        return None
    return text[:place], text[place + 1: end].rstrip()


def questions(texts: Sequence[str], seed: int) -> list[dict]:
    """Records with context, choices and answer, in the order of the texts."""
    parts = [part for part in map(cut, texts) if part is not None]
    continuations = list(dict.fromkeys(continuation for _, continuation in parts))
    if len(continuations) < NUM_CHOICES:
        return []
    made = []
    for context, continuation in parts:
        def draw(text: str, context=context) -> str:
            return digests.digest(str(seed), context, text)

        others = sorted((c for c in continuations if c != continuation), key=draw)
        choices = sorted([continuation, *others[: NUM_CHOICES - 1]], key=lambda c: draw(c + "\n"))
        made.append({"context": context, "choices": choices,
                     "answer": choices.index(continuation)})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data-path", required=True, nargs="+",
                        help="test sets: prefixes of indexed datasets")
    parser.add_argument("--tokenizer-model", required=True, help="their SentencePiece model")
    parser.add_argument("--output-dir", required=True, type=Path)
    parser.add_argument("--seed", type=int, default=1234,
                        help="of distractors and of the order of choices (default %(default)s)")
    flags = parser.parse_args()
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=flags.tokenizer_model)
    try:
        for prefix, name in indexed.prefix_names(flags.data_path).items():
            texts = passages(prefix, model)
            records = questions(texts, flags.seed)
            with files.written_whole(flags.output_dir / f"{name}.jsonl", "w") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
            print(f"{name}: {len(records)} questions from {len(texts)} passages")
    except UserError as error:
        sys.exit(f"embedded_cloze: error: {error}")


if __name__ == "__main__":
    main()
