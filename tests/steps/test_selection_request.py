"""How ``select`` reports what the solver refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_direct.errors import UserError
from megatron_direct.selection import InfeasibleQuotas, InfeasibleSelection
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.steps.curvature_config import CurvatureConfig
from megatron_direct.steps.selection_request import (
    check_finite,
    check_number,
    in_terms_of_flags,
    parse_quotas,
    selection_key,
)
from megatron_direct.steps.sketch import SketchConfig


@pytest.mark.parametrize("num_select", ["auto", 1])
def test_nothing_to_select_from_is_refused(num_select):
    config = SelectionConfig(num_select=num_select)
    with pytest.raises(UserError, match="no document of two tokens or more.*correct --data-path"):
        check_number(config, 0)
    with pytest.raises(UserError, match="no sample has a finite gradient. Check the checkpoint"):
        check_finite(config, 0)
    check_number(config, 1)
    check_finite(config, 1)


def _key(**settings):
    measured = SimpleNamespace(
        pool=SimpleNamespace(digests=("a",)), sketches="b", spectrum="c", proxy=None,
        valid=SimpleNamespace(samples=SimpleNamespace(sources_digest=None)))
    return selection_key(SelectionConfig(), CurvatureConfig(**settings), measured, SketchConfig())


def test_more_products_of_lanczos_are_another_selection():
    """Its directions may not have converged; the sketched Fisher needs no products."""
    asked = [_key(curvature="hessian", max_matvecs=number).digest() for number in (20, 200)]
    assert asked[0] != asked[1]
    sketched = [_key(max_matvecs=number).digest() for number in (20, 200)]
    assert sketched[0] == sketched[1]
    assert _key(curvature="hessian").digest() == _key(
        curvature="hessian", max_matvecs=CurvatureConfig.max_matvecs).digest()


def test_a_second_quota_of_a_pool_is_refused():
    assert parse_quotas(["a:1:", "b::2"], ["a", "b"])["b"] == (0, 2)
    with pytest.raises(UserError, match="--quotas a::2: a has a quota already"):
        parse_quotas(["a:1:", "a::2"], ["a"])


def test_quotas_that_cannot_be_met_name_their_flag():
    with pytest.raises(UserError, match="^--quotas: group 'a' has 3 samples"), in_terms_of_flags():
        raise InfeasibleQuotas("group 'a' has 3 samples")


def test_a_budget_that_cannot_be_met_names_its_flags():
    remedy = "Give --stiff-budget of at least 2.5, .* larger --stiff-budget-fraction"
    with pytest.raises(UserError, match=remedy), in_terms_of_flags():
        raise InfeasibleSelection(1.0, 3, 2.5)


@pytest.mark.parametrize("error", [ValueError("flat must be finite"), UserError("--seed")])
def test_no_other_error_is_put_down_to_the_quotas(error):
    with pytest.raises(type(error), match=f"^{error}$"), in_terms_of_flags():
        raise error
