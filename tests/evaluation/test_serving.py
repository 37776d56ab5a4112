"""A sharded model that answers a program on rank 0, against plain torch in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_gpt import PlainGPT
from ranks import LAYOUTS, Layout, RankError, on_layout
from tiny_models import MODELS, VOCAB_SIZE
from weights import assemble, fill_by_hash, pieces

from megatron_direct.config import Job
from megatron_direct.evaluation.choices import EncodedChoice
from megatron_direct.evaluation.serving import ServedModel

MODEL = MODELS["llama-untied"]
# fp32 against double precision, relative to sums of up to 8 log-likelihoods.
RTOL = 1e-5


def _texts():
    """(tokens, how many of the last ones are scored), of 2 to 9 tokens."""
    rng = np.random.default_rng(4)
    texts = [rng.integers(0, VOCAB_SIZE, 2 + number % 8) for number in range(11)]
    return [(text, 1 + number % (len(text) - 1)) for number, text in enumerate(texts)]


def _encoded(texts):
    return [EncodedChoice(np.asarray(tokens, np.int64), scored, False, False)
            for tokens, scored in texts]


def _served(model, layout, fails=False):
    from megatron_direct.mcore import model as models
    from megatron_direct.mcore.shards import parameter_shards

    chunks = models.build(Job(model, layout))
    shards = parameter_shards(chunks)
    fill_by_hash(shards)
    whole = pieces(shards, [shard.parameter for shard in shards])

    def program(ask):
        answers = ask(_encoded(_texts()))
        if fails:
            raise LookupError("the program failed")
        # A text that is continued greedily, one token an answer.
        tokens = [3, 7]
        while len(tokens) < model.seq_length:
            tokens.append(int(ask(_encoded([([*tokens, 0], 1)])).last_tokens[0]))
        return answers, tokens

    return whole, ServedModel(chunks, 3, VOCAB_SIZE).serve(program)


FEW = (Layout(), Layout(tp=2, pp=2), Layout(dp=2))


@pytest.mark.parametrize("layout", [
    *FEW, *(pytest.param(layout, marks=pytest.mark.slow) for layout in LAYOUTS
            if layout not in FEW)], ids=str)
def test_answers_are_those_of_plain_torch(layout):
    ranks = on_layout(layout, _served, MODEL)
    weights = assemble([whole for whole, _ in ranks])
    plain = PlainGPT(MODEL, {name: matrix.shape for name, matrix in weights.items()})
    vector = plain.flatten(weights).double()
    assert all(result is None for _, result in ranks[1:])
    answers, continued = ranks[0][1]
    greedy = []
    for number, (tokens, scored) in enumerate(_texts()):
        logits, = plain.all_logits(vector, [tokens])
        at_label = torch.log_softmax(logits, -1)[range(len(tokens) - 1), tokens[1:]]
        assert answers.log_likelihoods[number] == pytest.approx(
            float(at_label[-scored:].sum()), rel=RTOL)
        # The padded vocabulary has 64 entries, of which 48 are tokens.
        likeliest = logits[:, :VOCAB_SIZE].argmax(1).numpy()
        assert answers.last_tokens[number] == likeliest[-1]
        greedy.append((likeliest[-scored:] == tokens[-scored:]).all())
        assert answers.are_likeliest[number] == greedy[-1]
    expected = [3, 7]
    while len(expected) < MODEL.seq_length:
        logits, = plain.all_logits(vector, [[*expected, 0]])
        expected.append(int(logits[-1, :VOCAB_SIZE].argmax()))
    assert continued == expected


def test_what_is_likeliest_is_told_from_what_is_not():
    """Of a text's own greedy continuation, every token is; of another one, not."""
    (whole, (_, tokens)), = on_layout(Layout(), _served, MODEL)
    (_, answers), = on_layout(Layout(), _asked, MODEL, [
        (tokens, len(tokens) - 2), ([*tokens[:-1], (tokens[-1] + 1) % VOCAB_SIZE], 2)])
    assert answers.are_likeliest.tolist() == [True, False]


def _asked(model, layout, texts):
    from megatron_direct.mcore import model as models
    from megatron_direct.mcore.shards import parameter_shards

    chunks = models.build(Job(model, layout))
    fill_by_hash(parameter_shards(chunks))
    return None, ServedModel(chunks, 3, VOCAB_SIZE).serve(lambda ask: ask(_encoded(texts)))


def test_what_the_program_raises_is_raised_on_all_ranks():
    with pytest.raises(RankError) as raised:
        on_layout(Layout(tp=2, pp=2), _served, MODEL, True)
    assert str(raised.value).count("LookupError: the program failed") >= 4
