"""One text, its tokenizer, and what preprocessing makes of it, for all tests of this folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import preprocess_runs
import pytest

WORDS = "the onset of annealing is where the learning rate begins to fall towards zero".split()
CHANGES = ("--split", "80,10,10", "--corrupt-fraction", "0.3", "--drop-duplicates")


@dataclass(frozen=True)
class Text:
    """Two domains: JSONL records, two to a file of theirs, and plain text with equal documents."""

    folder: Path
    notes: Path
    plain: Path
    model: Path

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.notes.read_text().splitlines()]

    @property
    def tokenizer(self):
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=str(self.model))

    def flags(self, prefix: Path, *more, inputs=None) -> list[str]:
        return preprocess_runs.flags(inputs or (self.notes, self.plain), prefix, self.model,
                                     "--append-eod", *more)

    def run(self, prefix: Path, *more, inputs=None) -> None:
        preprocess_runs.main(self.flags(prefix, *more, inputs=inputs))

    def texts(self, prefix: Path | str) -> list[str]:
        """The texts of a dataset, whose documents have an end."""
        return [self.tokenizer.decode(list(document[:-1]))
                for document in preprocess_runs.read(prefix)]


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Text:
    folder = tmp_path_factory.mktemp("text")
    made = Text(folder, folder / "notes.jsonl", folder / "plain.txt", folder / "tokenizer.model")
    rng = np.random.default_rng(0)

    def sentence():
        return " ".join(rng.choice(WORDS, 12)) + "\n    indented"

    with open(made.notes, "w") as file:
        for number in range(300):
            file.write(json.dumps({"text": sentence(), "file": f"f{number // 2}",
                                   "meta": {"set": ["Web", "C++ / code"][number % 2]}}) + "\n")
    plain = [sentence().replace("\n", " ") for _ in range(60)]
    made.plain.write_text("\n\n".join([*plain, *plain[:20], ""]))
    made.run(folder / "first", "--train-tokenizer", "--vocab-size", "330")
    return made


@pytest.fixture(scope="session")
def reference(text, tmp_path_factory) -> dict[str, bytes]:
    """What the flags of CHANGES make of the text, by one process."""
    prefix = tmp_path_factory.mktemp("reference") / "x"
    text.run(prefix, *CHANGES)
    files = preprocess_runs.outputs(prefix)
    assert len(files) == 18  # two domains, three splits, .bin .idx .json
    return files


@pytest.fixture
def changes() -> tuple[str, ...]:
    return CHANGES
