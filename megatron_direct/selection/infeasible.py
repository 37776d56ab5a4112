"""What no selection can meet: a budget, or quotas."""

from __future__ import annotations


class InfeasibleSelection(ValueError):
    """No selection of K samples meets the budget.

    ``min_stiff_budget``: the smallest budget that can be met (with the quotas, if any).
    """

    def __init__(self, stiff_budget: float, num_select: int, min_stiff_budget: float):
        super().__init__(
            f"no {num_select} samples fit a stiff budget of {stiff_budget!r}: the cheapest cost "
            f"{min_stiff_budget!r} together; give a stiff budget of at least that, or select fewer"
        )
        self.stiff_budget, self.num_select = stiff_budget, num_select
        self.min_stiff_budget = min_stiff_budget

    def __reduce__(self):
        """An error of one rank is raised on all."""
        return type(self), (self.stiff_budget, self.num_select, self.min_stiff_budget)


class InfeasibleQuotas(ValueError):
    """No selection of K samples meets the quotas, whatever it costs."""
