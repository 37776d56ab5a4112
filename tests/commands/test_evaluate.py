"""Multiple choice on the sharded model, against plain torch, question by question.

One launch writes the checkpoints; each layout then scores the same files. The truth shares no code
with the stage but the forms of the records: its tokens come from SentencePiece itself, and its
log-likelihoods from ``PlainGPT`` in double precision, without padding.
"""

from __future__ import annotations

import dataclasses
import json
import math

import flat_requests
import numpy as np
import pytest
import torch
from plain_gpt import PlainGPT
from ranks import Layout, run_on_ranks
from tiny_models import MODELS
from weights import assemble, fill_by_hash, pieces

from megatron_direct.cli import main as cli
from megatron_direct.commands.evaluate import EvaluateRequest, evaluate
from megatron_direct.config import Job, ModelConfig
from megatron_direct.errors import UserError
from megatron_direct.evaluation import questions as multiple_choice
from megatron_direct.evaluation.multiple_choice import accuracies, best_choice
from megatron_direct.mcore import checkpoint, grid
from megatron_direct.mcore import model as models
from megatron_direct.mcore.shards import parameter_shards
from megatron_direct.preprocessing import tokenizer
from megatron_direct.runtime import digests

WORDS = ("the a sky grass sea is was looks blue green red deep far in on under day night when it "
         "rains we walk home slowly").split()
VOCAB_SIZE = 296
MODEL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2,
                    ffn_hidden_size=48, seq_length=48, vocab_size=VOCAB_SIZE,
                    make_vocab_size_divisible_by=32, untie_embeddings_and_output_weights=True)
EXPERTS = dataclasses.replace(MODELS["mixtral"], vocab_size=VOCAB_SIZE, seq_length=48)
RIGHT = "blue"  # what the biased model says

LAYOUTS = [
    Layout(), Layout(tp=2, pp=2), Layout(dp=2),
    *(pytest.param(layout, marks=pytest.mark.slow)
      for layout in (Layout(pp=2, vp=1), Layout(tp=2, sp=True), Layout(pp=2, dp=2))),
]
# fp32 against double precision, measured: 1.4e-7 in each of these layouts.
RTOL = 1e-5


def _words(rng, count):
    return " ".join(rng.choice(WORDS, count))


def _records():
    """22 questions of 2 to 5 choices; some contexts are longer than the sequence length."""
    rng = np.random.default_rng(0)
    return [{"context": _words(rng, 2 + number % 5 * 7), "answer": number % 2,
             "choices": [_words(rng, 1 + int(rng.integers(4))) for _ in range(2 + number % 4)]}
            for number in range(22)]


def _biased_records():
    rng = np.random.default_rng(1)
    others = [word for word in WORDS if not set(word) & set(RIGHT)]
    return [{"question": _words(rng, 3), "answer": RIGHT,
             "choices": rng.permutation([RIGHT, *rng.choice(others, 2, replace=False)]).tolist()}
            for _ in range(9)]


def _write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(2)
    tokenizer.train_model(folder / "tokenizer.model", iter(_words(rng, 9) for _ in range(200)),
                    VOCAB_SIZE)
    _write(folder / "mixed.jsonl", _records())
    _write(folder / "biased.jsonl", _biased_records())
    return folder


@pytest.fixture(scope="module")
def weights(folder):
    """{name: whole matrix} of the checkpoint theta."""
    return assemble(run_on_ranks(1, _save, folder))


def _save(folder):
    digest = digests.file_digest(folder / "tokenizer.model")
    loaded = tokenizer.load_tokenizer(folder / "tokenizer.model", None, False)
    right = loaded.encode([f"x {RIGHT}"])[0][1:]
    with grid.model_parallel(Layout().config()):
        for name, model in (("theta", MODEL), ("experts", EXPERTS), ("biased", MODEL),
                            ("diverged", MODEL), ("unnamed", MODEL)):
            chunks = models.build(Job(model, Layout().config()))
            shards = parameter_shards(chunks)
            fill_by_hash(shards)
            if name == "theta":
                whole = pieces(shards, [s.parameter for s in shards])
            for shard in shards:
                if name == "biased":
                    _bias(shard, right)
                if name == "diverged":
                    shard.parameter.data.fill_(math.nan)
            args = {} if name == "unnamed" else {"tokenizer_digest": digest}
            checkpoint.save(folder / name, 1, chunks, None, None, {**vars(model), **args})
    return whole


def _bias(shard, tokens):
    """Every hidden state is the same, and the output layer's rows of ``tokens`` point along it."""
    with torch.no_grad():
        if "norm" not in shard.name:
            shard.parameter.zero_()
        if shard.name == "embedding.word_embeddings.weight":
            shard.parameter[:, 0] = 1
        if shard.name == "output_layer.weight":
            shard.parameter[torch.from_numpy(tokens).long(), 0] = 4


def _evaluate(folder, layout, name, settings):
    evaluate(flat_requests.make(EvaluateRequest, layout.config(), **{
        "load": str(folder / "theta"), "tasks": (str(folder / "mixed.jsonl"),),
        "tokenizer_model": str(folder / "tokenizer.model"), "micro_batch_size": 4,
        "output": str(folder / name), **settings}))


def _evaluate_both(folder, layout, name):
    _evaluate(folder, layout, f"{name}.json", {})
    _evaluate(folder, layout, f"{name}-biased.json", {
        "load": str(folder / "biased"),
        "tasks": (str(folder / "mixed.jsonl"), str(folder / "biased.jsonl"))})


@pytest.fixture(scope="module")
def scored(folder, weights):
    """layout -> its output; each layout is launched once."""
    done = {}

    def of(layout):
        if layout not in done:
            run_on_ranks(layout.world_size, _evaluate_both, folder, layout, str(layout))
            done[layout] = [json.loads((folder / f"{layout}{kind}.json").read_text())
                            for kind in ("", "-biased")]
        return done[layout]

    return of


def _truth(folder, weights):
    """[questions] log-likelihoods of the choices, tokens of the choices, whether one was cut."""
    import sentencepiece

    encode = sentencepiece.SentencePieceProcessor(
        model_file=str(folder / "tokenizer.model")).encode
    plain = PlainGPT(MODEL, {name: matrix.shape for name, matrix in weights.items()})
    vector = plain.flatten(weights)
    assert vector.dtype == torch.float64
    scores, counts, cut = [], [], []
    for record in _records():
        of_one, of_counts, lengths = [], [], []
        for choice in record["choices"]:
            tokens = encode(f"{record['context']} {choice}")
            count = len(tokens) - len(encode(record["context"]))
            kept = tokens[-(MODEL.seq_length + 1):]
            logits, = plain.all_logits(vector, [kept])
            at_label = torch.log_softmax(logits, -1)[range(len(kept) - 1), kept[1:]]
            of_one.append(float(at_label[-count:].sum()))
            of_counts.append(count)
            lengths.append(len(tokens))
        scores.append(of_one)
        counts.append(of_counts)
        cut.append(max(lengths) > MODEL.seq_length + 1)
    return scores, counts, cut


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scores_are_those_of_plain_torch_in_every_layout(folder, weights, scored, layout):
    output, _ = scored(layout)
    scores, counts, cut = _truth(folder, weights)
    found = output["tasks"]["mixed"]["questions"]
    assert sum(map(len, scores)) % 4 and len(found) == 22  # rows are left over
    for question, expected in zip(found, scores, strict=True):
        np.testing.assert_allclose(question["log_likelihood"], expected, rtol=RTOL)
    assert [q["tokens"] for q in found] == counts
    assert [q["cut"] for q in found] == cut and 0 < sum(cut) < 22
    right = [record["answer"] for record in _records()]
    sizes = [[len(c) for c in record["choices"]] for record in _records()]
    result = output["results"]["mixed"]
    for metric, divided_by in (("acc", [1] * 22), ("acc_norm", sizes), ("acc_token", counts)):
        best = [int(np.argmax(np.array(s) / d)) for s, d in zip(scores, divided_by, strict=True)]
        assert [q["answered"][metric] for q in found] == best
        hits = np.array(best) == right
        assert result[metric] == pytest.approx(hits.mean())
        assert result[f"{metric}_stderr"] == pytest.approx(hits.std(ddof=1) / math.sqrt(22))
    assert result["chance"] == pytest.approx(np.mean([1 / len(s) for s in scores]))
    assert (result["questions"], result["cut"], result["merged"]) == (22, sum(cut), 0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_model_that_knows_the_answers_gets_them_right(scored, layout):
    _, output = scored(layout)
    result = output["results"]["biased"]
    assert [result[metric] for metric in ("acc", "acc_norm", "acc_token")] == [1, 1, 1]
    assert (result["acc_stderr"], result["questions"]) == (0, 9)
    assert result["chance"] == pytest.approx(1 / 3)
    assert list(output["results"]) == ["mixed", "biased"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(dp=2, ep=2), Layout(tp=2, dp=2, ep=2, sp=True)],
                         ids=str)
def test_experts_that_are_spread_over_ranks_score_alike(folder, weights, layout):
    for name, on in (("experts-1", Layout()), (f"experts-{layout}", layout)):
        run_on_ranks(on.world_size, _evaluate, folder, on, f"{name}.json",
                     {"load": str(folder / "experts")})
    one, many = (json.loads((folder / f"{name}.json").read_text())["tasks"]["mixed"]["questions"]
                 for name in ("experts-1", f"experts-{layout}"))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a["log_likelihood"], b["log_likelihood"], rtol=RTOL)
        assert a["answered"] == b["answered"]


def test_the_output_says_what_was_scored(folder, scored):
    output, _ = scored(Layout())
    assert output["checkpoint"]["iteration"] == 1
    assert output["tokenizer"]["digest"] == digests.file_digest(folder / "tokenizer.model")
    assert output["tokenizer"]["named_by_checkpoint"]
    assert output["tasks"]["mixed"]["digest"] == digests.file_digest(folder / "mixed.jsonl")
    assert (output["seq_length"], output["layout"]["ranks"]) == (48, 1)
    questions = multiple_choice.read_questions(folder / "mixed.jsonl")
    assert [q["answer"] for q in output["tasks"]["mixed"]["questions"]] == \
        [question.answer for question in questions]


def _command(folder):
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        cli.call(cli.make_parser().parse_args([
            "evaluate", "--load", str(folder / "unnamed"), "--tasks", str(folder / "mixed.jsonl"),
            str(folder / "biased.jsonl"), "--tokenizer-model", str(folder / "tokenizer.model"),
            "--output", str(folder / "command.json"), "--vocab-size", str(VOCAB_SIZE)]))
    return printed.getvalue()


def test_the_command_prints_a_table(folder, scored):
    scored(Layout())
    printed, = run_on_ranks(1, _command, folder)
    assert "unnamed/iter_0000001 does not record the tokenizer" in printed
    header, _, mixed, biased, path = printed.splitlines()[1:]
    assert header.split() == ["task", "questions", "acc", "acc_norm", "acc_token", "chance",
                              "cut", "merged"]
    result = json.loads((folder / "command.json").read_text())["results"]["mixed"]
    assert mixed.split()[:5] == ["mixed", "22", f"{result['acc']:.4f}", "±",
                                 f"{result['acc_stderr']:.4f}"]
    assert biased.startswith("biased") and path.endswith("command.json")


def test_ties_go_to_the_lower_number():
    assert best_choice(np.array([-30.0, -20.0, -20.0 + 1e-5, -20.1])) == 1
    assert best_choice(np.array([-30.0, -20.0, -19.99])) == 2


def test_one_question_has_no_standard_error():
    answered = [{"answer": 1, "answered": {"acc": 1, "acc_norm": 0, "acc_token": 1},
                 "bytes": [1, 1], "distinct": 2, "cut": False, "merged": False}]
    result = accuracies(answered)
    assert (result["acc"], result["acc_norm"], result["acc_stderr"]) == (1, 0, None)


# --- what is refused ----------------------------------------------------------------------------


def _errors(folder, cases):
    """What each case is refused with, on this one of two data-parallel ranks."""
    messages = []
    for settings in cases:
        with pytest.raises(UserError) as error:
            _evaluate(folder, Layout(), "refused.json", settings)
        messages.append(str(error.value))
    return messages


def test_what_is_refused(folder, weights):
    tokenizer.train_model(folder / "other.model", iter(["the sky is blue"] * 50), 280)
    tokenizer.train_model(folder / "large.model", iter(
        _words(np.random.default_rng(3), 9) for _ in range(200)), VOCAB_SIZE + 9)
    (folder / "again").mkdir()
    _write(folder / "again" / "mixed.jsonl", _records())
    _write(folder / "bad.jsonl", [*_records()[:2], {"context": "c", "choices": ["a", "b"]}])
    _write(folder / "long.jsonl", [{"context": "c", "choices": ["a", "sea " * 40], "answer": 0}])
    cases = [
        ({"tokenizer_model": str(folder / "other.model")},
         "other.model (digest"),
        ({"eod_token": "<|none|>"}, "has no <|none|>. Correct --eod-token"),
        ({"tokenizer_model": str(folder / "gone.model")},
         "gone.model does not exist. Correct --tokenizer-model"),
        ({"tokenizer_model": str(folder / "large.model"), "load": str(folder / "unnamed")},
         f"large.model has {VOCAB_SIZE + 9} entries, but the model in"),
        ({"load": str(folder / "nowhere")}, "nowhere holds no Megatron distributed checkpoint"),
        ({"tasks": (str(folder / "mixed.jsonl"), str(folder / "again" / "mixed.jsonl"))},
         "two files of --tasks have the name mixed"),
        ({"tasks": (str(folder / "bad.jsonl"),)}, 'bad.jsonl:3: "answer" says which choice'),
        ({"tasks": (str(folder / "long.jsonl"),)}, "long.jsonl:1: choice 1 has"),
        ({"output": str(folder)}, "is a folder. Name a file with --output"),
        ({"micro_batch_size": 0}, "--micro-batch-size is 0: it must be at least 1"),
        ({"load": str(folder / "diverged")}, "gives no finite likelihood to"),
    ]
    for messages in run_on_ranks(2, _errors, folder, [settings for settings, _ in cases]):
        for message, (_, expected) in zip(messages, cases, strict=True):
            assert expected in message
        assert "is not the tokenizer that" in messages[0]
    assert not (folder / "refused.json").exists()
