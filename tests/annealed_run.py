"""A run directory as ``select`` and ``anneal`` write it, of made-up numbers: no model is trained.

    python tests/annealed_run.py /tmp/run     # for a person who reads its report
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from megatron_direct.runtime import files

DOMAINS = ("docstrings", "source", "licenses")
BEFORE = (5.0, 3.2, 4.6, 3.7)  # on the domains, and over all their tokens
TEST_LOSSES = {"direct": (4.7, 2.9, 4.4, 3.44), "random": (4.9, 3.0, 4.3, 3.49)}
TOKENS = 307_200
SECONDS = {"pilot": 11.6, "sketch": 104.0, "curvature": 49.1}


def write_annealed_run(folder: Path, *, arms=("direct", "random"), domains=DOMAINS,
                       prefix="embedded_", kinds=("valid", "test"), corrupted=20,
                       density=None) -> Path:
    """kinds: of datasets with a loss; corrupted: samples of each pool."""
    folder.mkdir(parents=True)
    names = {kind: [f"{prefix}{domain}_{kind}" for domain in domains]
             for kind in ("pool", "valid", "test")}
    call = {"flags": {"layout": {"tensor_model_parallel_size": 2,
                                 "pipeline_model_parallel_size": 1}},
            "provenance": {"versions": {"megatron-direct": "0.2.0", "torch": "2.6.0"}}}
    files.write_json(folder / "run.json", {"format": 2, "commands": [
        {"command": name, **call} for name in ("select", *("anneal" for _ in arms))]})
    files.write_json(folder / "seconds.json", SECONDS)
    compositions = {arm: {name: {"samples": 100, "selected": 10 + i, "corrupted": corrupted,
                                 "selected_corrupted": 0 if arm == "direct" else corrupted // 10}
                          for i, name in enumerate(names["pool"])} for arm in TEST_LOSSES}
    selection = folder / "selections" / "direct"
    files.write_json(selection / "manifest.json", {
        "finished": True, "key": {}, "details": {
            "load": "theta", "checkpoint_digest": "00ff", "data_path": names["pool"],
            "valid_data_path": names["valid"], "digests": {}, "model": {}}})
    files.write_json(selection / "selection.json", {
        "objective": "descent", "num_select": 33, "objective_value": 0.25, "upper_bound": 0.26,
        "status": "optimal", "stiff_cost": 12.5, "stiff_budget": None, "least_stiff_cost": 4.0,
        "average_stiff_cost": 18.0, "num_stiff": 11, "history": [0.1, 0.25],
        "samples": {"in_pools": 1300, "too_short": 1, "cut": 1250, "cut_tokens": 65_489,
                    "not_finite": 2},
        "mean_loss": {"pool": 4.18, "selected": 3.99}, "composition": compositions["direct"],
        "mask_digests": {},
        "stability": {"samples": 0.62, "by_chance": 0.41, "clusters": 0.97},
        "draw": {
            "whole": _drawn_of(300, 33, 20, 13), "repeated_tokens": 0.64, "drawn_tokens": 0.36,
            "pools": {name: _drawn_of(100, 10 + i, 5 + i, 5) for i, name in enumerate(
                names["pool"])},
            "clusters": {f"{names['pool'][0]}-c0": _drawn_of(60, 10, 5, 5),
                         f"{names['pool'][0]}-c1": _drawn_of(40, 0, 0, 0)}},
        "how_many": {
            "annealing_tokens": 65_000, "pool_tokens": 130_000, "num_candidates": 1298,
            "num_harmful": 311, "num_select": 33, "worth_of_pool": 0.0123,
            "worth_of_selection": 0.0389,
            "over_pool": {"mean": 0.021, "low": 0.017, "high": 0.026},
            "over_random": {"mean": 0.027, "low": 0.02, "high": 0.034},
            "repeats_between": 0.96, "repeats_within": 0.6}})
    values = 10 / np.arange(1, 13)
    files.write_json(folder / "curvature" / "spectrum.json", {
        "operator": "gauss-newton", "num_valid_samples": 32, "dimension": 1_000_000,
        "eigenvalues": [*values.tolist(), -0.5],
        "elbow": {"num_stiff": 11, "num_computed": 12, "energy_share": 0.945, "held_share": 0.952,
                  "energy": 31.0, "whole_operator": False, "reached": True},
        "notes": ["11 of 12 leading pairs hold 0.9521 of the energy"], "density": density})
    for arm in arms:
        write_arm(folder / "anneal" / arm, arm, names, kinds, len(domains))
        if arm == "random":
            files.write_json(folder / "anneal" / arm / "composition.json", compositions[arm])
    return folder


def _drawn_of(candidates: int, selected: int, repeated: int, drawn: int) -> dict[str, int]:
    return {"candidates": candidates, "selected": selected, "repeated": repeated, "drawn": drawn}


def write_arm(folder: Path, arm: str, names: dict, kinds, num_domains: int, losses_after=None,
              **key) -> None:
    """key: what the annealing depends on."""
    def losses(values):
        of_domains = values[:num_domains]
        return {**{kind: {} for kind in ("valid", "test")}, **{
            kind: {**dict(zip(names[kind], of_domains, strict=True)), "all": values[-1]}
            for kind in kinds}}

    files.write_json(folder / "manifest.json", {"finished": True, "key": key, "details": {}})
    files.write_json(folder / "result.json", {
        "arm": arm, "before": losses(BEFORE), "after": losses(losses_after or TEST_LOSSES[arm]),
        "tokens": TOKENS, "blend": []})
    rng = np.random.default_rng(len(arm))
    with open(folder / "metrics.jsonl", "w") as file:
        for i in range(75):
            file.write(json.dumps({"iteration": i + 1, "loss": 4 - i / 100 + rng.normal(0, 0.1),
                                   "lr": 1e-3, "grad_norm": 1.0}) + "\n")


def made_up_density() -> dict:
    return {"nodes": [-0.5, 0.0, 1.0, 10.0], "weights": [0.1, 0.6, 0.2, 0.1],
            "trace": {"value": 42.0, "standard_error": 0.5},
            "positive_trace": {"value": 45.0, "standard_error": 0.5}}


if __name__ == "__main__":
    write_annealed_run(Path(sys.argv[1]), density=made_up_density())
