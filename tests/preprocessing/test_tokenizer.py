"""Both kinds of tokenizers against the libraries themselves."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import tokenizer

TEXTS = ["the end of annealing", "learning rates\n  fall", "", "naïve 漢 text"]
CORPUS = TEXTS * 50


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """A byte-level BPE that truncates, pads and puts a token in front by default."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<begin>", "<end>", "<other>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(CORPUS, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<begin> $A", special_tokens=[("<begin>", 0)])
    model.enable_truncation(3)
    model.enable_padding()
    folder = tmp_path_factory.mktemp("hugging_face")
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    return folder


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentence_piece") / "tokenizer.model"
    tokenizer.train_model(path, iter(CORPUS), 320)
    return path


def test_hugging_face_gives_the_text_and_no_more(hugging_face):
    from tokenizers import Tokenizer

    model = tokenizer.load_tokenizer(hugging_face, None, append_eod=True)
    plain = Tokenizer.from_file(str(hugging_face / "tokenizer.json"))
    ids = [tokens.tolist() for tokens in model.encode(TEXTS)]
    assert [plain.decode(i) for i in ids] == TEXTS
    assert max(map(len, ids)) > 3 and ids[2] == []  # neither cut nor filled
    assert model.vocab_size == plain.get_vocab_size() and model.eod == 1
    assert tokenizer.load_tokenizer(hugging_face / "tokenizer.json", "<other>", True).eod == 2


def test_hugging_face_agrees_with_megatron(hugging_face):
    """Megatron-LM reads the same file through transformers."""
    pytest.importorskip("transformers")
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(hugging_face / "tokenizer.json"))
    loaded = tokenizer.load_tokenizer(hugging_face, None, False)
    ours = [ids.tolist() for ids in loaded.encode(TEXTS)]
    assert ours == [theirs.convert_tokens_to_ids(theirs.tokenize(text)) for text in TEXTS]


def test_sentence_piece_gives_the_text_back(sentence_piece):
    import sentencepiece

    model = tokenizer.load_tokenizer(sentence_piece, None, append_eod=True)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(sentence_piece))
    ids = model.encode(TEXTS)
    assert [tokens.tolist() for tokens in ids] == plain.encode(TEXTS)
    assert [plain.decode(tokens.tolist()) for tokens in ids] == TEXTS
    assert (model.vocab_size, model.eod) == (320, plain.eos_id())
    assert tokenizer.load_tokenizer(sentence_piece, "<s>", True).eod == plain.bos_id()


def test_a_missing_end_is_reported(hugging_face, sentence_piece, tmp_path):
    alone = tmp_path / "tokenizer.json"  # no file beside it says what ends a text
    alone.write_bytes((hugging_face / "tokenizer.json").read_bytes())
    assert tokenizer.load_tokenizer(alone, None, append_eod=False).eod is None
    with pytest.raises(UserError, match="names no end-of-document token.*--eod-token"):
        tokenizer.load_tokenizer(alone, None, append_eod=True)
    with pytest.raises(UserError, match="has no <gone>.*--eod-token"):
        tokenizer.load_tokenizer(sentence_piece, "<gone>", append_eod=True)


def test_a_sentence_piece_model_without_an_end_is_reported(tmp_path):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model,
                                             vocab_size=26, eos_id=-1, minloglevel=2)
    (tmp_path / "a.model").write_bytes(model.getvalue())
    with pytest.raises(UserError, match="names no end-of-document token"):
        tokenizer.load_tokenizer(tmp_path / "a.model", None, append_eod=True)


@pytest.mark.parametrize(("name", "match"), [
    ("a.model", "a.model is not a SentencePiece model.*--tokenizer-model"),
    ("a.json", "a.json is not a tokenizer.json.*--tokenizer-model"),
])
def test_files_that_are_not_tokenizers_are_reported(tmp_path, name, match):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=match):
        tokenizer.load_tokenizer(tmp_path / name, None, False)


def test_a_folder_without_a_tokenizer_is_reported(tmp_path):
    with pytest.raises(UserError, match="tokenizer.json does not exist"):
        tokenizer.load_tokenizer(tmp_path, None, False)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_config_is_reported(hugging_face, tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes((hugging_face / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer_config.json does not name an end.*--eod-token"):
        tokenizer.load_tokenizer(tmp_path, None, append_eod=False)


def test_what_may_end_a_document(hugging_face, sentence_piece):
    model = tokenizer.load_tokenizer(hugging_face, None, False)
    assert tokenizer.end_tokens(model) == {0, 1, 2}
    text = next(iter(model.encode(["a"])[0].tolist()))
    assert text not in tokenizer.end_tokens(model)
    model = tokenizer.load_tokenizer(sentence_piece, None, False)
    assert tokenizer.end_tokens(model) == {1, 2}  # <s> and </s>
    named = tokenizer.load_tokenizer(sentence_piece, "\n", True)
    assert tokenizer.end_tokens(named) == {1, 2, named.eod}


@pytest.mark.parametrize("vocab_size", [100, 65499, 65500, 300_000])
def test_tokens_are_stored_as_megatron_stores_them(vocab_size):
    from megatron.core.datasets.indexed_dataset import DType

    assert tokenizer.token_dtype(vocab_size) is DType.optimal_dtype(vocab_size)
    assert np.iinfo(tokenizer.token_dtype(vocab_size)).max >= vocab_size - 1
