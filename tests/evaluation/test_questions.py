"""Multiple-choice questions: forms of records, errors, and where a choice's tokens begin."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_direct.data.samples import MicroBatchLimits, PassShape
from megatron_direct.errors import UserError
from megatron_direct.evaluation import choices
from megatron_direct.evaluation import questions as multiple_choice
from megatron_direct.evaluation.choices import ChoiceSamples
from megatron_direct.evaluation.questions import Question
from megatron_direct.preprocessing import tokenizer

COLOURS = ("red", "blue", "green")
WORDED = "Question: Of what colour?\nAnswer:"
LABELLED = {"text": list(COLOURS), "label": ["A", "B", "C"]}
LISTED = [{"text": text, "label": label} for label, text in zip("ABC", COLOURS, strict=True)]


def _read(tmp_path, *lines) -> list[Question]:
    path = tmp_path / "task.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n"
                            for line in lines))
    return multiple_choice.read_questions(path)


@pytest.mark.parametrize(("record", "context"), [
    ({"context": "The sky is ", "choices": COLOURS, "answer": 1}, "The sky is"),
    ({"question": "Of what colour?", "choices": COLOURS, "answer": 1}, WORDED),
    ({"question": "Of what colour?", "choices": LABELLED, "answerKey": "B"}, WORDED),
    ({"question": "Of what colour?", "choices": {"text": COLOURS, "label": ["1", "2", "3"]},
      "answerKey": "2"}, WORDED),
    ({"question": {"stem": "Of what colour?", "choices": LISTED}, "answerKey": "B"}, WORDED),
    ({"question_stem": "The sky is", "choices": LABELLED, "answerKey": " B"}, "The sky is"),
    ({"ctx": "[header] Paint [title] The sky is", "endings": COLOURS, "label": "1"},
     "Paint. The sky is"),
    ({"ctx": "not this", "ctx_a": "Look up. [step] See.", "ctx_b": "the sky is", "label": 1,
      "activity_label": "Painting", "endings": COLOURS}, "Painting: Look up. See. The sky is"),
], ids=["context", "question", "ARC", "ARC by number", "ARC of its authors", "OpenBookQA",
        "HellaSwag", "HellaSwag whole"])
def test_forms_of_records(tmp_path, record, context):
    question, = _read(tmp_path, record)
    gap = " " if record.get("context") else ""
    assert question == Question(context, COLOURS, 1, 1, gap)


@pytest.mark.parametrize(("support", "before"), [("It is day.", "It is day.\n"), ("", "")])
def test_sciq(tmp_path, support, before):
    question, = _read(tmp_path, {
        "question": "Of what colour?", "correct_answer": "blue", "distractor1": "red",
        "distractor2": "green", "distractor3": "black", "support": support})
    assert question == Question(before + WORDED, ("red", "green", "black", "blue"), 3, 1)


@pytest.mark.parametrize(("answer", "number"), [
    (0, 0), (2, 2), ("B", 1), ("2", 2), ("green", 2), (" C ", 2)])
def test_an_answer_is_a_number_a_letter_or_a_text(tmp_path, answer, number):
    question, = _read(tmp_path, {"context": "c", "choices": COLOURS, "answer": answer})
    assert question.answer == number


def test_one_space_parts_context_and_choice_and_is_not_counted():
    question = Question("It is", ("hot", " cold", "mül"), 0, 1)
    assert [question.with_choice(n) for n in range(3)] == ["It is hot", "It is cold", "It is mül"]
    assert [question.num_bytes(n) for n in range(3)] == [3, 4, 4]


@pytest.mark.parametrize(("context", "choice", "whole"), [
    ("def area(side):\n", "    return side", "def area(side):\n    return side"),
    ("def area(side):", "    return side", "def area(side):    return side"),
    ("The answer is:\n\n", "blue", "The answer is:\n\nblue"),
    ("The answer is:", "blue", "The answer is: blue"),
    ("The sky is ", "blue", "The sky is blue"), ("The sky is\t ", " blue", "The sky is\t  blue"),
])
def test_the_text_is_scored_as_it_stands(tmp_path, context, choice, whole):
    """The white space between the two belongs to the choice."""
    question, = _read(tmp_path, {"context": context, "choices": [choice, "no"], "answer": 0})
    assert question.with_choice(0) == whole
    assert question.context == context.rstrip()


@pytest.mark.parametrize(("choices", "answer", "expected", "distinct"), [
    (["red", "red", "blue"], 1, 0, 2), (["red", "blue", " red"], 2, 0, 2),
    (["red", "blue", "red"], "C", 0, 2), (["red", "blue"], 1, 1, 2),
])
def test_equal_choices_are_one(tmp_path, choices, answer, expected, distinct):
    question, = _read(tmp_path, {"context": "c", "choices": choices, "answer": answer})
    assert (question.answer, question.num_distinct) == (expected, distinct)


def test_a_byte_order_mark_is_no_part_of_a_task(tmp_path):
    line = json.dumps({"context": "The sky is", "choices": ["blue", "green"], "answer": 0})
    (tmp_path / "task.jsonl").write_text("\ufeff" + line + "\n\ufeff" + line)  # two files joined
    assert [q.line for q in multiple_choice.read_questions(tmp_path / "task.jsonl")] == [1, 2]


GOOD = {"context": "c", "choices": COLOURS, "answer": 0}


@pytest.mark.parametrize(("line", "match"), [
    ('{"context": ', r"task.jsonl:3: expected a JSON object \(Expecting value"),
    ('{"context": "c", "choices": ["a", "gr\\ud83deen"], "answer": 0}',
     "task.jsonl:3: half of a surrogate pair"),
    ("[" * 10**5, r"task.jsonl:3: expected a JSON object"),
    (GOOD | {"choices": ["a", " a"]}, "task.jsonl:3: all choices are the same text"),
    ('[{"context": "c"}]', "task.jsonl:3: expected a JSON object, found a list.*jq -c"),
    ({"text": "t"}, "expected the keys .*answerKey.*; found text. Correct"),
    ({"context": "c", "answer": 0}, "expected the keys .*; found context, answer"),
    (GOOD | {"answer": 3}, '"answer" 3 is none of the choices: expected a number from 0 to 2'),
    (GOOD | {"answer": "yellow"}, '"answer" "yellow" is none of the choices'),
    (GOOD | {"answer": True}, '"answer" true is none of the choices'),
    (GOOD | {"answer": None}, '"answer" says which choice is right, and is missing.*validation'),
    (GOOD | {"choices": ["2", "3", "1"], "answer": "1"},
     r'"answer" "1" can be read as the choice of number 1 or 2.*without quotes'),
    (GOOD | {"choices": ["B", "A"], "answer": "A"}, "number 0 or 1, by its text or its place"),
    (GOOD | {"choices": LABELLED, "answer": "D"}, "expected A or B or C"),
    (GOOD | {"choices": {"text": COLOURS, "label": ["A"]}}, "3 choices have 1 labels"),
    (GOOD | {"choices": "red"}, 'expected a list as "choices", found a text'),
    (GOOD | {"choices": ["red"]}, "expected two choices or more, found 1"),
    (GOOD | {"choices": ["red", " "]}, 'expected texts as choices, found " "'),
    (GOOD | {"context": " "}, "the question is empty"),
    ({"question": "", "choices": COLOURS, "answer": 0}, "the question is empty"),
    ({"question": {"choices": LISTED}, "answerKey": "A"}, 'a text as "stem", found nothing'),
    ({"question": "q", "correct_answer": "a", "distractor1": "b"}, 'a text as "distractor2"'),
    ({"ctx": "c", "endings": COLOURS, "label": ""}, '"label" says which.*is missing'),
], ids=str)
def test_bad_lines_are_named(tmp_path, line, match):
    with pytest.raises(UserError, match=match) as error:
        _read(tmp_path, GOOD, "", line)
    assert "task.jsonl:3: " in str(error.value)


def test_files_that_hold_nothing_are_named(tmp_path):
    with pytest.raises(UserError, match="task.jsonl holds no questions"):
        _read(tmp_path, "")
    with pytest.raises(UserError, match="gone.jsonl cannot be read .*Correct --tasks"):
        multiple_choice.read_questions(tmp_path / "gone.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"context": "caf\xe9"}\n')
    with pytest.raises(UserError, match="latin.jsonl:1: expected a JSON object .*utf-8"):
        multiple_choice.read_questions(tmp_path / "latin.jsonl")


# --- tokens -----------------------------------------------------------------------------------


class _Characters:
    """A token a character, but for "t h", which is one."""

    def encode(self, texts):
        return [np.array([0 if c == "\0" else ord(c) for c in text.replace("t h", "\0")], np.int32)
                for text in texts]


def _encode(question: Question, seq_length: int = 20, tokens=None):
    (encoded,) = choices.encode([question], tokens or _Characters(), seq_length, "task.jsonl")
    return encoded


def test_the_choices_tokens_are_those_behind_the_contexts():
    red, blue = _encode(Question("sky:", ("red", "blue"), 1, 1))
    assert "".join(map(chr, blue.tokens)) == "sky: blue"
    assert (red.num_scored, blue.num_scored) == (4, 5)
    assert not (blue.is_cut or blue.is_merged)


def test_a_token_over_the_boundary_is_the_choices():
    hot, cold = _encode(Question("is it", ("hot", "cold"), 0, 1))
    assert hot.tokens.tolist() == [*map(ord, "is i"), 0, *map(ord, "ot")]
    assert (hot.num_scored, hot.is_merged) == (3, True)
    assert (cold.num_scored, cold.is_merged) == (5, False)


def test_the_context_is_cut_from_the_left():
    whole, cut = _encode(Question("0123456789", ("abcd", "abcde"), 0, 1), seq_length=14)
    assert ("".join(map(chr, whole.tokens)), whole.is_cut) == ("0123456789 abcd", False)
    assert ("".join(map(chr, cut.tokens)), cut.is_cut) == ("123456789 abcde", True)
    assert cut.num_scored == 6


def test_a_choice_may_leave_one_token_of_context_and_no_less():
    assert _encode(Question("01", ("abcd", "a"), 0, 1), seq_length=5)[0].num_scored == 5
    with pytest.raises(UserError, match="task.jsonl:7: choice 1 has 6 tokens, more than the seq"):
        _encode(Question("01", ("a", "abcde"), 0, 7), seq_length=5)


def test_a_choice_that_takes_all_of_the_context_has_no_likelihood():
    with pytest.raises(UserError, match="task.jsonl:7: choice 0 has no context with this"):
        _encode(Question("t", ("hot", "cold"), 0, 7))


def test_only_the_choices_labels_count():
    samples = ChoiceSamples(_encode(Question("it:", ("a", "bcd"), 0, 1)))
    (batch,), = samples.passes(np.arange(2), PassShape(MicroBatchLimits(3)))
    assert batch.samples.tolist() == [1, 0]  # the longer one first
    for row, text in enumerate(("it: bcd", "it: a")):
        scored = batch.labels[row][batch.loss_mask[row] == 1]
        assert "".join(map(chr, scored)) == text[3:]
    assert batch.num_labels.tolist() == [4, 2, 1]


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentence_piece") / "tokenizer.model"
    tokenizer.train_model(path, iter(["the sky is blue", "the grass is green"] * 50), 290)
    return tokenizer.load_tokenizer(path, None, False)


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.train_from_iterator(["the sky is blue"] * 9, tokenizers.trainers.BpeTrainer(
        vocab_size=280, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    path = tmp_path_factory.mktemp("hugging_face") / "tokenizer.json"
    model.save(str(path))
    return tokenizer.load_tokenizer(path, None, False)


@pytest.mark.parametrize("name", ["sentence_piece", "hugging_face"])
def test_tokenizers_as_they_are(name, request):
    tokens = request.getfixturevalue(name)
    question = Question("the sky is", ("blue", "green as grass"), 0, 1)
    context, *wholes = tokens.encode(["the sky is", "the sky is blue",
                                      "the sky is green as grass"])
    for encoded, whole in zip(_encode(question, tokens=tokens), wholes, strict=True):
        np.testing.assert_array_equal(encoded.tokens, whole)
        assert encoded.num_scored == len(whole) - len(context)
