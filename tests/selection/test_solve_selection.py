"""solve_selection against enumeration and milp, its invariants, and its errors."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from megatron_direct.selection import (
    InfeasibleSelection,
    LowRank,
    solve_selection,
    stiff_budget,
)
from megatron_direct.selection.rows import Rows


def small_instance(seed: int):
    """flat [k, N], costs, K, tau, target, curvature, eta with N <= 16, often tied or skewed."""
    rng = np.random.default_rng(seed)
    num, dim = int(rng.integers(4, 17)), int(rng.integers(1, 9))
    num_select = int(rng.integers(1, num))
    flat = rng.standard_normal((dim, num)) + rng.choice([0.0, 1.0]) * rng.standard_normal((dim, 1))
    flat *= np.exp(rng.choice([0.0, 1.0]) * rng.standard_normal(num))
    costs = rng.pareto(1.5, num)
    if rng.random() < 0.3:
        costs = np.round(costs)
    budget = stiff_budget(costs, num_select, float(rng.choice([0.0, 0.1, 0.3, 0.6, 1.0])))
    root = rng.standard_normal((dim, dim))
    eta = float(rng.choice([0.1, 0.5]))
    return flat, costs, num_select, budget, rng.standard_normal(dim), root @ root.T, eta


def arguments(objective: str, target, curvature, eta) -> dict:
    if objective == "flat-energy":
        return {}
    if objective == "alignment":
        return {"target": target}
    return {"target": target, "curvature": curvature, "step_size": eta}


def value_of(objective: str, sums: np.ndarray, num_select: int, target, curvature, eta):
    """The objectives as their definitions read, for sums [..., k]."""
    if objective == "flat-energy":
        return np.sum(sums**2, axis=-1)
    if objective == "alignment":
        return sums @ target
    mean = sums / num_select
    quadratic = np.einsum("...i,ij,...j->...", mean, curvature, mean)
    return eta * mean @ target - 0.5 * eta**2 * quadratic


@pytest.mark.parametrize("objective", ["flat-energy", "alignment", "descent"])
def test_small_instances_reach_the_enumerated_optimum(objective):
    reached = 0
    for seed in range(100):
        flat, costs, num_select, budget, *rest = small_instance(seed)
        subsets = np.array(list(itertools.combinations(range(len(costs)), num_select)))
        spent = np.array([math.fsum(costs[subset]) for subset in subsets])
        sums = flat.T[subsets].sum(axis=1)[spent <= budget]
        best = value_of(objective, sums, num_select, *rest).max()
        found = solve_selection(
            flat, costs, num_select, stiff_budget=budget, objective=objective,
            **arguments(objective, *rest),
        )
        chosen = flat[:, found.indices].sum(axis=1)
        # 1e-9: the same sums in another order.
        assert found.objective == pytest.approx(
            value_of(objective, chosen, num_select, *rest), rel=1e-9, abs=1e-12
        )
        assert math.fsum(costs[found.indices]) <= budget
        assert len(set(found.indices.tolist())) == num_select
        assert found.upper_bound >= best - 1e-9 * abs(best)
        reached += found.objective >= best - 1e-9 * abs(best)
    assert reached >= 95


@pytest.mark.parametrize("seed", range(10))
def test_alignment_against_milp(seed):
    rng = np.random.default_rng(seed)
    flat, target = rng.standard_normal((8, 120)), rng.standard_normal(8)
    costs = rng.pareto(1.2, 120)
    budget = stiff_budget(costs, 30, 0.2)
    scores = target @ flat
    exact = milp(
        -scores, integrality=np.ones(120), bounds=Bounds(0, 1),
        constraints=[LinearConstraint(np.ones(120), 30, 30), LinearConstraint(costs, 0, budget)],
    )
    found = solve_selection(
        flat, costs, 30, stiff_budget=budget, objective="alignment", target=target
    )
    # 1e-3: what exchanges of one or two samples leave; milp's own gap is 1e-4.
    assert found.objective >= -exact.fun * (1 - 1e-3)
    assert found.upper_bound >= -exact.fun - 1e-6


@pytest.mark.parametrize("budget_fraction", [None, 0.1])
@pytest.mark.parametrize("eta", [1.0, 15.0])
def test_descent_is_certified(budget_fraction, eta):
    rng = np.random.default_rng(0)
    eigenvalues = 1.0 / np.arange(1, 65)
    flat = (rng.standard_normal((1000, 64)) * np.sqrt(eigenvalues)).T
    costs = (flat[:8] ** 2 * eigenvalues[:8, None]).sum(axis=0)
    budget = None if budget_fraction is None else stiff_budget(costs, 100, budget_fraction)
    options = {"objective": "descent", "target": rng.standard_normal(64) * np.sqrt(eigenvalues),
               "step_size": eta, "stiff_budget": budget}
    found = solve_selection(flat, costs, 100, curvature=eigenvalues, **options)
    relaxed = [step for step in found.history if step["stage"] == "relaxation"][-1]
    assert relaxed["upper_bound"] - relaxed["objective"] <= 1e-4 * relaxed["objective"]
    assert found.status == "converged"
    # The rounded selection stays near the relaxation where K is not far below k.
    assert found.upper_bound - found.objective <= 3e-3 * found.upper_bound
    dense = solve_selection(flat, costs, 100, curvature=np.diag(eigenvalues), **options)
    assert dense.upper_bound == pytest.approx(found.upper_bound, rel=1e-4)
    assert dense.objective == pytest.approx(found.objective, rel=1e-3)


def test_negative_curvature_counts_as_none():
    rng = np.random.default_rng(0)
    flat, target = rng.standard_normal((2, 40)), np.array([1.0, 1.0])
    options = {"objective": "descent", "target": target, "step_size": 1.0}
    bent = solve_selection(flat, np.zeros(40), 5, curvature=np.array([1.0, -3.0]), **options)
    level = solve_selection(flat, np.zeros(40), 5, curvature=np.array([1.0, 0.0]), **options)
    dense = solve_selection(flat, np.zeros(40), 5, curvature=np.diag([1.0, -3.0]), **options)
    assert bent.objective == level.objective == pytest.approx(dense.objective)


@pytest.mark.parametrize("objective", ["flat-energy", "alignment", "descent"])
def test_quotas_are_kept(objective):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        flat, costs = rng.standard_normal((6, 90)), rng.pareto(1.5, 90)
        groups = rng.choice(["code", "prose", "maths"], 90)
        quotas = {"code": (3, 5), "maths": (10, 12)}
        options = arguments(objective, rng.standard_normal(6), np.eye(6), 1.0)
        with pytest.raises(InfeasibleSelection) as error:
            solve_selection(flat, costs, 30, stiff_budget=0.0, objective=objective,
                            groups=groups, quotas=quotas, **options)
        cheapest = stiff_budget(costs, 30, 0.0)
        least = error.value.min_stiff_budget
        assert least >= cheapest
        for budget in (least, 1.1 * least, 2 * least):
            found = solve_selection(flat, costs, 30, stiff_budget=budget, objective=objective,
                                    groups=groups, quotas=quotas, **options)
            counts = {label: int((groups[found.indices] == label).sum()) for label in quotas}
            assert len(found.indices) == 30 and found.stiff_cost <= budget
            assert 3 <= counts["code"] <= 5 and 10 <= counts["maths"] <= 12


def test_the_budget_rule():
    costs = np.array([4.0, 1.0, 3.0, 2.0])
    assert stiff_budget(costs, 2, 0.0) == 3.0
    assert stiff_budget(costs, 2, 1.0) == 5.0
    assert stiff_budget(costs, 2, 0.5) == 4.0
    # Thirds do not sum exactly in binary; fraction 0 is feasible all the same.
    costs = np.full(1000, 1 / 3)
    budget = stiff_budget(costs, 700, 0.0)
    assert solve_selection(np.ones((1, 1000)), costs, 700, stiff_budget=budget).stiff_cost == budget
    assert stiff_budget(costs, 700, 1.0) >= budget


def test_result_is_plain_data():
    rng = np.random.default_rng(0)
    found = solve_selection(rng.standard_normal((4, 50)), rng.random(50), 10, stiff_budget=math.inf)
    assert found.indices.dtype == np.int64 and np.all(np.diff(found.indices) > 0)
    assert found.stiff_budget is None
    json.dumps([found.objective, found.stiff_cost, found.status, found.upper_bound, found.history])


def test_all_samples_can_be_selected():
    found = solve_selection(np.ones((3, 5)), np.arange(5.0), 5, stiff_budget=10.0)
    assert found.indices.tolist() == [0, 1, 2, 3, 4]
    assert found.status == "optimal" and found.upper_bound == pytest.approx(found.objective)


@pytest.mark.parametrize("target", [0.0, 1e-12])
def test_a_search_ends_where_all_is_worth_next_to_nothing(target):
    """Samples and their opposites: the best sum is 0, and what exchanges gain is rounding."""
    half = np.random.default_rng(1).standard_normal((5, 4))
    rows = np.concatenate([half, -half])
    found = solve_selection(rows.T, np.zeros(10), 4, objective="descent",
                            target=np.full(4, target), curvature=np.ones(4), step_size=1.0)
    assert found.objective == pytest.approx(0, abs=1e-10)


def generic_instance(seed: int):
    rng = np.random.default_rng(seed)
    flat = rng.standard_normal((5, 60)) + 0.3 * rng.standard_normal((5, 1))
    costs = rng.pareto(1.5, 60)
    return rng, flat, costs, stiff_budget(costs, 12, 0.3)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_permuting_samples_permutes_the_answer(seed):
    rng, flat, costs, budget = generic_instance(seed)
    order = rng.permutation(60)
    plain = solve_selection(flat, costs, 12, stiff_budget=budget)
    permuted = solve_selection(flat[:, order], costs[order], 12, stiff_budget=budget)
    assert np.array_equal(np.sort(order[permuted.indices]), plain.indices)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.floats(-6, 6))
def test_scaling_costs_and_budget_changes_nothing(seed, exponent):
    _, flat, costs, _ = generic_instance(seed)
    scaled = costs * 10.0**exponent
    plain, other = (
        solve_selection(flat, c, 12, stiff_budget=stiff_budget(c, 12, 0.3))
        for c in (costs, scaled)
    )
    assert np.array_equal(plain.indices, other.indices)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_duplicates_are_interchangeable_and_lower_ids_go_first(seed):
    """Every sample thrice: as many copies of each are selected whatever their order, and the
    copies selected are those of the lowest ids."""
    rng, flat, costs, _ = generic_instance(seed)
    flat, costs = flat[:, :20], costs[:20]
    budget = stiff_budget(np.tile(costs, 3), 12, 0.3)

    def solve(order):
        return solve_selection(flat[:, order], costs[order], 12, stiff_budget=budget).indices

    tiled, shuffled = np.tile(np.arange(20), 3), rng.permutation(np.tile(np.arange(20), 3))
    for order in (tiled, shuffled):
        chosen = solve(order)
        for sample in np.unique(order[chosen]):
            copies = np.flatnonzero(order == sample)
            taken = np.isin(copies, chosen)
            assert np.array_equal(np.flatnonzero(taken), np.arange(taken.sum()))
    assert np.array_equal(np.sort(tiled[solve(tiled)]), np.sort(shuffled[solve(shuffled)]))


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_copies_that_differ_by_rounding_are_copies(fraction):
    """As a layout's noise of 1e-7 makes them: the lowest ids are taken, and the budget is kept."""
    for seed in range(20):
        rng, flat, costs, _ = generic_instance(seed)
        order = rng.permutation(np.tile(np.arange(20), 3))
        noise = 1 + 1e-7 * rng.standard_normal((2, flat.shape[0] + 1, 60))
        rows = (flat[:, order] * noise[0, 1:]).astype(np.float32)
        noisy_costs = costs[order] * noise[0, 0]
        budget = stiff_budget(noisy_costs, 12, fraction)
        found = solve_selection(rows, noisy_costs, 12, stiff_budget=budget)
        assert found.stiff_cost <= budget and len(found.indices) == 12
        if fraction == 0:
            continue  # the cheapest copies alone are feasible
        for sample in np.unique(order[found.indices]):
            taken = np.isin(np.flatnonzero(order == sample), found.indices)
            assert np.array_equal(np.flatnonzero(taken), np.arange(taken.sum()))


@pytest.mark.parametrize("objective", ["alignment", "descent"])
def test_one_row_of_great_length_makes_no_ties_of_the_others(objective):
    """It points away from the target and is never selected, so that its length changes nothing."""
    rng = np.random.default_rng(0)
    rows, target = rng.standard_normal((2000, 16)).astype(np.float32), rng.standard_normal(16)
    options = {"objective": objective, "target": target, "stiff_budget": np.inf}
    if objective == "descent":
        options |= {"curvature": np.full(16, 1e-6), "step_size": 1.0}
    found = []
    for length in (1.0, 1e4, 1e7):
        rows[-1] = -length * target
        found.append(solve_selection(rows.T, np.ones(2000), 600, **options))
    assert all(np.array_equal(one.indices, found[0].indices) for one in found)
    assert all(one.status == "optimal" for one in found)
    if objective == "alignment":
        best = np.sort(rows.astype(np.float64) @ target)[-600:].sum()
        # 1e-6: products in float32.
        assert found[-1].objective == pytest.approx(best, rel=1e-6)
        assert best <= found[-1].upper_bound <= best * (1 + 1e-3)


def test_copies_are_found_among_rows_of_very_different_lengths():
    """Every sample twice, with a layout's noise of 1e-7; lengths over eight orders of magnitude."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, 16)) * 10 ** rng.uniform(-4, 4, (200, 1))
    twice = np.concatenate([rows, rows * (1 + 1e-7 * rng.standard_normal(rows.shape))])
    order = rng.permutation(400)
    found = solve_selection(twice[order].astype(np.float32).T, np.ones(400), 101,
                            objective="alignment", target=np.ones(16), stiff_budget=np.inf)
    taken = np.isin(np.arange(400), found.indices)
    for sample in range(200):
        first, second = np.flatnonzero(order % 200 == sample)
        assert taken[first] or not taken[second]


def test_copies_are_found_among_samples_whose_scores_are_all_near_ties(monkeypatch):
    """Sorted by any projection of 50,000 rows that have much in common, neighbours are as close as
    rounding makes copies. Few others than copies are fetched, and of each the lower id is taken."""
    fetched, take = [], Rows.take

    def noting(self, ids):
        fetched.append(len(ids))
        return take(self, ids)

    monkeypatch.setattr(Rows, "take", noting)
    rng = np.random.default_rng(0)
    rows = (1 + 0.005 * rng.standard_normal((50_000, 16))).astype(np.float32)
    rows[49_900:] = rows[:100] * np.float32(1 + 1e-7)  # each looks the better one
    found = solve_selection(rows.T, np.ones(50_000), 25_000, objective="alignment",
                            target=np.eye(16)[0], stiff_budget=np.inf)
    chosen = np.isin(np.arange(50_000), found.indices)
    assert not (chosen[49_900:] & ~chosen[:100]).any() and chosen[:100].any()
    assert sum(fetched) < 2_000


def test_noise_of_a_layout_does_not_change_a_selection():
    """Sketches from another layout differ by 1e-6 relative; generic data then select the same."""
    rng, flat, costs, budget = generic_instance(3)
    noisy = flat * (1 + 1e-6 * rng.standard_normal(flat.shape))
    plain, other = (solve_selection(f.astype(np.float32), costs, 12, stiff_budget=budget)
                    for f in (flat, noisy))
    assert np.array_equal(plain.indices, other.indices)


def test_same_selection_with_one_and_two_threads(tmp_path):
    script = textwrap.dedent("""
        import sys
        import numpy as np
        from megatron_direct.selection import solve_selection, stiff_budget
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((3000, 128), dtype=np.float32)
        rows[1500:1600] = rows[:100]
        costs = rng.pareto(1.2, 3000)
        costs[1500:1600] = costs[:100]
        found = solve_selection(rows.T, costs, 400, stiff_budget=stiff_budget(costs, 400, 0.2))
        np.save(sys.argv[1], found.indices)
    """)
    picked = []
    for threads in ("1", "2"):
        path = tmp_path / f"{threads}.npy"
        limits = {name: threads for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        subprocess.run(
            [sys.executable, "-c", script, str(path)], check=True,
            env={**os.environ, **limits, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        picked.append(np.load(path))
    assert np.array_equal(*picked)


def test_memory_mapped_rows(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((700, 16), dtype=np.float32)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    costs = rng.random(700)
    budget = stiff_budget(costs, 100, 0.3)
    plain = solve_selection(rows.T, costs, 100, stiff_budget=budget)
    from_disk = solve_selection(mapped.T, costs, 100, stiff_budget=budget)
    assert np.array_equal(plain.indices, from_disk.indices)


FLAT, COSTS = np.ones((2, 4)), np.ones(4)
DESCENT = {"objective": "descent", "target": np.ones(2), "curvature": np.ones(2), "step_size": 1.0}


@pytest.mark.parametrize(("changes", "message"), [
    ({"flat": np.ones(4)}, r"flat must be a floating-point array \[k, N\].*pass the transpose"),
    ({"flat": np.ones((0, 4))}, r"k >= 1, found float64 of shape \(0, 4\)"),
    ({"flat": np.ones((2, 4), dtype=int)}, "floating-point array .* found int64"),
    ({"flat": np.ones((2, 5))}, "one entry for each of flat's 5 columns"),
    ({"flat": np.array([[1.0, np.nan, 1.0, 1.0]])}, "flat must be finite.*sample 1"),
    ({"stiff_cost": np.array([1.0, 1.0, -1.0, 1.0])}, "non-negative, found -1.0 at sample 2"),
    ({"stiff_cost": np.array([1.0, np.nan, 1.0, 1.0])}, "finite.*found nan at sample 1"),
    ({"num_select": 0}, "from 1 to the number of samples, 4, found 0"),
    ({"num_select": 5}, "from 1 to the number of samples, 4, found 5"),
    ({"num_select": 2.5}, "num_select must be an integer"),
    ({"num_select": True}, "num_select must be an integer.*found True; select fewer"),
    ({"stiff_budget": -1.0}, "stiff_budget must be at least 0, found -1.0"),
    ({"stiff_budget": math.nan}, "stiff_budget must be at least 0, found nan"),
    ({"stiff_budget": "4"}, "stiff_budget must be a number, found '4'"),
    ({"stiff_budget": None}, "'flat-energy' needs a stiff_budget; math.inf sets none"),
    ({"objective": "best"}, "must be one of flat-energy, alignment, descent, found 'best'"),
    ({"objective": "best", "stiff_budget": None}, "objective must be one of flat-energy"),
    ({"objective": "alignment"}, "'alignment' needs target"),
    ({"target": np.ones(2)}, "'flat-energy' does not use target"),
    ({"objective": "alignment", "target": np.ones(3)}, r"target must be .* shape \(2,\)"),
    ({"objective": "alignment", "target": np.array([1.0, np.inf])},
     r"target must be finite, found inf at \(1,\)"),
    ({**DESCENT, "step_size": 0.0}, "step_size must be finite and above 0, found 0.0; 1 / lambda"),
    ({**DESCENT, "step_size": -2.0}, "step_size must be finite and above 0, found -2.0"),
    ({**DESCENT, "step_size": math.nan}, "step_size must be finite and above 0, found nan"),
    ({**DESCENT, "step_size": "1"}, "step_size must be a number, found '1'"),
    ({**DESCENT, "step_size": None}, "'descent' needs step_size; give it"),
    ({**DESCENT, "curvature": np.ones(3)},
     r"curvature must be of shape \(2,\), eigenvalues, or \(2, 2\), a matrix, found shape \(3,\)"),
    ({**DESCENT, "curvature": np.ones((2, 3))}, r"curvature must be .* found shape \(2, 3\)"),
    ({**DESCENT, "curvature": 1.0}, r"curvature must be .* found shape \(\)"),
    ({**DESCENT, "curvature": np.array([1.0, np.nan])}, r"curvature must be finite, found nan"),
    ({**DESCENT, "curvature": np.array([[1.0, 2.0], [0.0, 1.0]])}, "matrix must be symmetric"),
    ({**DESCENT, "curvature": LowRank(np.ones(3), np.ones((2, 3)))},
     r"eigenvalues \[p\] and directions \[p, 2\], found shapes \(3,\) and \(2, 3\)"),
    ({**DESCENT, "curvature": LowRank(np.ones(1), np.full((1, 2), np.nan))},
     r"directions must be finite, found nan at \(0, 0\)"),
    ({"quotas": {"a": (0, 1)}}, "quotas need both"),
    ({"groups": ["a", "a", "b", "b"], "quotas": {"a": (3, 4)}},
     "group 'a' has 2 samples, but its quota asks for at least 3"),
    ({"groups": ["a", "a", "b", "b"], "quotas": {"a": (2, 1)}}, "0 <= least <= greatest"),
    ({"groups": ["a", "a", "b", "b"], "quotas": {"a": (2, 2), "b": (1, 2)}},
     "admit from 3 to 4 samples, but num_select is 2"),
    ({"groups": ["a"], "quotas": {"a": (0, 1)}}, r"groups must have shape \(4,\)"),
    ({"sample_ids": np.arange(4)}, "both sample_ids and all_reduce_sum"),
])
def test_bad_input_is_refused(changes, message):
    given_arguments = {"flat": FLAT, "stiff_cost": COSTS, "num_select": 2, "stiff_budget": 4.0}
    given_arguments.update(changes)
    flat, costs = given_arguments.pop("flat"), given_arguments.pop("stiff_cost")
    num_select = given_arguments.pop("num_select")
    with pytest.raises(ValueError, match=message):
        solve_selection(flat, costs, num_select, **given_arguments)


def test_the_budget_rule_refuses_bad_fractions():
    for fraction in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=rf"must lie in \[0, 1\], found {fraction}"):
            stiff_budget(COSTS, 2, fraction)
    with pytest.raises(ValueError, match="budget fraction must be a number, found None"):
        stiff_budget(COSTS, 2, None)
