"""Time one step of the solvers, against a loop of fourth-order Runge-Kutta steps written by hand, in turns.

A batch of damped pendulums: as a bare field, which every solver takes, and as a port-Hamiltonian system, which the
structure-preserving ones need. Compare the ratios of one run; the times depend on the machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measuring import captured, machine
from reporting import ratio, spread
from torch import Tensor
from torchdiffeq import odeint

from odeopt.cli import arguments
from odeopt.ode import STRUCTURE_METHODS, integrate
from odeopt.physics import PhaseState
from odeopt.report import draw_table
from odeopt.systems import pendulum
from odeopt.timing import interleaved

DT, FRICTION = 0.05, 0.1
REFERENCE = "rk4, loop by hand"
CAPTION = """Medians [quartiles] of interleaved repeats; ratio: of times within a repeat. One call takes {steps}
steps, with states at {outputs}. Graph: the call captured in a CUDA graph."""


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse(argv)
    print(machine(args.device), flush=True)
    rows = []
    for title, calls in (("bare field", of_field(args)), ("port-Hamiltonian system", of_system(args))):
        found = timed(title, calls, args)
        print(f"\n{args.batch} pendulums, {title}\n\n{table(found)}", flush=True)
        rows += [{"problem": title, "solver": name, "us": us} for name, us in found.items()]
    outputs = f"each of them ({args.steps + 1})" if args.dense else "the first and the last time"
    print(f"\n{CAPTION.format(steps=args.steps, outputs=outputs)}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(args.device), "rows": rows}, indent=2))


def field(t: Tensor | float, x: Tensor) -> Tensor:
    """Angle and momentum of damped pendulums, unit mass, length and gravity."""
    q, p = x.unbind(-1)
    return torch.stack((p, -q.sin() - FRICTION * p), -1)


def by_hand(f: Callable[[float, Tensor], Tensor], x: Tensor, n_steps: int, *, dense: bool) -> Tensor:
    """The loop that one writes where there is no library."""
    states = [x]
    for step in range(n_steps):
        t = step * DT
        k1 = f(t, x)
        k2 = f(t + DT / 2, x + DT / 2 * k1)
        k3 = f(t + DT / 2, x + DT / 2 * k2)
        k4 = f(t + DT, x + DT * k3)
        x = x + DT / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        if dense:
            states.append(x)
    return torch.stack(states if dense else [*states, x])


def first_states(args: argparse.Namespace) -> Tensor:
    """Shape ``(batch, 2)``, single precision."""
    return torch.rand(args.batch, 2, generator=torch.Generator().manual_seed(0)).to(args.device)


def times(args: argparse.Namespace) -> list[float]:
    """Times at which states are kept."""
    return [DT * step for step in (range(args.steps + 1) if args.dense else (0, args.steps))]


def of_field(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Functions that step the bare field, by name."""
    x, t = first_states(args), times(args)
    in_torchdiffeq = torch.tensor(t, device=args.device)
    options = {"method": "rk4", "options": {"step_size": DT}}
    ours = partial(integrate, field, x, t, backend="odeopt", **options)
    return {
        REFERENCE: partial(by_hand, field, x, args.steps, dense=args.dense),
        "rk4, odeopt": ours,
        "rk4, torchdiffeq through odeopt": partial(integrate, field, x, t, backend="torchdiffeq", **options),
        "rk4, torchdiffeq": partial(odeint, field, x, in_torchdiffeq, **options),
        **graphs({"rk4, odeopt": ours}, args),
    }


def of_system(args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Functions that step the system, by name."""
    system = pendulum().model.system.float().to(args.device)
    x, t = first_states(args), times(args)
    state = PhaseState(x[:, :1], x[:, 1:])

    def rates(_: float, x: Tensor) -> Tensor:
        return torch.cat(system.vector_field(PhaseState(x[:, :1], x[:, 1:])), -1)

    ours = {f"{method}, odeopt": partial(integrate, system, state, t, method=method, options={"step_size": DT})
            for method in ("rk4", *STRUCTURE_METHODS)}  # fmt: skip
    return {REFERENCE: partial(by_hand, rates, x, args.steps, dense=args.dense), **ours, **graphs(ours, args)}


def graphs(calls: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Capture calls; none where there is no CUDA."""
    return {f"{name}, graph": captured(call) for name, call in calls.items() if args.device.type == "cuda"}


@torch.no_grad()
def timed(title: str, calls: dict[str, Callable[[], object]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Microseconds per step of each, one repeat of all after the other."""
    for call in calls.values():
        call()
    seconds = interleaved(calls, args.device, n_repeats=args.repeats, description=title)
    return {name: [1e6 * each / args.steps for each in found] for name, found in seconds.items()}


def table(found: dict[str, list[float]]) -> str:
    """One line per solver."""
    rows = [[name, spread(us), spread(ratio(us, found[REFERENCE]))] for name, us in found.items()]
    return draw_table([("solver", ""), ("step", "us"), ("x loop", "by hand")], rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options and check them before any work is done."""
    parser = arguments.parser(__doc__, "", device={"default": "cpu"})
    add = parser.add_argument
    add("--batch", type=arguments.positive, default=128, help="pendulums")
    add("--steps", type=arguments.positive, default=100, help="steps of a call")
    add("--dense", action="store_true", help="keep the state after every step")
    add("--repeats", type=arguments.positive, default=31, help="timed repeats")
    add("--json", type=Path, help="file for all numbers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
