"""All of it in order: tokenizer, shards, duplicates, datasets, report."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import (
    catalogue,
    duplicates,
    reading,
    shard_folder,
    shards,
    splits,
    tokenizer,
    training,
    workers,
)
from megatron_direct.preprocessing.catalogue import Catalogue, PlannedDataset
from megatron_direct.preprocessing.excluded import ExcludedDataset
from megatron_direct.preprocessing.merge import Card, Merger
from megatron_direct.preprocessing.reading import Shard, Stream
from megatron_direct.preprocessing.settings import PreprocessSettings
from megatron_direct.preprocessing.shares import Ranks
from megatron_direct.preprocessing.tokenizer import TokenizerIdentity
from megatron_direct.preprocessing.tokenizing import ShardTokenizer, expand
from megatron_direct.runtime import files
from megatron_direct.runtime.lock import NAME as LOCK_NAME
from megatron_direct.runtime.lock import Lock

_BAD_LINES_SHOWN = 5


def preprocess(settings: PreprocessSettings, ranks: Ranks) -> None:
    """Writes the datasets. Raises UserError, also where another run writes to the same prefix."""
    prefix = Path(settings.output_prefix)
    lock = Lock(prefix.with_name(f".{prefix.name}{LOCK_NAME}"), prefix,
                "megatron-direct preprocess")
    ranks.on_first(lock.acquire)
    try:
        ranks.on_first(lambda: files.remove_partial(prefix.parent, f"{prefix.name}_*", deep=False))
        _preprocess(settings, ranks)
    finally:
        lock.release()


def _preprocess(settings: PreprocessSettings, ranks: Ranks) -> None:
    work = reading.plan(settings.input, settings.shard_bytes)
    identity = ranks.on_first(lambda: _prepare(settings, work))
    todo = ranks.on_first(lambda: _todo(settings, work))
    mine = ranks.share(todo, [unit.size for unit in todo])
    with tqdm(unit="B", unit_scale=True, disable=None if ranks.is_first else True) as bar:
        for size in workers.work_through(functools.partial(ShardTokenizer, settings),
                                expand(mine, settings.folder, settings.shard_bytes),
                                settings.workers):
            bar.update(size)
    ranks.wait()
    shard_folder.require_whole(work, settings.folder)
    contents = ranks.on_first(lambda: _look_over(settings))
    _merge(settings, identity, contents.targets, ranks)
    ranks.wait()
    ranks.on_first(lambda: _finish(settings, contents))


def _prepare(settings: PreprocessSettings, work: Sequence[Shard | Stream]) -> TokenizerIdentity:
    """The tokenizer, and the folder of shards as it belongs to this run."""
    shard_folder.remove_leftover(settings.folder)
    # Before a tokenizer is trained, which would replace that of another run.
    shard_folder.refuse_other(settings.folder, shard_folder.plan_of(settings, None))
    model = training.prepared(settings, work)
    identity = tokenizer.identify(settings.tokenizer_model, model)
    _excluded(settings)  # raises, if it does, before the work
    shard_folder.take(settings.folder, shard_folder.plan_of(settings, identity))
    return identity


def _todo(settings: PreprocessSettings, work: Sequence[Shard | Stream]) -> list[Shard | Stream]:
    todo = shard_folder.unfinished(work, settings.folder)
    if len(todo) < len(work):
        print(f"{settings.folder} has {len(work) - len(todo)} of {len(work)} finished shards")
    return todo


def _excluded(settings: PreprocessSettings) -> list[ExcludedDataset]:
    if not settings.exclude:
        return []
    model = tokenizer.load_tokenizer(settings.tokenizer_model, settings.eod_token,
                                     settings.append_eod)
    digest = tokenizer.identify(settings.tokenizer_model, model).digest
    ends = tokenizer.end_tokens(model)
    return [ExcludedDataset(prefix, digest, ends) for prefix in settings.exclude]


def _look_over(settings: PreprocessSettings) -> Catalogue:
    """Lists what the shards hold, and marks duplicates. Raises UserError for leaks, and for bad
    lines that an earlier run skipped and this one does not."""
    contents = catalogue.build_catalogue(settings.folder, settings.output_prefix)
    if contents.bad_lines and not settings.skip_bad_lines:
        _refuse_bad_lines(settings.folder)
    _refuse_leftovers(settings, contents)
    _refuse_own_exclusions(settings, contents)
    excluded = _excluded(settings)
    found = duplicates.find(settings.folder, contents, excluded)
    if found.leaks and not settings.drop_duplicates:
        duplicates.refuse_leaks(settings.folder, found, excluded)
    for target in contents.targets:  # none of an earlier run is left beside one of this
        Path(target.prefix + ".idx").unlink(missing_ok=True)
    return contents


def _refuse_leftovers(settings: PreprocessSettings, contents: Catalogue) -> None:
    """Raises UserError for a split of one of the domains that an earlier run wrote and this one
    does not: its documents may now be in another split."""
    targets = {target.prefix for target in contents.targets}
    known = {os.path.realpath(prefix) for prefix in settings.exclude}
    for base in sorted({prefix.rpartition("_")[0] for prefix in targets}):
        for split in splits.SPLITS:
            prefix = f"{base}_{split}"
            if prefix not in targets and os.path.exists(prefix + ".idx") and \
                    os.path.realpath(prefix) not in known:
                raise UserError(
                    f"{prefix} is there from an earlier run, and this run writes none of that "
                    "name: the two may share documents. Delete it, or give another "
                    "--output-prefix, or, if it is to stay, --exclude it. What was tokenized is "
                    "kept.")


def _refuse_own_exclusions(settings: PreprocessSettings, contents: Catalogue) -> None:
    """Raises UserError for a held-out dataset that this run would write anew, without what is in
    it."""
    targets = {os.path.realpath(target.prefix) for target in contents.targets}
    for prefix in settings.exclude:
        if os.path.realpath(prefix) in targets:
            raise UserError(f"--exclude {prefix} names a dataset that this run writes: its "
                            "documents would be in none. Give another --output-prefix, or leave "
                            "the flag out. What was tokenized is kept.")


def _refuse_bad_lines(path: Path) -> None:
    """Raises UserError for the first that an unfinished run with --skip-bad-lines left out."""
    for manifest, before in shards.with_lines_before(path):
        for line, reason in manifest.bad:
            raise UserError(f"{manifest.path}:{before + line + 1} cannot be read ({reason}). Leave "
                            "such lines out with --skip-bad-lines, or correct it and delete "
                            f"{path}.")


def _merge(settings: PreprocessSettings, identity: TokenizerIdentity,
           targets: Sequence[PlannedDataset], ranks: Ranks) -> None:
    """Writes this rank's share of the datasets."""
    mine = ranks.share(targets, [target.tokens for target in targets])
    merged = workers.work_through(functools.partial(Merger, settings, identity), mine,
                         min(settings.workers, len(mine)))
    for target, card in sorted(merged, key=lambda pair: pair[0].prefix):
        print(_describe(target, card), flush=True)


def _describe(target: PlannedDataset, card: Card) -> str:
    notes = [f"{card.documents} {card.samples}s, {card.tokens} tokens"]
    if card.corrupted:
        notes.append(f"{len(card.corrupted)} corrupted")
    if card.tokens_cut:
        notes.append(f"{card.tokens_cut} tokens after the last whole window left out")
    if card.duplicates + card.leaked:
        notes.append(f"{card.duplicates} duplicates of an earlier document and {card.leaked} "
                     f"of held-out ones found, {card.dropped} dropped")
    return f"{target.prefix}: {', '.join(notes)}" + (
        "" if card.documents else "; nothing is left, and nothing written")


def _finish(settings: PreprocessSettings, contents: Catalogue) -> None:
    """Reports what was left out, and deletes the shards."""
    if contents.too_short:
        print(f"{contents.too_short} documents of fewer than two tokens left out")
    listed = Path(f"{settings.output_prefix}_bad_lines.txt")
    listed.unlink(missing_ok=True)
    if contents.bad_lines:
        shown = _list_bad_lines(settings.folder, listed)
        print(f"{contents.bad_lines} bad lines left out, all listed in {listed}:{''.join(shown)}")
    shard_folder.remove(settings.folder)


def _list_bad_lines(path: Path, listed: Path) -> list[str]:
    """Writes the list, and returns the first of them."""
    shown: list[str] = []
    with files.written_whole(listed) as file:
        for manifest, before in shards.with_lines_before(path):
            for line, reason in manifest.bad:
                text = f"{manifest.path}:{before + line + 1}: {reason}"
                file.write(f"{text}\n".encode(errors="backslashreplace"))
                if len(shown) < _BAD_LINES_SHOWN:
                    shown.append("\n  " + text)
    return shown
