"""An annealed arm on disk: what it came to, and what a random one drew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_direct.data.blend_plan import BlendPart
from megatron_direct.runtime import files
from megatron_direct.steps.selected import PoolComposition


@dataclass(frozen=True)
class ArmResult:
    """``result.json``. before, after: loss per token by set (valid, test) and dataset; tokens: of
    the annealing; blend: what it was fed."""

    arm: str
    before: Mapping[str, Mapping[str, float]]
    after: Mapping[str, Mapping[str, float]]
    tokens: int
    blend: list[BlendPart]

    @classmethod
    def read(cls, folder: Path) -> ArmResult:
        found = files.read_json(folder / "result.json")
        return cls(**{**found, "blend": [BlendPart(**part) for part in found["blend"]]})

    def write(self, folder: Path) -> None:
        files.write_json(folder / "result.json", asdict(self))


def write_composition(folder: Path, composition: Mapping[str, PoolComposition]) -> None:
    """What a random arm drew, by pool."""
    files.write_json(folder / "composition.json",
                     {name: asdict(part) for name, part in composition.items()})


def read_composition(folder: Path) -> dict[str, PoolComposition]:
    """What a random arm drew."""
    return {name: PoolComposition(**part)
            for name, part in files.read_json(folder / "composition.json").items()}
