"""Pre-training, selection with a pilot, and evaluation in bfloat16, by the commands, on two ranks.

Truth: the same selection and scores in float32, from the same weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from indexed_files import write_dataset
from ranks import run_on_ranks

from megatron_direct.cli import main as cli
from megatron_direct.data.mask import SampleMask
from megatron_direct.preprocessing import tokenizer

WORDS = ("the a sky grass sea is was looks blue green red deep far in on under day night when it "
         "rains we walk home slowly").split()
VOCAB_SIZE, NUM_SELECT, NUM_QUESTIONS = 296, 20, 12
_MODEL = ("--num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 "
          "--seq-length 48 --make-vocab-size-divisible-by 32").split()
_BATCH = "--micro-batch-size 4 --global-batch-size 8".split()


def _text(rng: np.random.Generator, words: list[str], count: int) -> str:
    return " ".join(rng.choice(words, count))


def _call(*arguments) -> None:
    cli.call(cli.make_parser().parse_args(list(map(str, arguments))))


def _pretrain(folder: Path) -> None:
    _call("pretrain", "--bf16", "--data-path", folder / "pool", "--save", folder / "theta",
          "--vocab-size", VOCAB_SIZE, "--train-iters", 12, "--save-interval", 12, "--lr", "1e-2",
          *_MODEL, *_BATCH)


def _select_and_evaluate(folder: Path, name: str, *precision: str) -> None:
    """Without a flag the precision is that of the checkpoint."""
    _call("select", "--load", folder / "theta", "--data-path", folder / "pool",
          "--valid-data-path", folder / "valid", "--run-dir", folder / name, "--pilot-iters", 3,
          "--sketch-size", 256, "--num-select", NUM_SELECT, "--no-draw-unstable",
          "--num-eigenpairs", 6, *_BATCH[:2], *precision)
    _call("evaluate", "--load", folder / "theta", "--tasks", folder / "questions.jsonl",
          "--tokenizer-model", folder / "tokenizer.model", "--output", folder / f"{name}.json",
          *precision)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A quarter of the pool has the words of the validation set."""
    folder = tmp_path_factory.mktemp("bf16")
    rng = np.random.default_rng(0)
    tokenizer.train_model(folder / "tokenizer.model",
                          iter(_text(rng, WORDS, 9) for _ in range(200)), VOCAB_SIZE)
    tokens = tokenizer.load_tokenizer(folder / "tokenizer.model", None, False)
    for name, count in (("pool", 80), ("valid", 24)):
        texts = [_text(rng, WORDS[:9] if name == "valid" or number % 4 == 0 else WORDS[9:], 14)
                 for number in range(count)]
        write_dataset(folder / name, [[row.tolist()] for row in tokens.encode(texts)])
    (folder / "questions.jsonl").write_text("".join(json.dumps({
        "context": _text(rng, WORDS, 4), "answer": number % 2,
        "choices": [_text(rng, WORDS, 2) for _ in range(3)]}) + "\n"
        for number in range(NUM_QUESTIONS)))
    run_on_ranks(2, _pretrain, folder)
    run_on_ranks(2, _select_and_evaluate, folder, "bf16")
    run_on_ranks(1, _select_and_evaluate, folder, "fp32", "--no-bf16")
    return folder


def _kept(folder: Path, name: str) -> np.ndarray:
    masks = folder / name / "selections" / "direct" / "masks"
    return SampleMask.load(masks / "pool.mask.npz").keep


def test_a_selection_with_a_pilot_is_nearly_that_of_float32(folder):
    assert json.loads((folder / "bf16" / "pilot" / "manifest.json").read_text())["key"]["bf16"]
    kept = _kept(folder, "bf16")
    assert kept.sum() == NUM_SELECT
    # Those next to the margin may change places; by chance the two would share a quarter.
    assert (kept & _kept(folder, "fp32")).sum() >= 0.8 * NUM_SELECT


def test_scores_are_those_of_float32_to_rounding(folder):
    in_bf16, exact = (json.loads((folder / f"{name}.json").read_text())
                      for name in ("bf16", "fp32"))
    assert (in_bf16["precision"]["bf16"], exact["precision"]["bf16"]) == (True, False)
    found, expected = (np.array([question["log_likelihood"] for question in
                                 output["tasks"]["questions"]["questions"]])
                       for output in (in_bf16, exact))
    # Eight bits: 0.4 % a rounding, and 0.1 % in what was measured of these sums.
    np.testing.assert_allclose(found, expected, rtol=0.01)
    assert not np.array_equal(found, expected)
