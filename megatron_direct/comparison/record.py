"""What a comparison was made of, written for those who read its results.

``setting.json`` (:class:`megatron_direct.comparison.summary.SettingSummary`): sizes, names, seeds,
and what measuring and annealing took; ``texts.json``: some samples, where a tokenizer is at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_direct.comparison import rivals
from megatron_direct.comparison.arms import Arm, find_arm
from megatron_direct.comparison.measurements import MEASUREMENTS, Setting, measurement_folder
from megatron_direct.comparison.replicates import ceiling_search
from megatron_direct.data import indexed
from megatron_direct.evaluation.tokenizers import tokenizer_of
from megatron_direct.runtime import arrays, files

DEFAULT_ARM = "direct"  # what `select` selects


def write_record(setting: Setting, reference: str, arms: Sequence[str]) -> None:
    """arms: those with results, in the registry's order."""
    seconds = {seed: _seconds(setting, seed) for seed in setting.seeds}
    annealing = _annealing_seconds(setting)
    names = {key: list(indexed.prefix_names(list(prefixes)).values()) for key, prefixes in (
        ("pools", setting.onset.pool.prefixes), ("valid", setting.onset.valid.prefixes),
        ("test", setting.config.test_data_path))}
    tokens = setting.num_tokens
    files.write_json(setting.folder / "setting.json", {
        "name": setting.config.name or setting.folder.name, "num_select": _num_select(setting),
        "num_candidates": len(setting.onset.pool.usable),
        "parameters": files.read_json(setting.folder / "before.json")["parameters"],
        "iterations": setting.config.lr_wsd_decay_iters, "tokens": tokens,
        "seeds": setting.seeds, **names, "reference": reference, "default_arm": DEFAULT_ARM,
        "arms": {name: find_arm(name).description for name in arms},
        "tokenizer_model": setting.config.tokenizer_model,
        "shared_seconds": seconds, "annealing_seconds": annealing,
        "passes_of_selection": {
            name: _passes(setting, find_arm(name), seconds, annealing / tokens)
            for name in arms} if annealing else dict.fromkeys(arms),
        "not_annealed": [name for name in arms if find_arm(name).recipe is None],
    })
    if setting.config.tokenizer_model:
        files.write_json(setting.folder / "texts.json", _texts(setting))


def _annealing_seconds(setting: Setting) -> float | None:
    """The median; None if all annealings have failed."""
    taken = [files.read_json(path)["seconds"]
             for path in sorted(setting.folder.glob("arms/*/*/result.json"))
             if find_arm(path.parents[1].name).recipe is not None]
    return float(np.median(taken)) if taken else None


def _num_select(setting: Setting) -> int:
    """Of the arms beside the default, at the first seed."""
    with np.load(setting.seed_folder(setting.seeds[0]) / "samples.npz") as arrays:
        return int(arrays["num_select"])


def _seconds(setting: Setting, seed: int) -> dict[str, dict[str, float]]:
    """What each measurement of a seed took, stage by stage; not of one that was broken off."""
    paths = {name: measurement_folder(setting, seed, name) / "seconds.json"
             for name in MEASUREMENTS}
    return {name: files.read_json(path) for name, path in paths.items() if path.is_file()}


def _passes(setting: Setting, arm: Arm, seconds: dict[int, dict], seconds_per_token: float,
            ) -> float | None:
    """What an arm's choices take, in passes of training over the pool; None if that is not known.
    """
    needs = arm.needs
    pass_over_pool = seconds_per_token * setting.onset.pool.num_labels.sum()
    # A forward pass is one of three passes over the layers; to read the tokens is none of them.
    costs = {"losses": 1 / 3, "text": 0.0}
    trials = ceiling_search(setting).trials()
    if trials:
        costs["ceiling"] = len(trials) * setting.num_tokens / float(
            setting.onset.pool.num_labels.sum())
    for need in needs:
        took = [sum(of_seed[need].values()) for of_seed in seconds.values() if need in of_seed]
        if need == "share":  # sketches of the validation set count as part of that share
            took = [sum(of_seed["select"].values()) - (1 - rivals.SHARE)
                    * of_seed["select"].get("sketch", 0.0)
                    for of_seed in seconds.values() if "select" in of_seed]
        if took:
            costs[need] = float(np.median(took)) / pass_over_pool
    known = all(need in costs for need in needs)
    return arm.rounds * sum(costs[need] for need in needs) if known else None


def _texts(setting: Setting, count: int = 6) -> dict[str, list[dict]]:
    """Some samples that the first seed's direct takes, and some that it leaves, drawn at random."""
    onset, samples = setting.onset, setting.onset.pool
    decode = tokenizer_of(setting.config.tokenizer_model, onset.checkpoint,
                          onset.job.model).decode
    seed = setting.seeds[0]
    path = setting.arm_folder(DEFAULT_ARM, seed) / "chosen.npy"
    if not path.is_file():
        return {"picked": [], "dropped": []}
    names = indexed.prefix_names(samples.prefixes)
    candidates, losses = arrays.read_named(
        setting.seed_folder(seed) / "samples.npz", ("candidates", "loss"), arrays.MAKE_AGAIN)
    chosen, rng = arrays.read_npy(path, arrays.MAKE_AGAIN), np.random.default_rng(seed)

    def some(numbers: np.ndarray) -> list[dict]:
        drawn = rng.choice(numbers, min(count, len(numbers)), replace=False)
        return [{"text": decode(samples.tokens(int(number))),
                 "pool": names[samples.prefixes[int(samples.dataset_of(number))]],
                 "loss": float(losses[candidates == number][0]),
                 "labels": int(samples.num_labels[number])} for number in drawn]

    return {"picked": some(chosen), "dropped": some(np.setdiff1d(candidates, chosen))}
