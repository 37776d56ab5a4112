"""A run directory as ``compare`` writes it, of made-up numbers: no model is trained.

    python tests/synthetic_run.py /tmp/run     # 20 arms, 5 seeds, as for a person
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from megatron_direct.runtime import files

# arm -> (gain in loss over random, its spread over seeds, passes that choosing takes)
ARMS = {
    "random": (0.0, 0.0, 0.0), "whole-pool": (-0.01, 0.01, 0.0), "domain": (0.02, 0.01, 0.0),
    "perplexity-low": (-0.05, 0.01, 0.33), "perplexity-middle": (0.11, 0.02, 0.33),
    "perplexity-high": (-0.6, 0.05, 0.33), "gradient-norm": (-0.25, 0.03, 0.8),
    "gradient-dot": (0.03, 0.02, 0.8), "gradient-cosine": (0.05, 0.02, 0.8),
    "gradient-dot-adam": (-0.02, 0.02, 1.1), "flat-energy": (-0.08, 0.03, 1.3),
    "flat-energy-no-budget": (-0.9, 0.1, 1.3), "flat-energy-random-subspace": (-0.3, 0.05, 1.3),
    "stiff-alignment": (-0.01, 0.02, 1.3), "alignment": (0.10, 0.02, 1.3),
    "descent": (0.12, 0.015, 1.3), "descent-shrunk": (0.15, 0.02, 1.3),
    "descent-no-curvature": (0.04, 0.02, 0.8), "matched-descent": (0.01, 0.02, 1.3),
    "oracle": (0.14, 0.01, 0.0)}


def write_run(folder: Path, arms: dict, *, seeds=(1, 2, 3, 4, 5), domains=("docstrings", "source"),
              num_candidates=400, num_select=100, iterations=60, name="quarter corrupted",
              default="descent-shrunk", missing=(), texts=None, base_loss=4.2,
              prefix="embedded_") -> Path:
    """missing: pairs (arm, seed) that have no result."""
    folder.mkdir(parents=True)
    pools, tests, valid = ([f"{prefix}{domain}_{kind}" for domain in domains]
                           for kind in ("pool", "test", "valid"))
    files.write_json(folder / "run.json", {"format": 2, "commands": []})
    files.write_json(folder / "manifest.json", {
        "finished": not missing, "details": {"load": "build/theta", "data_path": pools},
        "key": {"first_seed": seeds[0], "num_select": num_select, "stiff_budget": None,
                "normalize_gradients": True, "pilot_iters": 20, "checkpoint_digest": "00ff"}})
    files.write_json(folder / "setting.json", {
        "name": name, "num_select": num_select, "num_candidates": num_candidates,
        "parameters": 1_312_000, "iterations": iterations,
        "tokens": iterations * 16 * 256, "seeds": list(seeds), "test": tests, "valid": valid,
        "pools": pools, "reference": "random", "default_arm": default,
        "arms": {arm: f"what {arm} takes" for arm in arms},
        "shared_seconds": {str(seed): {"select": {"sketch": 41.0, "curvature": 18.5}}
                           for seed in seeds},
        "annealing_seconds": 95.0, "passes_of_selection": {a: v[2] for a, v in arms.items()}})
    for seed in seeds:
        rng = np.random.default_rng(seed)
        samples = _write_seed(folder / "seeds" / str(seed), rng, len(pools), num_candidates)
        noise = rng.normal(0, 0.02, size=len(domains))
        for number, (arm, (gain, spread, _)) in enumerate(arms.items()):
            own = np.random.default_rng([seed, number])
            # Arms that gain keep away from what is corrupted.
            scores = own.normal(size=num_candidates) - 8 * gain * samples["corrupted"]
            count = num_candidates if arm == "whole-pool" else num_select
            chosen = np.sort(np.argsort(-scores)[:count])
            after = base_loss + noise - gain + own.normal(0, spread, size=len(domains))
            if (arm, seed) not in missing:
                _write_arm(folder / "arms" / arm / str(seed), arm, seed, samples, chosen, after,
                           dict(zip(pools, range(len(pools)), strict=True)), tests, valid,
                           iterations, own)
    if texts is not None:
        files.write_json(folder / "texts.json", texts)
    return folder


def _write_seed(folder: Path, rng, num_pools: int, count: int) -> dict[str, np.ndarray]:
    corrupted = rng.random(count) < 0.25
    samples = {
        "candidates": np.sort(rng.choice(4 * count, count, replace=False)),
        "loss": rng.normal(3.8, 0.5, count) + 2.2 * corrupted,
        "labels": np.minimum(255, rng.lognormal(4.6, 0.8, count).astype(int) + 8),
        "domain": rng.integers(num_pools, size=count), "corrupted": corrupted,
        "stiff_cost": rng.lognormal(-1, 1, count) * (1 + corrupted)}
    folder.mkdir(parents=True)
    np.savez(folder / "samples.npz", **samples)
    values = 30 / np.arange(1, 17) ** 1.4 * rng.uniform(0.9, 1.1, 16)
    values = np.sort(values)[::-1]
    num_stiff = int(np.searchsorted(np.cumsum(values) / values.sum(), 0.945)) + 1
    files.write_json(folder / "onset" / "curvature" / "spectrum.json", {
        "operator": "fisher", "num_valid_samples": 64, "dimension": 1_312_000,
        "eigenvalues": values.tolist(), "elbow": {"num_stiff": num_stiff, "num_computed": 16},
        "notes": [f"{num_stiff} of 16 leading pairs hold 0.9450 of the operator's energy"],
        "density": None})
    return samples


def _write_arm(folder: Path, arm: str, seed: int, samples, chosen, after, pools, tests, valid,
               iterations: int, rng) -> None:
    def losses(values):
        return {kind: {**dict(zip(names, map(float, values), strict=True)),
                       "all": float(np.mean(values)) + 0.05}
                for kind, names in (("valid", valid), ("test", tests))}

    composition = {}
    for name, i in pools.items():
        here, taken = samples["domain"] == i, samples["domain"][chosen] == i
        composition[name] = {
            "samples": int(here.sum()), "selected": int(taken.sum()),
            "corrupted": int(samples["corrupted"][here].sum()),
            "selected_corrupted": int(samples["corrupted"][chosen][taken].sum())}
    cost = float(samples["stiff_cost"][chosen].sum())
    constrained = arm.startswith(("flat-energy", "alignment")) and "no-budget" not in arm
    files.write_json(folder / "result.json", {
        "arm": arm, "seed": seed, "before": losses(np.full(len(tests), 4.8)),
        "after": losses(after), "composition": composition,
        "problem": {"stiff_cost": cost, "stiff_budget": cost * 1.02 if constrained else None,
                    "objective_value": cost**2 if constrained else None},
        "seconds": 95.0})
    np.save(folder / "chosen.npy", samples["candidates"][chosen])
    start, end = samples["loss"][chosen].mean(), samples["loss"][chosen].mean() - 0.5
    with open(folder / "metrics.jsonl", "w") as file:
        for i in range(iterations):
            loss = end + (start - end) * (1 - i / iterations) ** 1.5 + rng.normal(0, 0.08)
            file.write(json.dumps({"iteration": i + 1, "loss": float(loss), "lr": 1e-3,
                                   "grad_norm": 1.0}) + "\n")


def sample_texts() -> dict[str, list[dict]]:
    def text(words, pool, loss):
        return {"text": words, "pool": pool, "loss": loss, "labels": len(words) // 3}

    code = ("def render(self, template, **values):\n    return '<b>' + template.format(**values) + "
            "'</b>'  # & nothing is escaped here\n\n\n")
    prose = ("Return the number of bytes written. If the file was opened in text mode, the count "
             "is that of characters, and the encoding decides how many bytes they take. ")
    noise = " ".join(np.random.default_rng(0).permutation((code + prose).split() * 3))
    return {"picked": [text(code * 3, "embedded_source_pool", 2.91),
                       text(prose * 5, "embedded_docstrings_pool", 3.4),
                       text(prose, "embedded_docstrings_pool", 3.1)],
            "dropped": [text(noise, "embedded_source_pool", 7.2),
                        text("<script>alert(1)</script> " + noise[:300],
                             "embedded_docstrings_pool", 6.8)]}


if __name__ == "__main__":
    write_run(Path(sys.argv[1]), ARMS, num_candidates=2852, num_select=512, iterations=120,
              missing={("gradient-norm", 4)}, texts=sample_texts())
