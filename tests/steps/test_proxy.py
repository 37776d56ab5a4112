"""Which smaller models may judge for a large one; what they find is in tests/commands."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_direct.errors import UserError
from megatron_direct.mcore.checkpoint import Checkpoint
from megatron_direct.steps.proxy import _require_same_tokenizer


def _checkpoint(**arguments) -> Checkpoint:
    return Checkpoint(Path("theta"), 1, arguments, has_optimizer=False, digest="00ff")


def _onset(**arguments) -> SimpleNamespace:
    return SimpleNamespace(checkpoint=_checkpoint(**arguments),
                           job=SimpleNamespace(model=SimpleNamespace(vocab_size=90)))


def test_digests_of_the_tokenizers_decide_where_both_are_known():
    _require_same_tokenizer("small", _checkpoint(tokenizer_digest="aa", vocab_size=96),
                            _onset(tokenizer_digest="aa"))  # one of them was padded
    with pytest.raises(UserError, match="--proxy-load small .* of digest bb, theta with one of "
                                        "digest aa. Expected a smaller model of the same"):
        _require_same_tokenizer("small", _checkpoint(tokenizer_digest="bb", vocab_size=90),
                                _onset(tokenizer_digest="aa"))


def test_else_sizes_of_the_vocabulary_decide():
    for same in ({"vocab_size": 90}, {}):
        _require_same_tokenizer("small", _checkpoint(**same), _onset(tokenizer_digest="aa"))
    with pytest.raises(UserError, match="vocabulary of 91 entries, theta one of 90"):
        _require_same_tokenizer("small", _checkpoint(vocab_size=91), _onset())
