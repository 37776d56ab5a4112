"""The command that repeats a comparison, written from its record."""

from __future__ import annotations

import shlex
from pathlib import Path

from megatron_direct.comparison.summary import ComparisonSummary
from megatron_direct.config import ModelConfig
from megatron_direct.settings import flag_name

_WIDTH = 96


def repeat_command(summary: ComparisonSummary) -> str:
    """``megatron-direct compare`` with the flags that the run had.

    The architecture is the checkpoint's, so its flags are left out.
    """
    setting, identity = summary.setting, summary.identity
    flags = {"run_dir": "RUN_DIR", "name": setting.name, "num_seeds": len(setting.seeds),
             "arms": list(setting.arms), "tokenizer_model": setting.tokenizer_model}
    flags |= {key: value for key, value in identity.items()
              if key not in ModelConfig.__dataclass_fields__}
    lines = ["megatron-direct compare"]
    for key, value in flags.items():
        if value in (None, "", []):
            continue
        if isinstance(value, bool):
            lines.append(flag_name(key) if value else flag_name("no_" + key))
        else:
            values = value if isinstance(value, list) else [value]
            lines.append(_wrapped([flag_name(key), *(shlex.quote(_shown(v)) for v in values)]))
    return " \\\n    ".join(lines)


def _shown(value) -> str:
    """Paths below the working directory as seen from it."""
    text = str(value)
    here = f"{Path.cwd()}/"
    return text[len(here):] if text.startswith(here) else text


def _wrapped(words: list[str]) -> str:
    """Over several lines where they are long; a word stays whole, whatever is in it."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) > _WIDTH:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n        ".join(lines)
