"""lm-evaluation-harness on the sharded model: local tasks of all three kinds, and in the forms of
GSM8K and HumanEval, in three layouts.

Skipped where ``lm_eval`` is not installed. Truth: ``--tasks`` on the same questions, and PlainGPT
in double precision.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import types

import flat_requests
import numpy as np
import pytest
import torch
from plain_gpt import PlainGPT
from ranks import Layout, RankError, run_on_ranks
from weights import assemble, fill_by_hash, pieces

from megatron_direct.commands.evaluate import EvaluateConfig, EvaluateRequest, evaluate
from megatron_direct.config import Job, ModelConfig
from megatron_direct.errors import UserError
from megatron_direct.evaluation import harness
from megatron_direct.evaluation.serving import Answers
from megatron_direct.mcore import checkpoint, grid
from megatron_direct.mcore import model as models
from megatron_direct.mcore.shards import parameter_shards
from megatron_direct.preprocessing import tokenizer
from megatron_direct.runtime import digests

try:
    import lm_eval
except ImportError:
    lm_eval = None
needs_harness = pytest.mark.skipif(lm_eval is None, reason="lm-evaluation-harness is not installed")

WORDS = ("the a sky grass sea is was looks blue green red deep far in on under day night when it "
         "rains we walk home slowly").split()
VOCAB_SIZE = 296
MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2,
                    ffn_hidden_size=48, seq_length=48, vocab_size=VOCAB_SIZE,
                    make_vocab_size_divisible_by=32, untie_embeddings_and_output_weights=True)
LAYOUTS = [Layout(), Layout(tp=2, pp=2), Layout(dp=2)]
NEW_TOKENS, STOP = 6, "e"


def _text(rng, count):
    return " ".join(rng.choice(WORDS, count))


def _questions():
    rng = np.random.default_rng(0)
    return [{"context": _text(rng, 2 + number % 4), "answer": number % 3,
             "choices": [_text(rng, 1 + int(rng.integers(3))) for _ in range(3)]}
            for number in range(14)]


def _texts():
    """Some longer than the model's sequence."""
    rng = np.random.default_rng(1)
    return [_text(rng, 4 + 9 * number) for number in range(5)]


_TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
{rest}
"""
_FORMS = {
    "local_choices": "output_type: multiple_choice\ndoc_to_text: '{{context}}'\n"
                     "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list:\n"
                     "  - metric: acc\n  - metric: acc_norm",
    "local_texts": "output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
                   "doc_to_target: '{{text}}'\nmetric_list:\n  - metric: byte_perplexity",
    "local_answers": "output_type: generate_until\ndoc_to_text: '{{context}}'\n"
                     "doc_to_target: '{{continued}}'\ngeneration_kwargs:\n  until: ['" + STOP
                     + "']\n  max_gen_toks: " + str(NEW_TOKENS) + "\n  do_sample: false\n"
                     "metric_list:\n  - metric: exact_match",
}


def _write(folder, name, records, form):
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / f"{name}.yaml").write_text(_TASK.format(name=name, file=file, rest=form))


def _save(folder):
    with grid.model_parallel(Layout().config()):
        chunks = models.build(Job(MODEL, Layout().config()))
        shards = parameter_shards(chunks)
        fill_by_hash(shards)
        checkpoint.save(folder / "theta", 1, chunks, None, None, {
            **vars(MODEL), "tokenizer_digest": digests.file_digest(folder / "tokenizer.model")})
        return pieces(shards, [shard.parameter for shard in shards])


class _Plain:
    def __init__(self, folder, weights):
        self.tokens = tokenizer.load_tokenizer(folder / "tokenizer.model", None, False)
        self._plain = PlainGPT(MODEL, {name: matrix.shape for name, matrix in weights.items()})
        self._vector = self._plain.flatten(weights).double()

    def log_probs(self, tokens):
        logits, = self._plain.all_logits(self._vector, [tokens])
        return torch.log_softmax(logits, -1)

    def log_likelihood(self, text):
        """Of a text within the sequence length, after the end-of-document token."""
        tokens = [self.tokens.eod, *self.tokens.encode([text])[0].tolist()]
        return float(self.log_probs(tokens)[range(len(tokens) - 1), tokens[1:]].sum())

    def continuation(self, context, stop=STOP):
        tokens, new = self.tokens.encode([context])[0].tolist(), []
        for _ in range(NEW_TOKENS):
            seen = [*tokens, *new][-MODEL.seq_length:]
            token = int(self.log_probs([*seen, 0])[-1, :VOCAB_SIZE].argmax())
            if token == self.tokens.eod:
                break
            new.append(token)
            if stop in self.tokens.decode(np.array(new)):
                break
        return self.tokens.decode(np.array(new, int)).split(stop)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    rng = np.random.default_rng(2)
    tokenizer.train_model(folder / "tokenizer.model", iter(_text(rng, 9) for _ in range(200)),
                          VOCAB_SIZE)
    return folder


@pytest.fixture(scope="module")
def plain(folder):
    plain = _Plain(folder, assemble(run_on_ranks(1, _save, folder)))
    _write(folder, "local_choices", _questions(), _FORMS["local_choices"])
    _write(folder, "local_texts", [{"text": text} for text in _texts()], _FORMS["local_texts"])
    contexts = [question["context"] for question in _questions()]
    # Every other answer is a wrong one.
    _write(folder, "local_answers", [
        {"context": context, "continued": "never" if number % 2 else plain.continuation(context)}
        for number, context in enumerate(contexts)], _FORMS["local_answers"])
    return plain


def _evaluate(folder, layout, name, settings):
    os.environ.update(HF_HOME=str(folder / "cache"), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    evaluate(flat_requests.make(EvaluateRequest, layout.config(), **{
        "load": str(folder / "theta"), "tokenizer_model": str(folder / "tokenizer.model"),
        "tasks": (str(folder / "local_choices.jsonl"),), "micro_batch_size": 4,
        "lm_eval": tuple(_FORMS), "lm_eval_include_path": str(folder),
        "output": str(folder / name), **settings}))


@pytest.fixture(scope="module")
def scores(folder, plain):
    """Of a layout, evaluated when they are first asked for."""
    @functools.cache
    def scores(layout):
        run_on_ranks(layout.world_size, _evaluate, folder, layout, f"{layout}.json", {})
        return json.loads((folder / f"{layout}.json").read_text())

    return scores


@needs_harness
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scores_are_our_own_and_plain_torchs(folder, plain, scores, layout):
    found = scores(layout)
    ours, theirs = found["results"]["local_choices"], found["lm_eval"]["results"]
    for metric in ("acc", "acc_norm"):  # the texts are ASCII: bytes are characters
        assert theirs["local_choices"][f"{metric},none"] == pytest.approx(ours[metric])
        assert theirs["local_choices"][f"{metric}_stderr,none"] == pytest.approx(
            ours[f"{metric}_stderr"])
    assert theirs["local_answers"]["exact_match,none"] == pytest.approx(0.5)
    texts = [text for text in _texts() if len(plain.tokens.encode([text])[0]) <= MODEL.seq_length]
    assert 2 <= len(texts) < 5
    run_on_ranks(layout.world_size, _evaluate, folder, layout, f"{layout}-some.json",
                 {"lm_eval": ("local_texts",), "tasks": (), "limit": len(texts)})
    some = json.loads((folder / f"{layout}-some.json").read_text())["lm_eval"]["results"]
    expected = math.exp(-sum(map(plain.log_likelihood, texts)) / sum(map(len, texts)))
    assert some["local_texts"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-5)


@needs_harness
def test_layouts_agree_on_texts_longer_than_the_sequence(scores):
    values = [scores(layout)["lm_eval"]["results"]["local_texts"]["byte_perplexity,none"]
              for layout in LAYOUTS]
    assert values == pytest.approx([values[0]] * len(LAYOUTS), rel=1e-5)


# --- the forms of published tasks -------------------------------------------------------------

# As gsm8k.yaml of the harness, with letters for digits.
_REASONING = """output_type: generate_until
num_fewshot: 1
fewshot_config:
  sampler: first_n
  samples:
    - {question: the sky, answer: "blue #### b"}
doc_to_text: "question: {{question}}\\nanswer:"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["question:", "</s>"]
  max_gen_toks: NEW_TOKENS
  do_sample: false
  temperature: 0.0
repeats: 1
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    regexes_to_ignore: [",", "(?s).*#### "]
filter_list:
  - name: strict-match
    filter:
      - function: regex
        regex_pattern: "#### ([a-z]+)"
      - function: take_first
  - name: flexible-extract
    filter:
      - function: regex
        group_select: -1
        regex_pattern: "([a-z])"
      - function: take_first
""".replace("NEW_TOKENS", str(NEW_TOKENS))
# As humaneval.yaml and its utils.py, whose metric `code_eval` would be downloaded.
_CODE = """unsafe_code: true
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{test}}\\ncheck({{entry_point}})"
generation_kwargs:
  until: [STOP]
  max_gen_toks: NEW_TOKENS
  do_sample: false
repeats: 1
num_fewshot: 0
metric_list:
  - metric: !function run_programs.pass_at_k
    aggregation: mean
    higher_is_better: true
    k: [1]
filter_list:
  - name: create_test
    filter:
      - function: custom
        filter_fn: !function run_programs.build_predictions
""".replace("STOP", STOP).replace("NEW_TOKENS", str(NEW_TOKENS))
_RUN_PROGRAMS = """import subprocess
import sys


def pass_at_k(references, predictions, k):
    assert k == [1]
    passed = [subprocess.run([sys.executable, "-c", f"{program}\\n{test}"]).returncode == 0
              for test, programs in zip(references, predictions, strict=True)
              for program in programs]
    return {"pass@1": sum(passed) / len(passed)}


def build_predictions(resps, docs):
    # What a model of random weights writes is not Python: it is quoted.
    return [[doc["prompt"] + repr(answer) for answer in answers]
            for answers, doc in zip(resps, docs, strict=True)]
"""


def _write_reasoning(folder, plain):
    """Every third answer is a wrong one. Returns the share of right ones."""
    questions = [question["context"] for question in _questions()]
    answers = []
    for number, question in enumerate(questions):
        letters = re.findall("[a-z]", plain.continuation(
            f"question: the sky\nanswer: blue #### b\n\nquestion: {question}\nanswer:",
            "question:"))
        answers.append(letters[-1] if letters and number % 3 else "wrong")
    _write(folder, "local_reasoning", [
        {"question": question, "answer": f"so #### {answer}"}
        for question, answer in zip(questions, answers, strict=True)], _REASONING)
    return np.mean([answer != "wrong" for answer in answers])


def _write_code(folder, plain):
    """Every third test fails. Returns the share of the others."""
    (folder / "run_programs.py").write_text(_RUN_PROGRAMS)
    prompts = [f"# {question['context']}\nsaid = " for question in _questions()]
    _write(folder, "local_code", [
        {"prompt": prompt, "entry_point": "said", "test": "def check(said):\n    assert said == "
         + repr(plain.continuation(prompt) if number % 3 else "never")}
        for number, prompt in enumerate(prompts)], _CODE)
    return np.mean([number % 3 > 0 for number in range(len(prompts))])


@needs_harness
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tasks_in_the_forms_of_gsm8k_and_humaneval(folder, plain, layout):
    reasoning, code = _write_reasoning(folder, plain), _write_code(folder, plain)
    run_on_ranks(layout.world_size, _evaluate, folder, layout, "forms.json", {
        "lm_eval": ("local_reasoning", "local_code"), "tasks": (),
        "confirm_run_unsafe_code": True})
    found = json.loads((folder / "forms.json").read_text())["lm_eval"]["results"]
    assert 0.5 < reasoning < 0.7
    assert found["local_reasoning"]["exact_match,flexible-extract"] == pytest.approx(reasoning)
    # Random weights do not write "#### ".
    assert found["local_reasoning"]["exact_match,strict-match"] == 0
    assert found["local_code"]["pass@1,create_test"] == pytest.approx(code)


@needs_harness
def test_code_of_a_model_runs_only_where_that_is_confirmed(folder, plain):
    _write_code(folder, plain)
    with pytest.raises(RankError, match="local_code which is marked as unsafe.*"
                       "add --confirm-run-unsafe-code"):
        run_on_ranks(2, _evaluate, folder, Layout(dp=2), "no.json",
                     {"lm_eval": ("local_code",), "tasks": ()})
    assert not (folder / "no.json").exists()


def test_refusals_of_the_harness_and_its_metric_name_the_flag():
    """evaluate's code_eval raises the second, when the task that has it is read."""
    for refusal in ("Set confirm_run_unsafe_code=True to run this task.",
                    'To use "code_eval", set the environment variable HF_ALLOW_CODE_EVAL="1".'):
        with pytest.raises(UserError, match="--confirm-run-unsafe-code"):
            harness._refuse_unsafe_code(ValueError(refusal))
    harness._refuse_unsafe_code(ValueError("of another kind"))


class _Merging:
    """A tokenizer that knows letters, and "ab"; blanks are no tokens."""

    eod = 0

    def encode(self, texts):
        return [np.array([ord(part) if len(part) == 1 else 1
                          for part in re.findall("ab|[a-z]", text)], np.int64) for text in texts]

    def decode(self, tokens):
        return "".join(map(chr, tokens))


def _asked_of_a_model(answers, seq_length=8):
    """(a model of the harness that answers so, what it was asked: tokens, and how many of them are
    scored)."""
    asked = []

    def ask(texts):
        asked.extend((text.tokens.tolist(), text.num_scored) for text in texts)
        return answers(texts)

    return harness.model_class()(ask, _Merging(), seq_length), asked


@needs_harness
@pytest.mark.parametrize(("context", "choice", "expected"), [
    ("xa", "c", ([ord("x"), ord("a"), ord("c")], 1)),
    ("xa", "b", ([ord("x"), 1], 1)),  # the choice is the end of a token that begins before
    ("a", "b", ([0, 1], 1)),  # and there is no other: the end of a document stands before it
    ("  ", "cd", ([0, ord("c"), ord("d")], 2)), ("", "cd", ([0, ord("c"), ord("d")], 2))])
def test_every_choice_has_a_token_and_one_before_it(context, choice, expected):
    model, asked = _asked_of_a_model(lambda texts: Answers(*np.zeros((3, len(texts)))))
    model.loglikelihood([types.SimpleNamespace(args=(context, choice))], disable_tqdm=True)
    assert asked == [expected]


@needs_harness
def test_a_choice_without_a_token_is_refused():
    model, _ = _asked_of_a_model(None)
    with pytest.raises(UserError, match="a text that is no token"):
        model.loglikelihood([types.SimpleNamespace(args=("xa", " "))], disable_tqdm=True)


@needs_harness
def test_lengths_have_any_of_their_names_and_random_samples_are_refused():
    model, asked = _asked_of_a_model(
        lambda texts: Answers(*np.full((3, len(texts)), ord("x"))))

    def generate(**settings):
        return model.generate_until([types.SimpleNamespace(args=("a", settings))],
                                    disable_tqdm=True)

    assert generate(max_new_tokens=3) == ["xxx"] and len(asked) == 3
    assert generate(max_gen_toks=2, until="y") == ["xx"]
    for settings in ({"temperature": 0.7}, {"do_sample": True}):
        with pytest.raises(UserError, match="asks for random samples"):
            generate(**settings)


@needs_harness
def test_tasks_that_are_not_there_are_named(folder, plain):
    with pytest.raises(RankError, match="--lm-eval nowhere: lm-evaluation-harness has no such"):
        run_on_ranks(2, _evaluate, folder, Layout(dp=2), "no.json", {"lm_eval": ("nowhere",)})


def test_a_missing_harness_is_named_before_any_work(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install 'lm-eval>=0.4.10'"):
        harness.require_harness()


def test_flags_of_the_harness_need_it():
    with pytest.raises(UserError, match="--tasks and --lm-eval are both missing"):
        evaluate(EvaluateRequest(EvaluateConfig(load="a", tokenizer_model="b", output="c")))
    with pytest.raises(UserError, match="--limit 3 has no effect without --lm-eval"):
        harness.HarnessConfig(limit=3)
    with pytest.raises(UserError, match="--confirm-run-unsafe-code.* has no effect"):
        harness.HarnessConfig(confirm_run_unsafe_code=True)
