"""Figures of what regularizers do, and the report of a comparison. Figures need matplotlib: the extra `report`."""

from .calibration import calibration_error, pool_bins, reliability
from .curves import learning_curves, loss_curves
from .differences import difference_plot, step_costs
from .heads import head_drops
from .masks import tlm_mask
from .penalties import penalty_shares
from .preferences import preference_curves
from .reading import Results, read_results
from .schedules import schedule_curves
from .spectra import drift_plot, singular_values
from .writing import write_report


__all__ = [
    "Results", "calibration_error", "difference_plot", "drift_plot", "head_drops", "learning_curves", "loss_curves",
    "penalty_shares", "pool_bins", "preference_curves", "read_results", "reliability", "schedule_curves",
    "singular_values", "step_costs", "tlm_mask", "write_report",
]  # fmt: skip
