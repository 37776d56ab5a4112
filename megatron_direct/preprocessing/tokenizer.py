"""Tokenizers: SentencePiece models, and the tokenizer.json of Hugging Face.

Both turn text into ids alone: no token is added before or after a document but the end-of-document
token that the caller asks for, as in Megatron-LM's tools/preprocess_data.py. Hugging Face
tokenizers are read with the package ``tokenizers``, which holds the same Rust code that
``transformers`` calls, and is imported a hundred times faster.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import optional
from megatron_direct.runtime import digests, files

# SentencePiece's trainer leaves out, without a word, every sentence that holds the character with
# which it marks unknown ones, or that is longer than it was told to take.
_RESERVED = "\N{LOWER FIVE EIGHTHS BLOCK}"
_LONGEST_SENTENCE = 1 << 20  # bytes; a character has at most four


class SentencePiece:
    def __init__(self, path: Path, eod_token: str | None):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            # A piece that is not UTF-8 would end the decoding of any text that it is in.
            self._model.id_to_piece(list(range(self._model.vocab_size())))
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not a SentencePiece model ({error}). Correct "
                            "--tokenizer-model; a Hugging Face tokenizer is a .json file."
                            ) from error
        self.library = f"sentencepiece {sentencepiece.__version__}"
        self.vocab_size: int = self._model.vocab_size()
        self.eod: int | None = self._model.eos_id() if self._model.eos_id() >= 0 else None
        if eod_token is not None:
            number = self._model.piece_to_id(eod_token)
            self.eod = number if self._model.id_to_piece(number) == eod_token else None

    @property
    def special_tokens(self) -> frozenset[int]:
        """Ids that stand for no text."""
        return frozenset(filter(self._model.is_control, range(self.vocab_size)))

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        if hasattr(self._model, "encode_as_numpy"):  # in new versions; saves a tenth of the time
            return [self._model.encode_as_numpy(text) for text in texts]
        return [np.array(self._model.encode(text), np.int32) for text in texts]

    def decode(self, tokens: np.ndarray) -> str:
        return self._model.decode([int(token) for token in tokens])


class HuggingFace:
    def __init__(self, path: Path, eod_token: str | None):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for each core already
        tokenizers = optional.require("tokenizers", f"{path}, a Hugging Face tokenizer,", "data")
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except BaseException as error:  # bare Exceptions, and panics of Rust, which are not even
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UserError(f"{path} is not a tokenizer.json ({error}). Correct --tokenizer-model."
                            ) from error
        self._model.no_truncation()
        self._model.no_padding()
        self.library = f"tokenizers {tokenizers.__version__}"
        # An id may lie beyond the number of entries where a vocabulary has gaps.
        self.vocab_size: int = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        eod_token = eod_token or _eos_token(path.parent)
        self.eod: int | None = None if eod_token is None else self._model.token_to_id(eod_token)

    @property
    def special_tokens(self) -> frozenset[int]:
        """Ids that stand for no text."""
        added = self._model.get_added_tokens_decoder()
        return frozenset(number for number, token in added.items() if token.special)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._model.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, tokens: np.ndarray) -> str:
        return self._model.decode([int(token) for token in tokens])


Tokenizer = SentencePiece | HuggingFace


def _eos_token(folder: Path) -> str | None:
    """The end of a text, as the files beside a tokenizer.json name it."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            try:
                token = json.loads((folder / name).read_bytes()).get("eos_token")
                token = token["content"] if isinstance(token, dict) else token
                if token is not None and not isinstance(token, str):
                    raise ValueError(f"its eos_token is {token!r:.60}")
                (token or "").encode()  # half of a surrogate pair is JSON, but no token
            except (ValueError, AttributeError, KeyError, RecursionError) as error:
                raise UserError(f"{folder / name} does not name an end of texts as a "
                                f"tokenizer_config.json does ({error}). Correct it, or name the "
                                "token with --eod-token.") from error
            if token is not None:
                return token
    return None


def model_file(path: Path) -> Path:
    """The file that is the tokenizer: ``path``, or the tokenizer.json of a folder."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file} does not exist. Correct --tokenizer-model, or add "
                        "--train-tokenizer to make it.")
    return file


def load_tokenizer(path: Path, eod_token: str | None, append_eod: bool) -> Tokenizer:
    """With ``vocab_size``, ``eod`` (id or None) and ``encode(texts)``: int32 arrays.

    Raises UserError where ``append_eod`` asks for a token that the model lacks.
    """
    file = model_file(path)
    tokenizer = (HuggingFace if file.suffix == ".json" else SentencePiece)(file, eod_token)
    if append_eod and tokenizer.eod is None:
        lacks = "names no end-of-document token" if eod_token is None else f"has no {eod_token}"
        raise UserError(f"{file} {lacks}, which --append-eod needs. Name one with --eod-token.")
    return tokenizer


@dataclass(frozen=True)
class TokenizerIdentity:
    """What the tokens of a text depend on."""

    digest: str  # of the model's file
    library: str  # that reads it, with its version
    vocab_size: int
    eod: int | None


def digest_of(path: Path) -> str:
    return digests.file_digest(model_file(path))


def identify(path: Path, tokenizer: Tokenizer) -> TokenizerIdentity:
    return TokenizerIdentity(digest_of(path), tokenizer.library, tokenizer.vocab_size,
                             tokenizer.eod)


def end_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """What may end a document: the end-of-document token, and whatever stands for no text."""
    return tokenizer.special_tokens | ({tokenizer.eod} if tokenizer.eod is not None else set())


def token_dtype(vocab_size: int) -> type[np.integer]:
    """How Megatron stores the tokens of a vocabulary: DType.optimal_dtype."""
    return np.uint16 if vocab_size < 65500 else np.int32


def train_model(path: Path, texts: Iterator[str], vocab_size: int) -> None:
    """Trains a SentencePiece model. ``texts`` must fit into memory ten times over.

    Raises UserError where the size does not suit the texts, and what ``texts`` raises.
    """
    import sentencepiece

    errors: list[Exception] = []
    try:
        with files.written_whole(path) as model:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_noting_errors(_sentences(texts), errors), model_writer=model,
                vocab_size=vocab_size,
                # Text is kept as it is, line ends and indentation included: some of it is code.
                model_type="bpe", normalization_rule_name="identity",
                remove_extra_whitespaces=False, add_dummy_prefix=False,
                user_defined_symbols=["\n"], byte_fallback=True, character_coverage=0.9995,
                input_sentence_size=0, shuffle_input_sentence=False,  # all of them
                max_sentence_length=_LONGEST_SENTENCE, num_threads=1, minloglevel=2)
    except RuntimeError as error:
        raise (errors or [_training_error(str(error), vocab_size)])[0] from error


def _sentences(texts: Iterator[str]) -> Iterator[str]:
    """The texts, cut where the trainer would leave one out."""
    step = _LONGEST_SENTENCE // 4
    for text in texts:
        for part in text.split(_RESERVED):
            for start in range(0, len(part), step):
                yield part[start: start + step]


def _noting_errors(texts: Iterator[str], errors: list[Exception]) -> Iterator[str]:
    """The texts; the library makes a RuntimeError of what their iterator raises."""
    try:
        yield from texts
    except Exception as error:
        errors.append(error)
        raise


def _training_error(message: str, vocab_size: int) -> UserError:
    largest = re.search(r"too high.*value <= (\d+)", message)
    smallest = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if largest:
        return UserError(f"--vocab-size {vocab_size} is too large: the pool documents of --input "
                         f"give at most {largest[1]} entries. Give --vocab-size {largest[1]} or "
                         "less, or more text.")
    if smallest:
        return UserError(f"--vocab-size {vocab_size} is too small: the characters of --input and "
                         f"the 256 bytes alone take {smallest[1]} entries. Give more.")
    if "sentences_.empty()" in message:
        return UserError("--train-tokenizer found no pool document with text. Correct --input, or "
                         "--split.")
    return UserError(f"--train-tokenizer failed in SentencePiece ({message}). Correct --input, or "
                     f"--vocab-size {vocab_size}.")
