"""All of it in order: tokenizer, shards, duplicates, merge, report."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import (
    documents,
    duplicates,
    merge,
    processes,
    reading,
    shards,
    splits,
    tokenizer,
)
from megatron_direct.preprocessing.documents import Document, Fields
from megatron_direct.preprocessing.excluded import ExcludedDataset
from megatron_direct.preprocessing.processes import Ranks
from megatron_direct.preprocessing.reading import Shard, Stream
from megatron_direct.runtime import digests, files

# A --domain-key that names something else, such as an address, would make a file a document.
MAX_DOMAINS = 1000
_BAD_LINES_SHOWN = 5


def preprocess(flags: argparse.Namespace, ranks: Ranks) -> None:
    """The flags are those of tools/preprocess_selection.py. Raises UserError."""
    check(flags)
    fields = Fields(flags.json_keys, flags.group_key, flags.domain_key, flags.domain)
    shard_bytes = max(1, int(flags.shard_size * 2**20))
    work = reading.plan(flags.input, shard_bytes)
    settings = shards.Settings(
        Path(f"{flags.output_prefix}.shards"), fields, splits.parse_split(flags.split), flags.seed,
        flags.tokenizer_model, flags.eod_token, flags.append_eod, flags.skip_bad_lines)

    def prepare() -> tuple[str, list[Shard | Stream]]:
        digest = prepare_tokenizer(flags, settings, work, shard_bytes)
        eod = tokenizer.load(flags.tokenizer_model, flags.eod_token, flags.append_eod).eod
        excluded.extend(ExcludedDataset(prefix, digest, eod) for prefix in flags.exclude)
        shards.open_folder(settings.folder, plan_of(flags, settings, digest))
        todo = shards.unfinished(work, settings.folder)
        if len(todo) < len(work):
            print(f"{settings.folder} has {len(work) - len(todo)} of {len(work)} shards already")
        return digest, todo

    def look_over() -> None:
        if not flags.skip_bad_lines:
            refuse_bad_lines(settings.folder)
        found = duplicates.find(settings.folder, excluded)
        if found.leaks and not flags.drop_duplicates:
            duplicates.refuse_leaks(settings.folder, found, excluded)

    excluded: list[ExcludedDataset] = []
    tokenizer_digest, todo = ranks.on_first(prepare)
    mine = ranks.share(todo, [unit.size for unit in todo])
    with tqdm(unit="B", unit_scale=True, disable=None if ranks.is_first else True) as bar:
        for counts in processes.run(
                shards.tokenize, shards.expand(mine, settings.folder, shard_bytes), flags.workers,
                shards.start, settings):
            bar.update(counts.text)
    ranks.wait()
    shards.require_whole(work, settings.folder)
    ranks.on_first(look_over)
    merge_all(flags, settings, tokenizer_digest, ranks)
    ranks.wait()
    ranks.on_first(lambda: finish(flags, settings.folder))


def prepare_tokenizer(flags: argparse.Namespace, settings: shards.Settings,
                      work: list[Shard | Stream], shard_bytes: int) -> str:
    """The tokenizer's digest. It is trained first if it is to be, and was not for these shards."""
    if flags.train_tokenizer:
        path = flags.tokenizer_model
        plan = path.is_file() and plan_of(flags, settings, digests.file_digest(path))
        if not plan or shards.read_plan(settings.folder) != files.as_json(plan):
            tokenizer.train(path, training_texts(flags, settings, work, shard_bytes),
                            flags.vocab_size)
    return digests.file_digest(tokenizer.model_file(flags.tokenizer_model))


def training_texts(flags: argparse.Namespace, settings: shards.Settings,
                   work: list[Shard | Stream], shard_bytes: int) -> Iterator[str]:
    """The pool documents that come first in each file, so many that memory holds them."""
    file, left = None, 0
    for unit in work:
        if unit.file != file:
            file, left = unit.file, tokenizer.TRAINING_BYTES // len(flags.input)
        for shard in reading.shards_of(unit, shard_bytes):
            if left <= 0:
                break
            for item in documents.checked(shard, settings.fields, flags.skip_bad_lines):
                if left > 0 and isinstance(item, Document) and splits.split_of(
                        item.group, settings.shares, settings.seed) == "pool":
                    left -= len(item.text.encode())
                    yield item.text


def refuse_bad_lines(folder: Path) -> None:
    """Raises UserError for those that an unfinished run with --skip-bad-lines left out."""
    for manifest, before in duplicates.with_lines_before(folder):
        for line, reason in manifest.bad:
            raise UserError(f"{manifest.path}:{before + line + 1} cannot be read ({reason}). Leave "
                            f"such lines out with --skip-bad-lines, or mend it and delete "
                            f"{folder}.")


def merge_all(flags: argparse.Namespace, settings: shards.Settings, tokenizer_digest: str,
              ranks: Ranks) -> None:
    """Writes this rank's share of the prefixes."""
    model = tokenizer.load(flags.tokenizer_model, flags.eod_token, flags.append_eod)
    targets = targets_of(settings.folder, flags.output_prefix)
    mine = ranks.share(list(targets), list(targets.values()))
    merged = processes.run(
        merge.merge, mine, min(flags.workers, len(mine)), merge.start, merge.Settings(
            settings.folder, flags.drop_duplicates, flags.seq_length, flags.corrupt_fraction,
            flags.seed, model.eod if flags.append_eod else None,
            {"tokenizer_digest": tokenizer_digest, "vocab_size": model.vocab_size}))
    for target, card in sorted(merged, key=lambda pair: pair[0].prefix):
        print(describe(target, card), flush=True)


def check(flags: argparse.Namespace) -> None:
    """Raises UserError for flags that make no sense, alone or together."""
    splits.parse_split(flags.split)
    if flags.shard_size <= 0:
        raise UserError(f"--shard-size {flags.shard_size} holds no text. Give some MiB.")
    if (flags.samples == "window") != (flags.seq_length is not None):
        raise UserError("--samples window and --seq-length go together: a window is as long as a "
                        "training sequence. Give both, or neither.")
    if flags.seq_length is not None and flags.seq_length < 2:
        raise UserError(f"--seq-length {flags.seq_length} leaves no label. Give that of the model.")
    if flags.domain_key is None and flags.domain is None:
        stems = [reading.stem(path) for path in flags.input]
        twice = sorted({stem for stem in stems if stems.count(stem) > 1}) \
            if len(set(stems)) < len(stems) else []
        if twice:
            raise UserError("two files of --input have one name, and so would be one domain: "
                            f"{', '.join(twice)}. Rename one, or name the domain of all files with "
                            "--domain.")


def plan_of(flags: argparse.Namespace, settings: shards.Settings, tokenizer_digest: str) -> dict:
    """All that the shards depend on."""
    return {
        "input": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
                  for path in flags.input],
        "json_keys": settings.fields.text, "group_key": settings.fields.group,
        "domain_key": settings.fields.domain, "domain": settings.fields.domain_name,
        "split": settings.shares, "seed": settings.seed, "tokenizer_model": tokenizer_digest,
        "vocab_size": flags.vocab_size if flags.train_tokenizer else None,
        "eod_token": settings.eod_token, "append_eod": settings.append_eod,
        "shard_size": flags.shard_size}


def targets_of(folder: Path, output_prefix: str) -> dict[merge.Target, int]:
    """The prefixes that the shards have documents for, and their tokens."""
    tokens: dict[tuple[str, str], int] = {}
    domains: set[str] = set()
    for manifest in shards.manifests(folder):
        for part in manifest.parts:
            key = part.domain, part.split
            tokens[key] = tokens.get(key, 0) + part.tokens
            domains.add(part.domain)
        if len(domains) > MAX_DOMAINS:
            raise UserError(f"--domain-key gives more than {MAX_DOMAINS} domains, and each becomes "
                            "a dataset. Name a key with fewer values.")
    if not tokens:
        raise UserError("--input holds no document of two tokens or more. Correct --input or "
                        "--json-keys.")
    names: dict[str, str] = {}
    for domain in sorted(domains):
        name = re.sub(r"[^\w.+-]", "_", domain)
        if names.setdefault(name, domain) != domain:
            raise UserError(f"the domains {names[name]!r} and {domain!r} would both be written as "
                            f"{output_prefix}_{name}. Rename one in the input.")
    name_of = {domain: name for name, domain in names.items()}
    return {merge.Target(f"{output_prefix}_{name_of[domain]}_{split}", domain, split): count
            for (domain, split), count in sorted(tokens.items())}


def describe(target: merge.Target, card: dict) -> str:
    what = "documents" if card["samples"] == "document" else "windows"
    notes = [f"{card['documents']} {what}, {card['tokens']} tokens"]
    if card["corrupted"]:
        notes.append(f"{len(card['corrupted'])} corrupted")
    if card.get("tokens_cut"):
        notes.append(f"{card['tokens_cut']} tokens behind the last whole window left out")
    if card["duplicates"] + card["leaked"]:
        notes.append(f"{card['duplicates']} duplicates of an earlier document and {card['leaked']} "
                     f"of held-out ones found, {card['dropped']} dropped")
    return f"{target.prefix}: {', '.join(notes)}" + (
        "" if card["documents"] else "; nothing is left, and nothing written")


def finish(flags: argparse.Namespace, folder: Path) -> None:
    """Reports what was left out, and deletes the shards."""
    too_short = sum(manifest.too_short for manifest in shards.manifests(folder))
    if too_short:
        print(f"{too_short} documents of fewer than two tokens left out")
    listed, shown = Path(f"{flags.output_prefix}_bad_lines.txt"), []
    listed.unlink(missing_ok=True)
    if any(manifest.bad for manifest in shards.manifests(folder)):
        count = 0
        with files.written_whole(listed, "w") as file:
            for manifest, before in duplicates.with_lines_before(folder):
                for line, reason in manifest.bad:
                    text = f"{manifest.path}:{before + line + 1}: {reason}"
                    file.write(text + "\n")
                    count += 1
                    if len(shown) < _BAD_LINES_SHOWN:
                        shown.append("\n  " + text)
        print(f"{count} bad lines left out, all listed in {listed}:{''.join(shown)}")
    shutil.rmtree(folder)
