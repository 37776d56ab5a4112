"""What a selection says of domains and clusters, and blends with no more than their weights.

    blend/worth.json           weight, worth and typical samples of each domain and cluster
    blend/domains.txt, .json   weights per prefix: for --data-args-path (or --data-path), and for
                               --per-split-data-args-path
    blend/clusters.txt, .json  the same per cluster within a prefix
    blend/clusters/NAME-cN.*   a cluster as a prefix of its own: links to the pool's files, and a
                               mask beside them

A blend file weighs prefixes, whole: it cannot say which samples of one. So a cluster that is to
have a weight needs a prefix, and it is one without a copy: the pool's files under another name,
and a mask of the cluster's samples.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.data import indexed, mask_files
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.object_storage import is_stored
from megatron_direct.data.samples import Samples
from megatron_direct.runtime import files, typed_json
from megatron_direct.selection.auto import FEWEST_VALID, worth_of
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.group_worth import (
    GroupWorth,
    group_worths,
    members_of,
    typical_samples,
)
from megatron_direct.selection.shrinkage import Partition
from megatron_direct.selection.worth import measure_alignments

_NUM_TYPICAL = 3
_SHOWN_TOKENS = 48


@dataclass(frozen=True)
class Group:
    """A domain (a pool), or a cluster within one.

    weight: share of the selected tokens; selected: samples, each as often as it is selected; worth,
    best: (value, low, high) of the worth of all its samples, and, cross-fitted, of as many of its
    best ones as are selected; typical: texts of the samples nearest to its mean.
    """

    name: str
    prefix: str
    samples: int
    selected: int
    weight: float
    worth: tuple[float, ...]
    best: tuple[float, ...] | None
    typical: tuple[str, ...] = ()


@dataclass(frozen=True)
class Domains:
    """``worth.json``. clusters: () without shrinkage, which is what finds them."""

    domains: tuple[Group, ...]
    clusters: tuple[Group, ...]

    def __str__(self) -> str:
        lines = ["worth of a token to the validation set (mean cosine), and weight by the tokens "
                 "selected:"]
        for group in self.domains:
            value, low, high = group.worth
            lines.append(f"  {group.name}: {value:+.4f} [{low:+.4f}, {high:+.4f}], weight "
                         f"{group.weight:.3f}")
        return "\n".join(lines)

    @classmethod
    def read(cls, folder: Path) -> Domains | None:
        """Of a selection's folder; None of one that was made before there were any."""
        path = folder / "blend" / "worth.json"
        return typed_json.read_record(cls, path) if path.is_file() else None


@dataclass(frozen=True, eq=False)
class FoundGroups:
    """Groups among the candidates, on every rank: [N] the number of each candidate's domain and
    cluster; what they are worth; the candidates that are typical of each cluster."""

    of_domain: np.ndarray
    of_cluster: np.ndarray | None
    worth_of_domains: list[GroupWorth]
    worth_of_clusters: list[GroupWorth]
    typical: list[np.ndarray]


def find_domains(config: SelectionConfig, evidence: Evidence, counts: np.ndarray, seed: int,
                 ) -> FoundGroups:
    """All ranks call this. counts: [N] how often each candidate is selected."""
    share = evidence.share()
    alignments = measure_alignments(evidence, seed)
    worth = worth_of(config, evidence, seed) if len(evidence.valid_rows) >= FEWEST_VALID else None
    weights = share.known_to_all(evidence.labels)

    def of(groups: Partition) -> tuple[np.ndarray, list[GroupWorth]]:
        numbers = share.known_to_all(groups.numbers).astype(np.int64)
        members = members_of(numbers, groups.count)
        selected = [int((counts[group] > 0).sum()) for group in members]
        return numbers, group_worths(alignments, weights, members, selected, worth)

    of_domain, worth_of_domains = of(evidence.pools())
    if not config.shrinkage_clusters:
        return FoundGroups(of_domain, None, worth_of_domains, [], [])
    clusters = evidence.clusters(config.shrinkage_clusters, seed)
    of_cluster, worth_of_clusters = of(clusters)
    return FoundGroups(of_domain, of_cluster, worth_of_domains, worth_of_clusters,
                       typical_samples(evidence, clusters, _NUM_TYPICAL))


@dataclass(frozen=True, eq=False)
class Chosen:
    """candidates: [N] sample numbers; counts: [N] how often each is selected; digests: of the
    pools; valid: prefixes of the validation set; decode: of tokens into text."""

    samples: Samples
    candidates: np.ndarray
    counts: np.ndarray
    digests: Sequence[str]
    valid: Sequence[str]
    decode: Callable[[np.ndarray], str] | None = None


def write_blend(folder: Path, chosen: Chosen, found: FoundGroups) -> Domains:
    """``blend/`` in the folder of a selection (rank 0)."""
    samples, blend = chosen.samples, folder / "blend"
    names = [indexed.prefix_names(samples.prefixes)[prefix] for prefix in samples.prefixes]
    lengths = np.concatenate([indexed.document_lengths(indexed.open_indexed(prefix))
                              for prefix in samples.prefixes])[chosen.candidates] * chosen.counts
    domains = tuple(
        _group(names[i], samples.prefixes[i], found.of_domain == i, chosen, lengths, worth)
        for i, worth in enumerate(found.worth_of_domains))
    clusters: tuple[Group, ...] = ()
    if found.of_cluster is not None:
        clusters = tuple(_cluster(number, names, chosen, found, lengths, blend)
                         for number in range(len(found.worth_of_clusters)))
    made = Domains(domains, clusters)
    valid = _valid_line(chosen.valid)
    for name, groups in (("domains", domains), ("clusters", clusters)):
        used = [group for group in groups if group.weight > 0]
        if used and all(group.prefix for group in used):
            _write_files(blend / name, used, valid)
    files.write_json(blend / "worth.json", typed_json.to_json(made))
    return made


def cluster_name(pool: str, number: int) -> str:
    return f"{pool}-c{number}"


def _cluster(number: int, names: list[str], chosen: Chosen, found: FoundGroups, lengths: np.ndarray,
             blend: Path) -> Group:
    assert found.of_cluster is not None
    members = found.of_cluster == number
    domain = int(found.of_domain[members.argmax()])
    name = cluster_name(names[domain], number)
    group = _group(name, "", members, chosen, lengths, found.worth_of_clusters[number])
    # A link to files in an object store is none; a mask without a prefix in the blend is an error.
    has_view = group.weight > 0 and not is_stored(chosen.samples.prefixes[domain])
    prefix = _view(chosen, domain, members, blend / "clusters" / name) if has_view else ""
    texts = [_text(chosen, int(chosen.candidates[i])) for i in found.typical[number]]
    return dataclasses.replace(group, prefix=prefix, typical=tuple(texts))


def _group(name: str, prefix: str, members: np.ndarray, chosen: Chosen, lengths: np.ndarray,
           worth: GroupWorth) -> Group:
    best = worth.best
    return Group(name, str(prefix), int(members.sum()), int(chosen.counts[members].sum()),
                 float(lengths[members].sum() / lengths.sum()),
                 (worth.whole.value, worth.whole.low, worth.whole.high),
                 None if best is None else (best.value, best.low, best.high))


def _view(chosen: Chosen, domain: int, members: np.ndarray, path: Path) -> str:
    """A prefix with the pool's files, and a mask of some of its samples beside them."""
    samples = chosen.samples
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".idx", ".bin", ".json"):
        source, link = samples.prefixes[domain] + suffix, Path(f"{path}{suffix}")
        link.unlink(missing_ok=True)
        if os.path.exists(source):
            link.symlink_to(os.path.abspath(source))
    keep = np.zeros(len(samples), dtype=bool)
    keep[chosen.candidates[members]] = True
    of_domain = keep[samples.first[domain]: samples.first[domain + 1]]
    SampleMask(of_domain, chosen.digests[domain], str(path.parent)).save(
        f"{path}{mask_files.SUFFIX}")
    return os.path.abspath(path)


def _text(chosen: Chosen, sample: int) -> str:
    tokens = chosen.samples.tokens(sample)[:_SHOWN_TOKENS]
    return " ".join(map(str, tokens)) if chosen.decode is None else chosen.decode(tokens)


def _valid_line(prefixes: Sequence[str]) -> list[str]:
    """The validation sets, several of them by their tokens: without weights Megatron would make one
    epoch of these, which a training that goes on from a checkpoint may have behind it."""
    if len(prefixes) == 1:
        return list(prefixes)
    return [word for prefix in prefixes for word in (
        str(indexed.document_lengths(indexed.open_indexed(prefix)).sum()), prefix)]


def _write_files(path: Path, groups: Sequence[Group], valid: Sequence[str]) -> None:
    """The blend in both of Megatron's forms."""
    line = [word for group in groups for word in (f"{group.weight:.6g}", group.prefix)]
    with files.written_whole(path.with_suffix(".txt"), "w") as file:
        file.write(" ".join(line) + "\n")
    files.write_json(path.with_suffix(".json"), {"train": line, "valid": valid,
                                                 "test": None})
