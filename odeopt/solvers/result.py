"""The comparison of solvers: its runs, as tables, figures and a file."""

from __future__ import annotations

import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from odeopt.checks import require, require_one_of
from odeopt.files import read_json, write_json
from odeopt.solvers.figures import draw_derived, draw_orders, draw_work_precision
from odeopt.solvers.runs import WORKS, OrderRun, Runs, SolverRun
from odeopt.solvers.tables import draw_tables


class SolverComparison(Runs):
    """Runs of solvers beside each other, with their tables and figures."""

    def table(self, *, target: float | None = None, n_evals: int = 500, markdown: bool = False) -> str:
        """Tables of the work that an accuracy takes, of orders, of energies and gradients, and of failures.

        Args:
            target: The accuracy, a relative error; None for 1e-6, or the least power of ten that half of the methods
                reach on half of their problems, if that is larger.
            n_evals: Evaluations at which errors of state, energy and gradient stand beside each other.
            markdown: Whether to write markdown tables rather than aligned plain ones.

        Returns:
            Lines of text.
        """
        return draw_tables(self, target=target, n_evals=n_evals, markdown=markdown)

    def plot(
        self, path: str | os.PathLike, *, kind: str = "adaptive", unit: str = "n_evals", dtype: str | None = None
    ) -> Path:
        """Draw error against work; see :func:`odeopt.report.plot_panels`.

        Args:
            path: The image file.
            kind: ``"adaptive"``, or ``"fixed"`` with the structure-preserving methods beside.
            unit: ``"n_evals"`` or ``"seconds"``.
            dtype: Precision; the first one by default.

        Returns:
            The path.

        Raises:
            ValueError: If there is no such kind, unit or precision.
        """
        dtype = self.dtypes[0] if dtype is None else dtype
        require(kind in ("adaptive", "fixed"), "kind", kind, "adaptive or fixed")
        require_one_of(WORKS, unit=unit)
        require_one_of(self.dtypes, dtype=dtype)
        return draw_work_precision(self, path, kind=kind, unit=unit, dtype=dtype)

    def figures(self, folder: str | os.PathLike) -> list[Path]:
        """Draw everything into a folder: error against work, energies, gradients and orders, where there are some.

        Args:
            folder: The folder.

        Returns:
            The files, called ``solvers_*.png``.
        """
        folder, paths = Path(folder), []
        drawn = {"adaptive": "adaptive", "fixed": "fixed", "structure": "fixed"}
        kinds = sorted({drawn[kind] for kind in self.distinct("kind")}, reverse=True)
        for i, dtype in enumerate(self.dtypes):
            suffix = f"_{dtype}" if i else ""
            for kind in kinds:
                for unit, word in WORKS.items():
                    path = folder / f"solvers_{kind}_{word}{suffix}.png"
                    paths.append(self.plot(path, kind=kind, unit=unit, dtype=dtype))
            if any(run.energy_error is not None for run in self.select(group="mechanics", dtype=dtype)):
                paths.append(draw_derived(self, "energy_error", dtype, folder / f"solvers_energies{suffix}.png"))
            if any(run.gradient_error is not None for run in self.select(dtype=dtype)):
                paths.append(draw_derived(self, "gradient_error", dtype, folder / f"solvers_gradients{suffix}.png"))
        if any(row.observed is not None for row in self.orders):
            paths.append(draw_orders(self, folder / "solvers_orders.png"))
        return paths

    def save(self, path: str | os.PathLike) -> None:
        """Write all as JSON; an interruption leaves the old file or the new one."""
        names = [field.name for field in fields(SolverRun)]
        runs = [[getattr(run, name) for name in names] for run in self.runs]
        orders = [asdict(row) for row in self.orders]
        content = {"settings": dict(self.settings), "orders": orders, "columns": names, "runs": runs}
        write_json(path, content, is_by_row=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> SolverComparison:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If the file holds something else.
        """

        def parse(content: dict[str, Any]) -> SolverComparison:
            runs = [SolverRun(**dict(zip(content["columns"], row, strict=True))) for row in content["runs"]]
            orders = [OrderRun(**row) for row in content["orders"]]
            return cls(tuple(runs), tuple(orders), content["settings"])

        return read_json(path, parse, wanted="a comparison of solvers")
