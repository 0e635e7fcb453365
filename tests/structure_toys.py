"""Port-Hamiltonian systems with networks for the tests of solvers."""

import functools
import math

import torch

from odeopt.ode import integrate
from odeopt.physics import (
    NonNegativeDiagonal,
    PhaseState,
    PortHamiltonianSystem,
    PositiveDefinite,
    PositiveSemidefinite,
)

F64 = torch.float64


def potential(q):
    return (1 - torch.cos(q)).sum(-1) + 0.3 * q.square().sum(-1)


def make_system(*, has_mass_network=True, friction="matrix", n_inputs=1, seed=0):
    """Two degrees of freedom in double precision; mass and friction are networks of q, or absent."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mass = PositiveDefinite(2, network=(8,)) if has_mass_network else torch.tensor([0.7, 1.4])
        kinds = {"matrix": PositiveSemidefinite, "diagonal": NonNegativeDiagonal}
        dissipation = kinds[friction](2, network=(8,)) if friction else None
        system = PortHamiltonianSystem(
            2, n_inputs=n_inputs, inverse_mass=mass, potential=potential, dissipation=dissipation
        )
        return system.to(F64)


# one system for all methods, and one solution near rounding: not to be changed
shared_system = functools.cache(make_system)


def make_state(n=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return PhaseState(*(torch.randn(n, 2, generator=generator, dtype=F64) for _ in "qp"))


START = make_state()


def drive(t):
    return torch.sin(2 * t + 0.3).reshape(1)


def error_at_end(system, method, n_steps, *, u=None, x0=None, end=1.0, **options):
    """Distance from a reference at the end of so many steps."""
    x0 = START if x0 is None else x0
    t = torch.tensor([0.0, end], dtype=F64)
    with torch.no_grad():
        found = integrate(system, x0, t, method=method, u=u, options={"step_size": end / n_steps, **options})
    assert found.is_success, found.message
    return (torch.cat(found.states, -1)[-1] - exact_end(system, x0, u, end)).norm().item()


@functools.cache
@torch.no_grad()
def exact_end(system, x0, u, end):
    t = torch.tensor([0.0, end], dtype=F64)
    return torch.cat(integrate(system, x0, t, method="dopri8", rtol=1e-12, atol=1e-13, u=u).states, -1)[-1]


def observed_order(system, method, *, u=None, counts=(4, 8), end=0.25):
    coarse, fine = (error_at_end(system, method, n, u=u, end=end) for n in counts)
    return math.log2(coarse / fine) / math.log2(counts[1] / counts[0])
