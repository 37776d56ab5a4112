"""Multiple-choice questions, from the JSONL files in which they are published.

Each line is a record of one of these forms, told apart by their keys. Contexts are worded as
lm-evaluation-harness words them, so that numbers can be compared with published ones.

    plain       context, choices, answer: the context as it is
                question, choices, answer: worded "Question: ...\\nAnswer:"
    ARC         question, choices {text, label}, answerKey (the dataset ai2_arc), or question
                {stem, choices [{text, label}]}, answerKey (allenai.org): worded as above
    OpenBookQA  question_stem, choices {text, label}, answerKey: as it is
    SciQ        question, correct_answer, distractor1 to distractor3, support: the support, and
                the question worded as above
    HellaSwag   ctx, endings, label: as it is; with activity_label, ctx_a and ctx_b, as its files
                have them, "activity_label: ctx_a Ctx_b"

The file of OpenBookQA's authors has the form of ARC's, and is worded as ARC is.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_direct.errors import UserError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # which editors on Windows put before UTF-8 text
_FORMS = ('"choices" and "answer" beside "context" or "question"; "answerKey" (ARC, OpenBookQA); '
          '"correct_answer" and "distractor1" to "distractor3" (SciQ); or "ctx", "endings" and '
          '"label" (HellaSwag)')


@dataclass(frozen=True)
class Question:
    """choices: texts, of which the one with the number ``answer`` is right, or the first of those
    that are equal to it; line: in its file; gap: the white space that the context ends in.

    The gap belongs to the choice, as lm-evaluation-harness has it: tokenizers join white space to
    what follows.
    """

    context: str
    choices: tuple[str, ...]
    answer: int
    line: int
    gap: str = ""

    def with_choice(self, number: int) -> str:
        """The text that a model is given: as it stands, or with one space where the two touch."""
        choice = self.choices[number]
        return self.context + (self.gap or ("" if choice[0].isspace() else " ")) + choice

    @property
    def num_distinct(self) -> int:
        """Choices that are not the same text as another."""
        return len(set(map(self.with_choice, range(len(self.choices)))))

    def num_bytes(self, number: int) -> int:
        """Of the choice in UTF-8, without the space before it."""
        return len(self.choices[number].strip().encode())


class _BadRecord(Exception):
    """What is wrong with a record, and what to do; the file and line are added by read()."""


def read_questions(path: str | Path) -> list[Question]:
    """The file's questions. Raises UserError that names the line of a record that is none."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Correct --tasks.") from error
    questions = []
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip():
            continue
        try:
            questions.append(_question(_record(line), number))
        except _BadRecord as error:
            raise UserError(f"{path}:{number}: {error}") from error
    if not questions:
        raise UserError(f"{path} holds no questions: expected one JSON object per line. "
                        "Correct --tasks.")
    return questions


def _record(line: bytes) -> dict:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:  # of UTF-8 or of JSON
        raise _BadRecord(f"expected a JSON object ({error}). One array of all records becomes "
                         "JSONL with `jq -c '.[]'`.") from error
    if not isinstance(record, dict):
        raise _BadRecord(f"expected a JSON object, found {_kind(record)}. One array of all records "
                         "becomes JSONL with `jq -c '.[]'`.")
    return record


def _question(record: dict, line: int) -> Question:
    context, choices, answer = _parts(record)
    context, gap = context.rstrip(), context[len(context.rstrip()):]
    if not context:
        raise _BadRecord("the question is empty, so that nothing comes before the choices. Leave "
                         "the line out.")
    if len(choices) < 2:
        raise _BadRecord(f"expected two choices or more, found {len(choices)}. Leave the line out.")
    for choice in choices:
        if not isinstance(choice, str) or not choice.strip():
            raise _BadRecord(f"expected texts as choices, found {json.dumps(choice)}. Correct it, "
                             "or leave the line out.")
    for text in (context, *choices):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _BadRecord(f"half of a surrogate pair is not text ({error}). Correct it, or "
                             "leave the line out.") from error
    question = Question(context, tuple(choices), answer, line, gap)
    if question.num_distinct < 2:
        raise _BadRecord("all choices are the same text. Leave the line out.")
    texts = list(map(question.with_choice, range(len(choices))))
    return dataclasses.replace(question, answer=texts.index(texts[answer]))


def _parts(record: dict) -> tuple[str, Sequence[str], int]:
    """(context, choices, number of the right one)"""
    if "correct_answer" in record:
        wrong = [_text(record, f"distractor{i}") for i in (1, 2, 3)]
        support = _text(record, "support").strip() if record.get("support") else ""
        return (f"{support}\n".lstrip() + _worded(_text(record, "question")),
                [*wrong, _text(record, "correct_answer")], 3)
    if "endings" in record:
        endings = [_tidied(ending) if isinstance(ending, str) else ending
                   for ending in _list(record, "endings")]
        return _hellaswag_context(record), endings, _answer(record, "label", endings)
    if isinstance(record.get("question"), dict):  # ARC as its authors publish it
        inner = record["question"]
        choices, labels = _choices(inner)
        return (_worded(_text(inner, "stem")), choices,
                _answer(record, "answerKey", choices, labels))
    key = next((k for k in ("context", "question_stem", "question") if k in record), None)
    if key is None or "choices" not in record:
        found = ", ".join(record) or "none"
        raise _BadRecord(f"expected the keys {_FORMS}; found {found}. Correct the record.")
    text = _text(record, key)
    choices, labels = _choices(record)
    usual = "answer" if labels is None else "answerKey"
    found = next((k for k in ("answer", "answerKey") if k in record), usual)
    answer = _answer(record, found, choices, labels)
    return _worded(text) if key == "question" else text, choices, answer


def _worded(question: str) -> str:
    return f"Question: {question}\nAnswer:" if question.strip() else ""


def _hellaswag_context(record: dict) -> str:
    if not all(key in record for key in ("activity_label", "ctx_a", "ctx_b")):
        return _tidied(_text(record, "ctx")).lstrip()
    activity, whole, begun = (_text(record, key) for key in ("activity_label", "ctx_a", "ctx_b"))
    return _tidied(f"{activity}: {whole} {begun.capitalize()}")


def _tidied(text: str) -> str:
    """Without the marks, such as [title] and [step], that HellaSwag's WikiHow texts carry."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _choices(record: dict) -> tuple[Sequence[str], Sequence[str] | None]:
    """(texts, labels or None)"""
    choices = record.get("choices")
    if isinstance(choices, dict):
        texts, labels = _list(choices, "text"), _list(choices, "label")
        if len(texts) != len(labels):
            raise _BadRecord(f"{len(texts)} choices have {len(labels)} labels. Correct either.")
        return texts, [str(label) for label in labels]
    choices = _list(record, "choices")
    if choices and all(isinstance(choice, dict) for choice in choices):
        return ([_text(choice, "text") for choice in choices],
                [_text(choice, "label") for choice in choices])
    return choices, None


def _answer(record: dict, key: str, choices: Sequence[str], labels: Sequence[str] | None = None,
            ) -> int:
    """The number of the right choice, from a label, a number (the first is 0), letter or text."""
    value = record.get(key)
    if value is None or value == "":
        raise _BadRecord(f'"{key}" says which choice is right, and is missing. Where the answers '
                         "of a test set are withheld, use the validation set.")
    if labels is not None:
        found = {labels.index(str(value).strip())} if str(value).strip() in labels else set()
    elif isinstance(value, int) and not isinstance(value, bool):
        found = {value} & set(range(len(choices)))
    else:
        # Of equal choices the first stands for all.
        found = {choices.index(choices[number]) for number in _readings(value, choices)} \
            if isinstance(value, str) else set()
    if len(found) == 1:
        return found.pop()
    if found:
        numbers = " or ".join(map(str, sorted(found)))
        raise _BadRecord(f'"{key}" {json.dumps(value)} can be read as the choice of number '
                         f"{numbers}, by its text or its place. Write the number, without quotes.")
    among = " or ".join(labels) if labels is not None else \
        f"a number from 0 to {len(choices) - 1}, a letter or the text of a choice"
    raise _BadRecord(f'"{key}" {json.dumps(value)} is none of the choices: expected {among}. '
                     "Correct it.")


def _readings(value: str, choices: Sequence[str]) -> Iterator[int]:
    """Numbers of the choices that a text can mean."""
    if value in choices:
        yield choices.index(value)
    value = value.strip()
    if re.fullmatch("[A-Z]", value) and ord(value) - ord("A") < len(choices):
        yield ord(value) - ord("A")
    if re.fullmatch("[0-9]+", value) and int(value) < len(choices):
        yield int(value)


def _text(record: dict, key: str) -> str:
    if not isinstance(record.get(key), str):
        raise _BadRecord(f'expected a text as "{key}", found {_kind(record.get(key))}. Correct the '
                         "record.")
    return record[key]


def _list(record: dict, key: str) -> list:
    if not isinstance(record.get(key), list):
        raise _BadRecord(f'expected a list as "{key}", found {_kind(record.get(key))}. Correct the '
                         "record.")
    return record[key]


def _kind(value) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false",
             int: "a number", float: "a number", type(None): "nothing"}
    return kinds[type(value)]
