"""Tables and numbers as text."""

from __future__ import annotations

from collections.abc import Sequence


def draw_table(headers: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Draw a table; the first column is flush left, the others are flush right.

    Args:
        headers: Title and unit of each column.
        rows: Cells, one row per line.
        markdown: Whether to write a markdown table rather than an aligned plain one.

    Returns:
        Lines of text.
    """
    if markdown:
        titles = [" ".join(filter(None, header)) for header in headers]
        lines = [titles, [":--", *["--:"] * (len(titles) - 1)], *rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    titles, units = zip(*headers, strict=True)
    widths = [max(map(len, column)) for column in zip(titles, units, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()

    ruler = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(titles), line(units), ruler, *map(line, rows)])


def number_text(value: float, n_decimals: int = 4, sign: str = "") -> str:
    """Write a number, ``"diverged"`` if it is not finite.

    Args:
        value: The number.
        n_decimals: Decimals of numbers under 10,000; larger ones are written with an exponent.
        sign: ``"+"`` to write the sign of positive numbers too.
    """
    value = float(value)
    if not abs(value) < float("inf"):
        return "diverged"
    return f"{value:{sign}.{n_decimals}f}" if abs(value) < 1e4 else f"{value:{sign}.3e}"
