"""The tokenizer that a model was trained with."""

from __future__ import annotations

from pathlib import Path

from megatron_direct.config import ModelConfig
from megatron_direct.errors import UserError
from megatron_direct.mcore.checkpoint import Checkpoint
from megatron_direct.preprocessing import tokenizer
from megatron_direct.runtime import digests


def tokenizer_of(path: str, checkpoint: Checkpoint, model: ModelConfig,
                 eod_token: str | None = None):
    """The tokenizer of ``--tokenizer-model``, on rank 0.

    Raises UserError if it is not the one that the model was trained with, and if it lacks the
    end-of-document token that is asked for.
    """
    if not Path(path).exists():
        raise UserError(f"{path} does not exist. Correct --tokenizer-model.")
    file = tokenizer.model_file(Path(path))
    wanted, digest = checkpoint.tokenizer_digest, digests.file_digest(file)
    if wanted is not None and digest != wanted:
        raise UserError(f"{file} (digest {digest}) is not the tokenizer that {checkpoint.path} was "
                        f"trained with (digest {wanted}). Give that one with --tokenizer-model.")
    loaded = tokenizer.load_tokenizer(file, eod_token, append_eod=False)
    if eod_token is not None and loaded.eod is None:
        raise UserError(f"{file} has no {eod_token}. Correct --eod-token.")
    if loaded.vocab_size > model.known_vocab_size:
        raise UserError(f"{file} has {loaded.vocab_size} entries, but the model in "
                        f"{checkpoint.path} has {model.vocab_size}. Give the model's tokenizer "
                        "with --tokenizer-model.")
    if wanted is None:
        print(f"{checkpoint.path} does not record the tokenizer it was trained with; {file} is "
              "assumed", flush=True)
    return loaded
