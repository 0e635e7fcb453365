"""Tables and figures, from plain rows and arrays."""

from odeopt.report.diagnostics import plot_diagnostics, write_diagnostics
from odeopt.report.energy import plot_ledger
from odeopt.report.figure import (
    PALETTE,
    label_ends,
    line_styles,
    new_figure,
    panel_grid,
    save_figure,
    style,
    use_logarithms,
    use_plain_numbers,
)
from odeopt.report.losses import plot_escape, plot_losses
from odeopt.report.matrix import plot_ratios
from odeopt.report.response import plot_response
from odeopt.report.solvers import plot_orders, plot_panels
from odeopt.report.suite import plot_suite
from odeopt.report.table import draw_table, number_text

__all__ = [
    "PALETTE",
    "draw_table",
    "label_ends",
    "line_styles",
    "new_figure",
    "number_text",
    "panel_grid",
    "plot_diagnostics",
    "plot_escape",
    "plot_ledger",
    "plot_losses",
    "plot_orders",
    "plot_panels",
    "plot_ratios",
    "plot_response",
    "plot_suite",
    "save_figure",
    "style",
    "use_logarithms",
    "use_plain_numbers",
    "write_diagnostics",
]
