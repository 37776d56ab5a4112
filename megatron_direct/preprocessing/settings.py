"""Everything that a user chooses about a run of preprocessing, checked in one place."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import formats, splits
from megatron_direct.preprocessing.documents import Fields

SAMPLES = ("document", "window")
LONGEST_OUTPUT = 120  # bytes of the last part of --output-prefix
LARGEST_SHARD = 1 << 20  # MiB; a worker holds a shard in memory


@dataclass(frozen=True)
class PreprocessSettings:
    """One attribute for each flag of the command. Raises UserError for a wrong value."""

    input: tuple[Path, ...]
    output_prefix: str
    tokenizer_model: Path
    json_keys: tuple[str, ...] = ("text",)
    skip_bad_lines: bool = False
    domain: str | None = None  # one domain for all files; None: each file's stem
    domain_key: str | None = None
    split: str = "100,0,0"  # shares of splits.SPLITS
    group_key: str | None = None
    exclude: tuple[str, ...] = ()
    drop_duplicates: bool = False
    train_tokenizer: bool = False
    vocab_size: int = 8192  # of a tokenizer that is trained; about that of a small model
    append_eod: bool = False
    eod_token: str | None = None  # None: the one that the tokenizer names
    samples: str = "document"  # or "window"
    seq_length: int | None = None  # tokens of a window
    workers: int = 1
    shard_size: float = 16.0  # MiB
    seed: int = 1234  # Megatron's default
    corrupt_fraction: float = 0.0

    def __post_init__(self):
        splits.parse_split(self.split)
        self._check_numbers()
        self._check_keys()
        self._check_names()
        self._check_samples()
        self._check_tokenizer()
        self._check_domains()

    def _check_numbers(self) -> None:
        if self.workers < 1:
            raise UserError(f"--workers {self.workers} leaves no process to do the work. Give 1 or "
                            "more.")
        if not 0 < self.shard_size <= LARGEST_SHARD:
            raise UserError(f"--shard-size {self.shard_size} is not a size in MiB. Give a number "
                            f"above 0, at most {LARGEST_SHARD}; 16 suits most inputs.")
        if not 0 <= self.corrupt_fraction <= 1:
            raise UserError(f"--corrupt-fraction {self.corrupt_fraction} is not a share. Give a "
                            "number from 0 to 1.")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed} is negative. Give 0 or more.")

    def _check_names(self) -> None:
        name = os.path.basename(self.output_prefix)
        if len(name.encode()) > LONGEST_OUTPUT:
            raise UserError(f"--output-prefix ends in a name of {len(name.encode())} bytes, which "
                            "leaves no room for the domain in the names of files. Give one of at "
                            f"most {LONGEST_OUTPUT}.")

    def _check_keys(self) -> None:
        if not self.input:
            raise UserError("--input names no file. Give one or more.")
        if not self.json_keys:
            raise UserError("--json-keys names no key. Give at least the one that holds the text.")
        for flag, value in (("--json-keys", self.json_keys), ("--group-key", self.group_key),
                            ("--domain-key", self.domain_key), ("--domain", self.domain),
                            ("--eod-token", self.eod_token), ("--exclude", self.exclude),
                            ("--output-prefix", self.output_prefix)):
            if "" in (value if isinstance(value, tuple) else (value,)):
                raise UserError(f"{flag} is empty. Give a name, or leave the flag out.")
        texts = [path for path in self.input if formats.format_of(path) == "text"]
        unread = [flag for flag, is_given in (
            ("--group-key", self.group_key), ("--domain-key", self.domain_key),
            ("--json-keys", len(texts) == len(self.input) and self.json_keys != ("text",)))
            if is_given]
        if texts and unread:
            raise UserError(f"{' and '.join(unread)}: {texts[0]} is read as plain text, for its "
                            "name, and has no keys. Name records .jsonl or .parquet, or leave the "
                            "flag out.")

    def _check_samples(self) -> None:
        if self.samples not in SAMPLES:
            raise UserError(f"--samples {self.samples} is not one of {', '.join(SAMPLES)}.")
        if (self.samples == "window") != (self.seq_length is not None):
            raise UserError("--samples window and --seq-length go together: a window is as long as "
                            "a training sequence. Give both, or neither.")
        if self.seq_length is not None and self.seq_length < 2:
            raise UserError(f"--seq-length {self.seq_length} leaves no token to predict. Give the "
                            "sequence length of the model.")

    def _check_tokenizer(self) -> None:
        if self.vocab_size < 1:
            raise UserError(f"--vocab-size {self.vocab_size} holds no token. Give the number of "
                            "entries that the tokenizer should have.")
        if self.eod_token is not None and not self.append_eod and not self.exclude:
            raise UserError(f"--eod-token {self.eod_token} ends no document without --append-eod. "
                            "Add that flag, or leave this one out.")
        if not self.train_tokenizer:
            if self.vocab_size != PreprocessSettings.vocab_size:
                raise UserError(f"--vocab-size {self.vocab_size} is of a tokenizer that "
                                "--train-tokenizer trains. Add that flag, or leave this one out.")
            return
        if self.tokenizer_model.suffix == ".json" or self.tokenizer_model.is_dir():
            raise UserError(f"--tokenizer-model {self.tokenizer_model} names a Hugging Face "
                            "tokenizer, but --train-tokenizer writes a SentencePiece model. Name a "
                            "file such as tokenizer.model, or leave --train-tokenizer out.")

    def _check_domains(self) -> None:
        if self.domain is not None and self.domain_key is not None:
            raise UserError("--domain and --domain-key both name the domain. Give one of them.")
        if self.domain is None and self.domain_key is None:
            stems = Counter(formats.stem(path) for path in self.input)
            twice = sorted(stem for stem, count in stems.items() if count > 1)
            if twice:
                raise UserError("two files of --input have the same name, and so the same domain: "
                                f"{', '.join(twice)}. Rename one, or name the domain of all files "
                                "with --domain.")

    @property
    def folder(self) -> Path:
        """Where shards are kept until the datasets are written."""
        return Path(f"{self.output_prefix}.shards")

    @property
    def shard_bytes(self) -> int:
        return max(1, int(self.shard_size * 2**20))

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """Of splits.SPLITS; they sum to one."""
        return splits.parse_split(self.split)

    @cached_property
    def fields(self) -> Fields:
        return Fields(self.json_keys, self.group_key, self.domain_key, self.domain)
