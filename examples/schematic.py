"""Draw how the port-Hamiltonian rule works: one step of it, and the unrolled computation that trains it."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import TYPE_CHECKING

from odeopt.cli import arguments
from odeopt.report import PALETTE, new_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 125.0, 109.0  # in drawing units of 7.2 points
INK, GREY, WHITE, BAND = "#000000", "#555555", "#FFFFFF", "#F3F3F3"
BLUE, VERMILLION, GREEN = PALETTE[:3]  # what is learned; gradients of the optimizee; the rule's state
PALE = {INK: WHITE, BLUE: "#D9E9F5", VERMILLION: "#FBE3D4", GREEN: "#DBF1E9"}


def main(argv: list[str] | None = None) -> None:
    """Draw both panels into one figure."""
    parser = arguments.Parser(description=__doc__)
    parser.add_argument("--out", type=arguments.folder, default="figs", help="folder of the figure (default: figs)")
    path = parser.parse_args(argv).out / "schematic.png"
    with style():
        figure, (axes,) = new_figure(WIDTH / 10, HEIGHT / 10)
        figure.set_layout_engine("none")
        axes.set_position((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
        draw_step(axes)
        draw_unrolled(axes)
        figure.savefig(path, dpi=132, pil_kwargs={"optimize": True})
    print(f"Figure: {path}")


def draw_step(axes: Axes) -> None:
    """Draw the data flow of one step: what is done once per tensor above, what each coordinate does below."""
    write(axes, 1, 106.6, "(a)  One step of the port-Hamiltonian rule", size=15, weight="bold", ha="left")
    band(axes, 89.2, 104, "once per tensor")
    band(axes, 54, 88, "every coordinate $i$")

    # the tensor's network
    statistics = "gradient scale, rms of $p$ and $\\theta$,\nalignment of $u$ with $p$, shape, time"
    write(axes, 11.3, 95.5, "$p,\\ \\theta,\\ t$", ha="right", size=14)
    arrow(axes, (12.2, 95.5), (19, 95.5))
    box(axes, 19, 90.6, 52, 102.6, statistics, title="statistics $z$")
    arrow(axes, (52, 95.5), (60, 95.5))
    box(axes, 60, 90.6, 80, 102.6, title="small network", color=BLUE)
    draw_network(axes, 64, 76, 94.8)
    arrow(axes, (80, 95.5), (88, 95.5))
    coefficients = "of friction $D$ and gain $g$;\nstep size $\\kappa$"
    box(axes, 88, 90.6, 120, 102.6, coefficients, title="coefficients")

    # the coordinate's effort
    gradient = "$\\dfrac{\\partial f}{\\partial\\theta_i}$"
    write(axes, 10.2, 67.8, gradient, ha="right", size=16, color=VERMILLION)
    arrow(axes, (11.2, 67.8), (19, 67.8), color=VERMILLION)
    box(axes, 19, 61, 43, 85, title="normalised effort", color=VERMILLION)
    write(axes, 31, 75.2, "$u_i=-\\,\\dfrac{\\partial f/\\partial\\theta_i}{\\sqrt{v_i}}$", size=17)
    write(axes, 31, 65.8, "$v_i$: running mean of\nthe squared gradient")
    arrow(axes, (31, 85), (31, 90.6))
    arrow(axes, (43, 82), (54, 82), label="$u_i,\\ v_i$")
    arrow(axes, (43, 67.8), (52, 67.8), label="$u_i$")

    # the coordinate's system
    box(axes, 54, 78.6, 92, 85.4, "$D=2\\,\\sigma(\\cdot)\\geq 0,\\quad g=\\exp(\\cdot)$", size=14.5)
    arrow(axes, (90, 90.6), (90, 85.4))
    arrow(axes, (65, 78.6), (65, 74.6), label="$D,\\ g$")
    arrow(axes, (81, 74.6), (81, 78.6), color=GREEN, label="$p$")
    box(axes, 52, 61, 94, 74.6, title="port-Hamiltonian system  $x=(q,p)$", color=GREEN)
    write(axes, 73, 67.8, "$\\dot x=(J-R)\\,\\nabla H(x)+B\\,u_i,\\quad y_i=B^{\\top}\\nabla H(x)$", size=14)
    write(axes, 73, 63.6, "odeint over one unit step; $u_i$, $D$, $g$ held")
    arrow(axes, (89, 61), (89, 57), (57, 57), (57, 61), color=GREEN)
    box(axes, 61, 55.2, 85, 58.8, "$p$ (and $q$) to the next step", edge=GREEN)

    # the parameter's update
    arrow(axes, (94, 67.8), (104, 67.8))
    write(axes, 98.6, 71.2, "$\\int_0^1\\; y_i\\,dt$", size=14)
    arrow(axes, (106.5, 90.6), (106.5, 70.3), label="$\\kappa$")
    circle(axes, 106.5, 67.8, 2.5, "$\\times$", size=17)
    arrow(axes, (109, 67.8), (113, 67.8))
    box(axes, 113, 64, 123, 71.6, "$\\theta_i+\\Delta\\theta_i$", size=14)


def draw_unrolled(axes: Axes) -> None:
    """Draw three steps of the unrolled computation, after Andrychowicz et al. (2016), Fig. 2."""
    title = "(b)  The unrolled computation of meta-training, after Andrychowicz et al. (2016)"
    write(axes, 1, 50.8, title, size=15, weight="bold", ha="left")
    band(axes, 21.3, 39, "optimizee")
    band(axes, 10.4, 20.2, "rule")
    box(axes, 14, 42.6, 111, 48)
    write(axes, 62.5, 45.3, "meta-loss   $L(\\phi)=\\Sigma_t\\, w_t\\,\\log f_t(\\theta_t)$", size=14)
    write(axes, 13.4, 7.8, "weights $\\phi$", ha="right", color=BLUE, weight="bold")
    axes.plot((14, 92.5), (7.8, 7.8), color=BLUE, linewidth=1.8)
    arrow(axes, (7, 25), (17, 25))
    arrow(axes, (7, 13), (17, 13), color=GREEN)
    for x, step in ((20.0, "t-2"), (53.0, "t-1"), (86.0, "t")):
        arrow(axes, (x + 4, 34.6), (x + 9.5, 34.6), (x + 9.5, 18.8), color=VERMILLION, dashed=True)
        write(axes, x + 10.7, 30.6, f"$\\nabla f_{{{step}}}$", size=14, color=VERMILLION, ha="left")
        axes.plot(x + 9.5, 25, "s", color=BAND, markersize=10)  # a bridge for the parameters over the gradient
        arrow(axes, (x, 28), (x, 32.4))
        arrow(axes, (x, 36.8), (x, 42.6))
        arrow(axes, (x, 22), (x, 18.8))
        arrow(axes, (x + 3, 25), (x + 20.2, 25))
        arrow(axes, (x + 23.8, 25), (x + 30, 25))
        arrow(axes, (x + 16, 17), (x + 22, 17), (x + 22, 23.2))
        write(axes, x + 23.2, 18.7, "update", ha="left")
        arrow(axes, (x + 16, 13), (x + 30, 13), color=GREEN, label="state")
        arrow(axes, (x + 6.5, 7.8), (x + 6.5, 11.4), color=BLUE)
        circle(axes, x, 25, 3, f"$\\theta_{{{step}}}$", size=13.5)
        circle(axes, x + 22, 25, 1.8, "$+$", size=15)
        box(axes, x - 4, 32.4, x + 4, 36.8, f"$f_{{{step}}}$", size=14)
        box(axes, x - 3, 11.4, x + 16, 18.8, "rule$_\\phi$", size=14, color=BLUE)
    circle(axes, 119, 25, 3, "$\\theta_{t+1}$", size=13.5)
    for x, y in ((4.5, 25), (4.5, 13), (119, 13)):
        write(axes, x, y, "$\\cdots$", size=18)
    arrow(axes, (2, 4.6), (11, 4.6))
    write(axes, 12.5, 4.6, "solid, in any colour: the meta-gradient flows back along it", ha="left")
    arrow(axes, (2, 1.6), (11, 1.6), color=VERMILLION, dashed=True)
    dropped = "dashed: dropped in the paper's setting, detach=True; "
    write(axes, 12.5, 1.6, dropped + "kept by odeopt's default (second derivatives of $f$)", ha="left")


def write(axes: Axes, x: float, y: float, text: str, *, size: float = 12.5, ha: str = "center", **font) -> None:
    """Write text, centred in height on y."""
    # the room that a line spacing adds would push a single line off its centre
    placing = {"va": "center", "linespacing": 1.7} if "\n" in text else {"va": "center_baseline"}
    axes.text(x, y, text, fontsize=size, ha=ha, math_fontfamily="dejavuserif", zorder=5, **placing, **font)


def band(axes: Axes, bottom: float, top: float, name: str) -> None:
    """Draw the grey ground of a row of boxes."""
    axes.fill((1.5, 123.5, 123.5, 1.5), (bottom, bottom, top, top), color=BAND, zorder=1)
    write(axes, 2.4, top - 1.9, name, color=GREY, ha="left")


def box(axes, left, bottom, right, top, text="", *, title="", size=12.5, color=INK, edge=None) -> None:
    """Draw a rectangle with a title at its top and a text in what is left of it."""
    xs, ys = (left + 1, right - 1, right - 1, left + 1), (bottom + 1, bottom + 1, top - 1, top - 1)
    # thick edges with round joins make round corners
    for paint, thickness in ((edge or color, 14.4), (PALE[color], 11.2)):
        axes.fill(xs, ys, color=paint, linewidth=thickness, joinstyle="round", snap=False, zorder=4)
    write(axes, (left + right) / 2, top - 2.5, title, weight="bold")
    write(axes, (left + right) / 2, (bottom + top - (3.2 if title else 0)) / 2, text, size=size)


def circle(axes: Axes, x: float, y: float, radius: float, text: str, *, size: float) -> None:
    """Draw a circle with a text in it."""
    axes.plot(x, y, "o", color=WHITE, mec=INK, mew=1.6, markersize=14.4 * radius, zorder=4)
    write(axes, x, y, text, size=size)


def arrow(axes, *points, color=INK, dashed=False, label="") -> None:
    """Draw straight pieces through the points, a head at the end and a label above or to the right."""
    (x0, y0), (x, y) = points[-2:]
    length = math.hypot(x - x0, y - y0)
    ex, ey = (x - x0) / length, (y - y0) / length
    neck_x, neck_y = x - 1.5 * ex, y - 1.5 * ey
    xs, ys = zip(*points[:-1], (neck_x, neck_y), strict=True)
    axes.plot(xs, ys, color=color, linewidth=1.8, linestyle=(0, (3.2, 1.8)) if dashed else "solid")
    wings_x, wings_y = (neck_x - 0.65 * ey, neck_x + 0.65 * ey), (neck_y + 0.65 * ex, neck_y - 0.65 * ex)
    axes.fill((x, *wings_x), (y, *wings_y), color=color, linewidth=0, zorder=3)
    if y0 == y:
        write(axes, (x0 + neck_x) / 2, y + 1.8, label, size=13)
    else:
        write(axes, x + 1.2, (y0 + y) / 2, label, size=13, ha="left")


def draw_network(axes: Axes, left: float, right: float, y: float) -> None:
    """Draw a pictogram of a network with two hidden layers."""
    columns = [(left + (right - left) * k / 3, n) for k, n in enumerate((3, 4, 4, 3))]
    layers = [[(x, y + 2.0 * (j - (n - 1) / 2)) for j in range(n)] for x, n in columns]
    for a, b in (edge for layer, following in pairwise(layers) for edge in product(layer, following)):
        axes.plot(*zip(a, b, strict=True), color=BLUE, linewidth=0.6, zorder=4)
    for node in (node for layer in layers for node in layer):
        axes.plot(*node, "o", color=WHITE, markeredgecolor=BLUE, markersize=6.5, zorder=5)


if __name__ == "__main__":
    main()
