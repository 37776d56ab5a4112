"""What arms may know at a seed: measured once, shared by all of them, and put into a Case.

A *measurement* is the machinery of ``select`` with some of its settings changed. A new one is a
line in :data:`MEASUREMENTS`; arms name those that they need.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_direct.comparison import (
    arms,
    ceiling,
    rivals,  # noqa: F401  (registers its arms)
    variants,  # noqa: F401
)
from megatron_direct.comparison.arms import Case
from megatron_direct.data import indexed
from megatron_direct.data.cards import read_card
from megatron_direct.data.ngram_likeness import Texts
from megatron_direct.data.samples import Samples
from megatron_direct.data.token_features import TokenSource, token_features
from megatron_direct.errors import UserError
from megatron_direct.runtime import arrays, files, parallel
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence, stiff_costs
from megatron_direct.settings import Settings, flag
from megatron_direct.steps import selection_request
from megatron_direct.steps.curvature_config import SKETCHED_FISHER
from megatron_direct.steps.measure import Measured, MeasureSettings, measure
from megatron_direct.steps.onset import Onset
from megatron_direct.steps.pilot import PilotConfig
from megatron_direct.steps.sketch import read_sketches


@dataclass(frozen=True)
class CompareConfig(Settings):
    """Comparison."""

    test_data_path: tuple = flag(
        (), "indexed datasets whose losses are compared; no selection sees them", nargs="+",
        required=True)
    arms: tuple = flag((), f"arms to compare, of {', '.join(arms.REGISTRY)}; default: all but "
                       f"{ceiling.NAME}, which takes some twenty annealings to find; "
                       "dataset:NAME, a pool by the last part of its prefix, which makes up half "
                       "of the training data beside the whole pool", nargs="+")
    num_seeds: int = flag(5, "replicates of each arm", at_least=1)
    only_replicate: int | None = flag(
        None, "run this one of them alone, from 0 on, and write no report: for an array of jobs "
        "over one run directory; without this flag the command then writes the report", type=int,
        at_least=0)
    lr_wsd_decay_iters: int = flag(100, "iterations of each annealing", at_least=1)
    proxy_load: str = flag("", "checkpoint of a smaller model of the same tokenizer, at which the "
                               "arm direct-proxy selects")
    name: str = flag("", "name of this comparison in the report; default: the name of the "
                        "run directory")
    tokenizer_model: str = flag("", "tokenizer that turns samples back into text for the report; "
                                    "default: no samples are shown")

    def check(self) -> None:
        unknown = [name for name in self.arms if name not in arms.REGISTRY
                   and not name.startswith(arms.DATASET)]
        if unknown:
            raise UserError(f"--arms {' '.join(unknown)}: unknown arm; the arms are "
                            f"{', '.join(arms.REGISTRY)}.")
        if self.only_replicate is not None and self.only_replicate >= self.num_seeds:
            raise UserError(f"--only-replicate is {self.only_replicate}: it must be below "
                            f"--num-seeds {self.num_seeds}, since replicates are counted from 0.")


@dataclass(frozen=True)
class Setting:
    """All that the seeds and arms of one comparison share. proxy: the same pools and validation
    set at the checkpoint of a smaller model, if there is one."""

    config: CompareConfig
    folder: Path
    onset: Onset
    measure: MeasureSettings
    selection: SelectionConfig
    test_digests: Mapping[str, str] = field(default_factory=dict)
    proxy: Onset | None = None

    @property
    def seeds(self) -> list[int]:
        return [self.measure.sketch.seed + number for number in range(self.config.num_seeds)]

    @property
    def seeds_of_this_call(self) -> list[int]:
        only = self.config.only_replicate
        return self.seeds if only is None else [self.seeds[only]]

    @property
    def num_sequences(self) -> int:
        """Of each annealing."""
        return self.config.lr_wsd_decay_iters * self.onset.job.batch.global_batch_size

    @property
    def num_tokens(self) -> int:
        """Of each annealing."""
        return self.num_sequences * self.onset.job.model.seq_length

    def seed_folder(self, seed: int) -> Path:
        return self.folder / "seeds" / str(seed)

    def arm_folder(self, arm: str, seed: int) -> Path:
        return self.folder / "arms" / arm / str(seed)


# Of the arms that take gradients after a pilot where the flags name none.
PILOT_ITERS = 20


def _at_onset(settings: MeasureSettings) -> MeasureSettings:
    """At the checkpoint itself, with the directions that the sketches alone yield: as the authors
    of the paper compute them."""
    return MeasureSettings(
        PilotConfig(at="checkpoint", pilot_iters=0),
        dataclasses.replace(settings.sketch, precondition="none"),
        dataclasses.replace(settings.curvature, curvature=SKETCHED_FISHER))


def _after_pilot(settings: MeasureSettings) -> MeasureSettings:
    pilot = settings.pilot if settings.pilot.has_pilot else PilotConfig(pilot_iters=PILOT_ITERS)
    return dataclasses.replace(settings, pilot=pilot)


def _at_average(settings: MeasureSettings) -> MeasureSettings:
    named = settings.pilot if settings.pilot.at == "merged" else PilotConfig()
    return dataclasses.replace(settings, pilot=dataclasses.replace(named, at="merged"))


def _with_adam(settings: MeasureSettings) -> MeasureSettings:
    at_onset = _at_onset(settings)
    return dataclasses.replace(
        at_onset, sketch=dataclasses.replace(at_onset.sketch, precondition="adam"))


def _of_proxy(settings: MeasureSettings) -> MeasureSettings:
    """Averages of states that were named are of the large model."""
    return dataclasses.replace(
        settings, pilot=dataclasses.replace(settings.pilot, merge_load=()))


@dataclass(frozen=True)
class Measurement:
    """settings: of select, changed to what it is made with; at: the checkpoint whose model it is
    made on."""

    settings: Callable[[MeasureSettings], MeasureSettings]
    at: Callable[[Setting], Onset | None] = lambda setting: setting.onset


# onset: sketches at the checkpoint, where others propose to take gradients, and directions from
# them; adam-sketches: those scaled by Adam's moments; select: what `select` measures with the flags
# given; pilot: the same after a pilot; proxy: on the smaller model.
MEASUREMENTS = {
    "onset": Measurement(_at_onset),
    "adam-sketches": Measurement(_with_adam),
    "select": Measurement(lambda settings: dataclasses.replace(
        settings, pilot=settings.pilot.in_one_spelling())),
    "pilot": Measurement(_after_pilot),
    "merged": Measurement(_at_average),
    "proxy": Measurement(_of_proxy, lambda setting: setting.proxy),
}


def measurement_folder(setting: Setting, seed: int, name: str) -> Path:
    """Where it lies: with the first of the same settings on the same model."""
    def made(measurement: Measurement) -> tuple:
        return measurement.settings(setting.measure), id(measurement.at(setting))

    wanted = made(MEASUREMENTS[name])
    first = next(other for other, of_other in MEASUREMENTS.items() if made(of_other) == wanted)
    return setting.seed_folder(seed) / first


def measured_case(setting: Setting, seed: int, needs: set[str]) -> Case | None:
    """What the arms may know at a seed, computed or read; on rank 0, None elsewhere."""
    found = {}
    if setting.selection.is_auto or needs & {ceiling.NAME, "share"}:
        needs = needs | {"select"}
    for name, measurement in MEASUREMENTS.items():
        if name == "onset" or name in needs:
            settings = measurement.settings(dataclasses.replace(
                setting.measure, sketch=dataclasses.replace(setting.measure.sketch, seed=seed)))
            onset = measurement.at(setting)
            assert onset is not None, name
            found[name] = measure(settings, onset, measurement_folder(setting, seed, name))
    return parallel.kept_on_rank_zero(lambda: _case(setting, seed, found))


def _case(setting: Setting, seed: int, measured: Mapping[str, Measured]) -> Case:
    """From the measurements (rank 0). The candidates of a seed are fixed the first time."""
    stored = {name: [read_sketches(of.store, drawn) for drawn in (of.pool, of.valid)]
              for name, of in measured.items()}
    pool, valid = stored["onset"]
    chosen = _candidates(setting, seed, stored)
    config = setting.selection.for_annealing(setting.num_tokens)
    here, samples, valid_samples = pool.samples[chosen], setting.onset.pool, setting.onset.valid
    # Most arms select no sample twice.
    selection_request.check_finite(dataclasses.replace(config, max_count=1), len(here))
    sources = TokenSource(samples, here), TokenSource(valid_samples, valid.samples)
    texts = Texts.read_from(*sources)
    evidence = {name: Evidence(rows.rows[chosen], samples.num_labels[here],
                               samples.dataset_of(here), len(samples.prefixes),
                               np.arange(len(here)), of_valid.rows, measured[name].directions,
                               valid_datasets=valid_samples.dataset_of(of_valid.samples),
                               valid_sources=valid_samples.sources_of(of_valid.samples),
                               texts=texts)
                for name, (rows, of_valid) in stored.items()}
    case = Case(evidence, pool.losses[chosen], _domains(samples, here), samples.corrupted[here],
                _domains(valid_samples, valid.samples), valid_samples.num_labels[valid.samples],
                0, seed, config, selection_request.limits(config, samples, here), here,
                functools.partial(token_features, *sources, seed),
                uncut_labels=uncut_labels(samples)[here])
    with selection_request.in_terms_of_flags():
        case = dataclasses.replace(case, num_select=_num_select(case))
    with files.written_whole(setting.seed_folder(seed) / "samples.npz") as file:
        np.savez(file, candidates=here, num_select=case.num_select, loss=case.losses,
                 labels=evidence["onset"].labels, uncut_labels=case.uncut_labels,
                 domain=samples.dataset_of(here), corrupted=case.corrupted,
                 stiff_cost=stiff_costs(evidence["onset"].rows,
                                                  measured["onset"].directions))
    return case


def uncut_labels(samples: Samples) -> np.ndarray:
    """[samples] labels of each document as an annealing sees it: it packs whole documents into its
    sequences, where ``num_labels`` ends at the sequence length."""
    lengths = [indexed.document_lengths(dataset) for dataset in samples.datasets]
    return np.maximum(np.concatenate(lengths) - 1, 0)


def _num_select(case: Case) -> int:
    """How many samples arms take: as many as the default does, and where that is left open and
    comes to the whole pool, half of it."""
    if not case.config.is_auto:
        return int(case.config.num_select)
    found = len(case.select(case.evidence["select"]).indices)
    return found if found < len(case.losses) else max(1, found // 2)


def _candidates(setting: Setting, seed: int, stored: Mapping[str, list]) -> np.ndarray:
    """[samples of the onset's rows] bool: those of earlier arms, or else all that are finite."""
    finite = np.logical_and.reduce([pool.finite for pool, _ in stored.values()])
    path = setting.seed_folder(seed) / "samples.npz"
    if not path.is_file():
        return finite
    numbers = stored["onset"][0].samples
    candidates, = arrays.read_named(path, ["candidates"], arrays.MAKE_AGAIN)
    settled = np.isin(numbers, candidates)
    lost = numbers[settled & ~finite]
    if len(lost):
        raise UserError(
            f"seed {seed}: samples {', '.join(map(str, lost[:5]))} have no finite gradient for "
            f"{', '.join(stored)}, and were candidates of arms that are already finished. Start "
            "again in another --run-dir, with all arms at once.")
    return settled


def _domains(samples: Samples, numbers: np.ndarray) -> np.ndarray:
    """[n] the domain of each sample: as its dataset's card says, else the dataset's name."""
    return np.array(domain_names(samples))[samples.dataset_of(numbers)]


def domain_names(samples: Samples) -> list[str]:
    names = indexed.prefix_names(samples.prefixes)
    return [read_card(prefix).get("domain", names[prefix]) for prefix in samples.prefixes]
