"""Tokenizers: SentencePiece models, and the tokenizer.json of Hugging Face.

Both turn text into ids alone: no token is put before or behind a document but the end-of-document
token that the caller asks for, as Megatron-LM's tools/preprocess_data.py does. Hugging Face
tokenizers are read with the package ``tokenizers``, which holds the same Rust code that
``transformers`` calls, at a hundredth of the import.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import optional
from megatron_direct.runtime import files

# What the trainer holds in memory, about ten times over.
TRAINING_BYTES = 256 << 20
TRAINING_DOCUMENTS = 1_000_000


class SentencePiece:
    def __init__(self, path: Path, eod_token: str | None):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path} is no SentencePiece model ({error}). Correct "
                            "--tokenizer-model; a Hugging Face tokenizer is a .json file."
                            ) from error
        self.vocab_size: int = self._model.vocab_size()
        if eod_token is None:
            self.eod = self._model.eos_id() if self._model.eos_id() >= 0 else None
        else:
            number = self._model.piece_to_id(eod_token)
            self.eod = number if self._model.id_to_piece(number) == eod_token else None

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        if hasattr(self._model, "encode_as_numpy"):  # in new versions; spares a tenth of the time
            return [self._model.encode_as_numpy(text) for text in texts]
        return [np.array(self._model.encode(text), np.int32) for text in texts]

    def decode(self, tokens: np.ndarray) -> str:
        return self._model.decode([int(token) for token in tokens])


class HuggingFace:
    def __init__(self, path: Path, eod_token: str | None):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are many already
        tokenizers = optional.require("tokenizers", f"{path}, a Hugging Face tokenizer,", "data")
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exceptions
            raise UserError(f"{path} is no tokenizer.json ({error}). Correct --tokenizer-model."
                            ) from error
        self._model.no_truncation()
        self._model.no_padding()
        # An id may lie beyond the number of entries where a vocabulary has gaps.
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        eod_token = eod_token or _eos_token(path.parent)
        self.eod = None if eod_token is None else self._model.token_to_id(eod_token)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, tokens: np.ndarray) -> str:
        return self._model.decode([int(token) for token in tokens])


def _eos_token(folder: Path) -> str | None:
    """What the files beside a tokenizer.json name as the end of a text."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            token = json.loads((folder / name).read_text()).get("eos_token")
            if token is not None:
                return token["content"] if isinstance(token, dict) else token
    return None


def model_file(path: Path) -> Path:
    """The file that is the tokenizer: ``path``, or the tokenizer.json of a folder."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} does not exist. Correct --tokenizer-model, or add "
                        "--train-tokenizer to make it.")
    return file


def load(path: Path, eod_token: str | None, append_eod: bool) -> SentencePiece | HuggingFace:
    """With ``vocab_size``, ``eod`` (id or None) and ``encode(texts)``: int32 arrays.

    Raises UserError where ``append_eod`` asks for a token that there is not.
    """
    file = model_file(path)
    tokenizer = (HuggingFace if file.suffix == ".json" else SentencePiece)(file, eod_token)
    if append_eod and tokenizer.eod is None:
        lacks = "names no end-of-document token" if eod_token is None else f"has no {eod_token}"
        raise UserError(f"{file} {lacks}, which --append-eod needs. Name one with --eod-token.")
    return tokenizer


def token_dtype(vocab_size: int) -> type[np.integer]:
    """How Megatron stores the tokens of a vocabulary: DType.optimal_dtype."""
    return np.uint16 if vocab_size < 65500 else np.int32


def train(path: Path, texts: Iterator[str], vocab_size: int) -> None:
    """Trains a SentencePiece model. ``texts`` must fit into memory ten times over."""
    import sentencepiece

    with files.written_whole(path) as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts, model_writer=model, vocab_size=vocab_size,
            # Text is kept as it is, line ends and indentation included: some of it is code.
            model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=False, user_defined_symbols=["\n"], byte_fallback=True,
            character_coverage=0.9995, input_sentence_size=TRAINING_DOCUMENTS,
            shuffle_input_sentence=False, max_sentence_length=1 << 20, num_threads=1,
            minloglevel=2)
