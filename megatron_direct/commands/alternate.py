"""``megatron-direct alternate``: selection and annealing in turn (steps/rounds.py).

    RUN_DIR/rounds/, RUN_DIR/checkpoints/, RUN_DIR/metrics.jsonl, RUN_DIR/result.json
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from megatron_direct.commands.requests import LossesKey, SelectionRequest
from megatron_direct.config import Execution
from megatron_direct.data.blend_plan import MAX_EPOCHS
from megatron_direct.errors import UserError
from megatron_direct.runtime import files, parallel, typed_json
from megatron_direct.runtime.manifest import Artefact, State
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.settings import Settings, flag
from megatron_direct.steps.annealed import Losses
from megatron_direct.steps.onset import Onset, OnsetConfig, dataset_digests
from megatron_direct.steps.rounds import Round, Rounds


@dataclass(frozen=True)
class AlternateConfig(Settings):
    """Selection and annealing in turn."""

    rounds: int = flag(2, "segments of the annealing, each on a selection of its own", at_least=1)
    lr_wsd_decay_iters: int = flag(
        100, "iterations of the annealing, over which the learning rate decays", at_least=1)
    max_epochs: float = flag(
        MAX_EPOCHS, "largest number of epochs over a pool within a segment (more is an error)",
        above=0)
    test_data_path: tuple = flag((), "indexed datasets whose loss is reported", nargs="+")
    save_interval: int = flag(50, "iterations between checkpoints", at_least=1)
    load_optim: bool = flag(True, "start from the checkpoint's optimizer state; "
                                  "--no-load-optim: start with a fresh one")

    def check(self) -> None:
        if self.rounds > self.lr_wsd_decay_iters:
            raise UserError(f"--rounds {self.rounds} is more than --lr-wsd-decay-iters "
                            f"{self.lr_wsd_decay_iters}. Give fewer rounds.")


@dataclass(frozen=True)
class AlternateRequest(SelectionRequest):
    alternate: AlternateConfig
    onset: OnsetConfig
    execution: Execution = field(default_factory=Execution)


@dataclass(frozen=True, kw_only=True)
class AlternationKey(LossesKey):
    rounds: int
    max_epochs: float
    load_optim: bool
    order_seed: int


@dataclass(frozen=True)
class Alternation:
    """``result.json``."""

    before: Losses
    after: Losses
    tokens: int
    rounds: tuple[Round, ...]


def alternate(request: AlternateRequest) -> None:
    """All ranks call this."""
    config = request.alternate
    onset = request.open(request.onset, config.test_data_path, execution=request.execution)
    key = _key(request, onset)
    folder = Path(request.onset.run_dir)
    rounds = Rounds(onset, request.measure, request.selection, folder, config.rounds,
                    config.lr_wsd_decay_iters, config.test_data_path, config.max_epochs,
                    config.save_interval, config.load_optim)
    rounds = dataclasses.replace(
        rounds, selection=request.selection.for_annealing(rounds.tokens_of_a_round))
    directory, artefact = RunDirectory(folder), Artefact(folder, "an annealing in rounds")
    with directory.entered("alternate", request):
        state = parallel.on_rank_zero(lambda: artefact.state(key))
        if state is State.FINISHED:
            parallel.say(f"{folder} has already been annealed.")
            return
        if state is State.NEW:
            parallel.on_rank_zero(lambda: artefact.begin(key))
        losses = rounds.train()
        parallel.on_rank_zero(lambda: _finish(rounds, losses))
        parallel.on_rank_zero(lambda: artefact.finish(key))


def _key(request: AlternateRequest, onset: Onset) -> AlternationKey:
    config = request.alternate
    if request.pilot.at == "merged":
        raise UserError("--at merged is not supported by alternate: the later rounds have no "
                        "training behind them whose states could be averaged. Use --at checkpoint "
                        "or --at pilot.")
    return AlternationKey.of(
        onset, dataclasses.replace(request.measure, pilot=request.pilot.in_one_spelling()),
        request.selection.wherever_rows_lie(),
        tuple(dataset_digests(config.test_data_path).values()),
        lr_wsd_decay_iters=config.lr_wsd_decay_iters, rounds=config.rounds,
        max_epochs=config.max_epochs, load_optim=config.load_optim,
        order_seed=onset.job.batch.seed)


def _finish(rounds: Rounds, losses: dict[str, Losses]) -> None:
    """Writes the result and says what it is (rank 0)."""
    told = rounds.told()
    result = Alternation(losses["before"], losses["after"], rounds.tokens, told)
    files.write_json(rounds.folder / "result.json", typed_json.to_json(result))
    for part in told[1:]:
        print(f"iteration {part.first_iteration}: {part.kept} of {part.selected} samples stay",
              flush=True)
    for kind in ("valid", "test"):
        before, after = (getattr(of, kind).get("all") for of in (result.before, result.after))
        if after is not None:
            print(f"{kind} loss: {before:.4f} before, {after:.4f} after", flush=True)
