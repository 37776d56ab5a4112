"""Choices as samples: tokens of a question with one of its choices, of which the choice's count."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_direct.data.samples import SampleSource
from megatron_direct.errors import UserError
from megatron_direct.evaluation.questions import Question


@dataclass(frozen=True)
class EncodedChoice:
    """tokens: of context and choice, at most the sequence length + 1, cut from the left.

    num_scored: the last so many of them are the choice's. is_cut: tokens of the context were left
    out. is_merged: the first of the choice's tokens holds the end of the context too.
    """

    tokens: np.ndarray
    num_scored: int
    is_cut: bool
    is_merged: bool


def encode(questions: Iterable[Question], tokenizer, seq_length: int, file: str,
           ) -> list[list[EncodedChoice]]:
    """The choices of each question; tokenizer: as preprocessing.tokenizer.load gives it.

    The context is tokenized alone and with each choice. The choice's tokens are those from the
    first on in which the two differ: mostly, all behind the context's. Where a tokenizer merges
    the end of the context with the beginning of the choice into one token, that token is the
    choice's, so that none of the choice goes unscored and the text keeps the tokens it would have
    in training; the likelihood is then one of a few characters of the context too.
    """
    return [_encode(question, tokenizer, seq_length, file) for question in questions]


def _encode(question: Question, tokenizer, seq_length: int, file: str) -> list[EncodedChoice]:
    texts = [question.with_choice(number) for number in range(len(question.choices))]
    context, *wholes = tokenizer.encode([question.context, *texts])
    return [_cut(context, whole, seq_length, f"{file}:{question.line}: choice {number}")
            for number, whole in enumerate(wholes)]


def _cut(context: np.ndarray, whole: np.ndarray, seq_length: int, where: str) -> EncodedChoice:
    shorter = min(len(context), len(whole))
    differ = np.flatnonzero(context[:shorter] != whole[:shorter])
    num_shared = int(differ[0]) if len(differ) else shorter
    num_scored = len(whole) - num_shared
    if num_scored == 0 or num_shared == 0:
        raise UserError(f"{where} {'is empty' if num_scored == 0 else 'has no context'} with this "
                        "tokenizer, so it has no likelihood. Leave the line out.")
    if num_scored > seq_length:
        raise UserError(f"{where} has {num_scored} tokens, more than the sequence length of "
                        f"{seq_length}. Leave the line out, or load a model with longer sequences.")
    return EncodedChoice(whole[-(seq_length + 1):], num_scored, len(whole) > seq_length + 1,
                         num_shared < len(context))


class ChoiceSamples(SampleSource):
    """Each choice is a sample; they are numbered in their order."""

    def __init__(self, choices: Sequence[EncodedChoice]):
        self.choices = choices
        self.num_labels = np.array([len(choice.tokens) - 1 for choice in choices], np.int64)

    def __len__(self) -> int:
        return len(self.choices)

    def tokens(self, sample: int) -> np.ndarray:
        return self.choices[sample].tokens

    def first_label(self, sample: int) -> int:
        return len(self.choices[sample].tokens) - 1 - self.choices[sample].num_scored
