"""An annealed arm on disk: its losses, and what a random one drew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_direct.data.blend_plan import BlendPart
from megatron_direct.errors import UserError
from megatron_direct.runtime import files, typed_json
from megatron_direct.runtime.manifest import Artefact
from megatron_direct.steps.selected import PoolComposition, arm_folder

RANDOM = "random"


def is_random(arm: str) -> bool:
    """Whether its samples are drawn at random: random, or random-NAME, as many as NAME has."""
    return arm == RANDOM or arm.startswith(f"{RANDOM}-")


def random_arm(selection: str) -> str:
    """The arm of as many samples as a selection has, drawn at random."""
    return RANDOM if selection == "direct" else f"{RANDOM}-{selection}"


def is_annealed(folder: Path) -> bool:
    """Whether an arm was begun on the selection of this folder, or on as many samples at random."""
    run, name = folder.parents[1], folder.name
    return any(arm_folder(run, arm).is_dir() for arm in (name, random_arm(name)))


@dataclass(frozen=True)
class Losses:
    """Mean loss per token by dataset; ``all``: over the tokens of all of them."""

    valid: dict[str, float]
    test: dict[str, float]


@dataclass(frozen=True)
class ArmResult:
    """``result.json``. tokens: of the annealing; blend: what it was fed."""

    arm: str
    before: Losses
    after: Losses
    tokens: int
    blend: tuple[BlendPart, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> ArmResult:
        return typed_json.read_record(cls, folder / "result.json")

    def write(self, folder: Path) -> None:
        files.write_json(folder / "result.json", typed_json.to_json(self))


def arm_names(run_path: Path) -> list[str]:
    """Of the arms that are finished; the default selection first, random ones last."""
    folders = (path.parent for path in run_path.glob("anneal/*/manifest.json"))
    names = [folder.name for folder in folders if Artefact(folder, "an annealed arm").is_finished()]
    return sorted(names, key=lambda name: (is_random(name), name != "direct", name))


def average_folder(arm: Path, count: int) -> Path:
    """Of the average of an arm's last states."""
    return arm / "averages" / str(count)


def read_averages(arm: Path) -> list[ArmResult]:
    """Results of the averages of an arm's last states, of few states first."""
    folders = sorted((path.parent for path in arm.glob("averages/*/result.json")),
                     key=lambda folder: int(folder.name))
    return [ArmResult.read(folder) for folder in folders]


def measured_on(digests: Mapping[str, str]) -> dict:
    """The manifest's details of an arm; digests: of its test sets, by their names."""
    return {"test": dict(digests)}


def require_same_tests(folder: Path, digests: Mapping[str, str]) -> None:
    """Raises UserError where another arm of the run was measured on another test set of one name:
    one table would show losses on two.

    folder: of the arm that is to be measured; digests: of its test sets, by their names.
    """
    for path in sorted(folder.parent.glob("*/manifest.json")):
        found = Artefact(path.parent, "an annealed arm").read() if path.parent != folder else None
        known = (found or {}).get("details", {}).get("test", {})
        for name in known.keys() & digests.keys():
            if known[name] != digests[name]:
                raise UserError(
                    f"the test set {name} has changed since the arm {path.parent.name} was "
                    f"annealed, and the two could not be compared. Restore it, or delete "
                    f"{path.parent}, so that both are measured on the new one.")


def write_composition(folder: Path, composition: Mapping[str, PoolComposition]) -> None:
    """What a random arm drew, by pool."""
    files.write_json(folder / "composition.json",
                     {name: asdict(part) for name, part in composition.items()})


def read_composition(folder: Path) -> dict[str, PoolComposition] | None:
    """What a random arm drew; None of any other arm."""
    path = folder / "composition.json"
    return typed_json.read_record(dict[str, PoolComposition], path) if path.is_file() else None
