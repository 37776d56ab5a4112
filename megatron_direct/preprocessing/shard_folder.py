"""The folder of shards: whose it is, what it lacks, and how it goes.

``plan.json`` says what the shards were made of, so that they are never taken for those of another
input or other flags. It is the first file of the folder. At the end of the run the folder is
renamed before it is deleted: a folder with the name that a run looks for is never half deleted.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_direct import __version__
from megatron_direct.errors import UserError
from megatron_direct.preprocessing import reading, shards
from megatron_direct.preprocessing.reading import Shard, Stream
from megatron_direct.preprocessing.settings import PreprocessSettings
from megatron_direct.preprocessing.tokenizer import TokenizerIdentity
from megatron_direct.runtime import files


@dataclass(frozen=True)
class ShardPlan:
    """All that the bytes of the shards depend on.

    shard_format: of the files, which differs between states of one version, too. tokenizer: None as
    long as it is not known, because it is yet to be trained.
    """

    version: str  # of this package
    shard_format: int
    input: tuple[tuple[str, int, int], ...]  # path, size and time of each file
    json_keys: tuple[str, ...]
    group_key: str | None
    domain_key: str | None
    domain: str | None
    split: tuple[float, ...]
    seed: int
    trained_vocab_size: int | None
    append_eod: bool
    shard_size: float
    tokenizer: TokenizerIdentity | None


def plan_of(settings: PreprocessSettings, tokenizer: TokenizerIdentity | None) -> ShardPlan:
    stats = [(path, path.stat()) for path in settings.input]
    return ShardPlan(
        version=__version__, shard_format=shards.FORMAT,
        input=tuple((str(path.resolve()), stat.st_size, stat.st_mtime_ns) for path, stat in stats),
        json_keys=settings.json_keys, group_key=settings.group_key,
        domain_key=settings.domain_key, domain=settings.domain, split=settings.shares,
        seed=settings.seed,
        trained_vocab_size=settings.vocab_size if settings.train_tokenizer else None,
        append_eod=settings.append_eod, shard_size=settings.shard_size, tokenizer=tokenizer)


def tokenizer_digest(folder: Path) -> str | None:
    """Of the tokenizer that the shards in the folder were made with; None if there is none."""
    plan = _read_plan(folder)
    return None if plan is None else plan["tokenizer"]["digest"]


def refuse_other(folder: Path, plan: ShardPlan) -> None:
    """Raises UserError where the folder belongs to another plan."""
    old, new = _read_plan(folder), _as_json(plan)
    if old is None:
        if next(folder.glob("*-*.json"), None) is not None:
            raise UserError(f"{folder} holds shards, but no plan.json that records what they "
                            "were made from. Delete the folder, or choose another --output-prefix.")
        return
    if plan.tokenizer is None:
        new["tokenizer"] = old.get("tokenizer")
    changed = _differences(old, new)
    if changed:
        raise UserError(f"{folder} holds the shards of an unfinished run with different "
                        f"{', '.join(changed)}. Repeat that run to its end, or delete the folder.")


def take(folder: Path, plan: ShardPlan) -> None:
    """Makes the folder, or carries on with it. Raises UserError where it has another plan."""
    refuse_other(folder, plan)
    if _read_plan(folder) is None:
        files.write_json(folder / "plan.json", dataclasses.asdict(plan))


def remove(folder: Path) -> None:
    """Deletes the folder; where that is cut short, ``remove_leftover`` goes on with it."""
    remove_leftover(folder)
    os.rename(folder, _leftover(folder))
    remove_leftover(folder)


def remove_leftover(folder: Path) -> None:
    """Deletes what a run that was killed while it deleted its folder left of it."""
    if _leftover(folder).is_dir():
        shutil.rmtree(_leftover(folder))


def _leftover(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.deleted")


def _read_plan(folder: Path) -> dict | None:
    path = folder / "plan.json"
    if not path.is_file():
        return None
    found = files.read_json(path)
    if not isinstance(found, dict) or not isinstance(found.get("tokenizer"), dict) or \
            not isinstance(found["tokenizer"].get("digest"), str):
        raise UserError(f"{path} is damaged. Delete {folder}, or choose another --output-prefix.")
    return found


def _as_json(plan: ShardPlan) -> dict:
    return files.as_json(dataclasses.asdict(plan))


def _differences(old: dict, new: dict) -> list[str]:
    """Names of what differs, of the tokenizer in detail."""
    changed = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += [f"{key} ({name})" for name in _differences(before, after)]
        elif before != after:
            changed.append(key)
    return changed


def unfinished(work: Sequence[Shard | Stream], folder: Path) -> list[Shard | Stream]:
    """The shards that are not there yet, and the streams whose last one is not."""
    there = set(shards.names(folder))
    shards_of_file = Counter(name.partition("-")[0] for name in there)

    def is_whole(unit: Shard | Stream) -> bool:
        if isinstance(unit, Shard):
            return unit.name in there
        last = reading.shard_name(unit.file, shards_of_file[f"{unit.file:06d}"] - 1)
        return last in there and shards.read_manifest(folder, last).is_last

    return [unit for unit in work if not is_whole(unit)]


def require_whole(work: Sequence[Shard | Stream], folder: Path) -> None:
    """Waits until what other ranks wrote shows. Raises UserError where it does not."""
    lacking = files.once_seen(lambda: unfinished(work, folder), lambda found: not found)
    if lacking:
        raise UserError(f"{folder} lacks {len(lacking)} of {len(work)} shards that other ranks "
                        "wrote. Give an --output-prefix on a file system that all ranks share.")
