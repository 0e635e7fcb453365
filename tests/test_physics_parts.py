"""The hot path, given parts and errors of port-Hamiltonian systems."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from odeopt.physics import (
    GivenMatrix,
    GivenPotential,
    NonNegativeDiagonal,
    PhaseState,
    PortHamiltonianSystem,
    PortMatrix,
    PositiveDefinite,
    PositiveSemidefinite,
    Potential,
    ScaledSigmoid,
    mlp,
    symplectic_matrix,
)

# ----------------------------------------------------------------- hot path


class RecordOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def modulated(mass=None):
    """Two held modes with one port: what an update rule runs."""
    return PortHamiltonianSystem(
        2,
        inverse_mass=mass,
        dissipation=GivenMatrix(lambda q, z: z[0], diagonal=True),
        port=lambda q, z: z[1],
    )


def held(n):
    """State, effort and signals whose modes are the outer axis in memory."""
    generator = torch.Generator().manual_seed(0)
    p, friction, gains = torch.randn(3, 2, n, generator=generator, dtype=torch.float64).mT
    u = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return PhaseState(None, p), u, (friction.square(), gains.unsqueeze(-1))


@pytest.mark.parametrize("mass", [None, torch.tensor([2.0, 3.0], dtype=torch.float64)])
def test_hot_path_is_elementwise_and_runs_no_autograd(mass, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("autograd ran")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    system = modulated(mass)
    x, u, z = held(5)
    with RecordOperations() as record:
        dx, y = system.vector_field_and_output(x, u, z)
    assert record.names <= {"mul", "sub", "select", "expand", "sum"}
    assert dx.p.grad_fn is None
    assert y.grad_fn is None
    (friction, gains), v = z, x.p if mass is None else mass * x.p
    torch.testing.assert_close(dx.p, gains[..., 0] * u - friction * v)
    torch.testing.assert_close(y, (gains[..., 0] * v).sum(-1, keepdim=True))


def test_hot_path_keeps_the_layout_of_transposed_views():
    system = modulated()
    x, u, z = held(5)
    assert x.p.stride() == (1, 5)
    assert system.vector_field(x, u, z).p.stride() == (1, 5)
    x = PhaseState(x.p + 1, x.p)
    dx = PortHamiltonianSystem(2, dissipation=0.1, potential=lambda q: q.square().sum(-1)).vector_field(x, u)
    assert dx.q.stride() == dx.p.stride() == (1, 5)


def test_positions_may_be_left_out_where_the_energy_ignores_them():
    system = modulated()
    x, u, z = held(5)
    assert not system.depends_on_q
    dx = system.vector_field(x, u, z)
    assert dx.q is None
    assert system.energy_gradient(x).q is None
    stored = PhaseState(torch.zeros_like(x.p), x.p)
    assert torch.equal(system.vector_field(stored, u, z).p, dx.p)
    assert torch.equal(system.vector_field(stored, u, z).q, x.p)
    assert (system.energy_gradient(stored).q == 0).all()
    balance = system.power_balance(x, u, z)
    torch.testing.assert_close(balance, system.power_balance(stored, u, z))
    assert balance.residual.abs().max() <= 1e-14  # a few roundings of numbers of order one


@pytest.mark.parametrize(
    ("parts", "depends_on_q"),
    [
        ({}, False),
        ({"inverse_mass": 2.0, "dissipation": PositiveSemidefinite(2, network=(3,))}, False),
        ({"inverse_mass": PositiveDefinite(2)}, False),
        ({"inverse_mass": PositiveDefinite(2, network=(3,))}, True),
        ({"inverse_mass": lambda q: q.square().unsqueeze(-1)}, True),
        ({"potential": Potential(2)}, True),
    ],
)
def test_system_says_whether_its_energy_depends_on_q(parts, depends_on_q):
    assert PortHamiltonianSystem(2, **parts).depends_on_q is depends_on_q


# -------------------------------------------------------------- given parts


def test_constants_mean_multiples_diagonals_and_matrices():
    x = PhaseState(torch.zeros(2), torch.tensor([1.0, -2.0]))
    for given_value in (0.5, torch.tensor(0.5), torch.tensor([0.5, 0.5]), 0.5 * torch.eye(2)):
        system = PortHamiltonianSystem(2, inverse_mass=given_value, dissipation=given_value)
        assert torch.equal(system.vector_field(x).q, torch.tensor([0.5, -1.0]))
        assert torch.equal(system.vector_field(x).p, torch.tensor([-0.25, 0.5]))


def test_functions_are_called_with_the_signal_only_where_there_is_one():
    calls = []

    def friction(q, *signals):
        calls.append(signals)
        return q.square()

    system = PortHamiltonianSystem(2, dissipation=GivenMatrix(friction, diagonal=True))
    x, signal = PhaseState(torch.ones(2), torch.ones(2)), object()
    system.vector_field(x)
    system.vector_field(x, z=signal)
    assert calls == [(), (signal,)]


def test_modules_given_as_functions_are_trained():
    network = mlp(2, 4, widths=(3,))
    system = PortHamiltonianSystem(
        2,
        potential=GivenPotential(nn.Sequential(mlp(2, 1), nn.Flatten(-2))),
        port=lambda q: q.unsqueeze(-1),
        dissipation=PositiveSemidefinite(2, network=network),
    )
    names = {name.split(".")[0] for name, _ in system.named_parameters()}
    assert names == {"hamiltonian", "dissipation"}
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_learned_parts_read_their_signal_and_the_energy_does_not():
    torch.manual_seed(0)
    system = PortHamiltonianSystem(
        2,
        inverse_mass=PositiveDefinite(2, network=(4,)),
        dissipation=PositiveSemidefinite(2, network=(4,), n_signals=1),
        port=PortMatrix(2, 1, network=(4,), n_signals=1),
    )
    x, u = PhaseState(torch.randn(3, 2), torch.randn(3, 2)), torch.randn(3, 1)
    weak, strong = (system.power_balance(x, u, z) for z in (torch.zeros(1), torch.ones(3, 1)))
    assert (weak.dissipated != strong.dissipated).all()
    assert (weak.supplied != strong.supplied).all()
    still = [system.vector_field(x, None, z).q for z in (torch.zeros(1), torch.ones(1))]
    assert torch.equal(*still)


def test_function_that_ignores_q_has_no_gradient():
    system = PortHamiltonianSystem(2, inverse_mass=lambda q: 2 * torch.eye(2))
    x = PhaseState(torch.ones(2), torch.tensor([1.0, 3.0]))
    assert torch.equal(system.energy_gradient(x).q, torch.zeros(2))


# ------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: PortHamiltonianSystem(0), ValueError, r"`dof` .*positive integer.*`dof = 0`"),
        (lambda: PortHamiltonianSystem(2, n_inputs=0), ValueError, r"`n_inputs` .*`n_inputs = 0`"),
        (
            lambda: PortHamiltonianSystem(3, n_inputs=2),
            ValueError,
            r"`port` should be given for 2 inputs.*dof = 3.*`port = None`",
        ),
        (
            lambda: PortHamiltonianSystem(2, port=torch.ones(2, 3)),
            ValueError,
            r"`port` .*shape \(2, 1\).*\(2, 3\)",
        ),
        (lambda: PortHamiltonianSystem(2, port=torch.ones(2)), ValueError, r"`port` .*Found a diagonal"),
        (lambda: PortHamiltonianSystem(2, dissipation="big"), TypeError, r"`dissipation` .*Found `str`"),
        (
            lambda: PortHamiltonianSystem(2, dissipation=torch.ones(3)),
            ValueError,
            r"`dissipation` .*diagonal of shape \(2,\).*\(3,\)",
        ),
        (
            lambda: PortHamiltonianSystem(2, dissipation=PositiveSemidefinite(3)),
            ValueError,
            r"`dissipation` .*\(2, 2\).*\(3, 3\)",
        ),
        (
            lambda: PortHamiltonianSystem(2, dissipation=-0.1),
            ValueError,
            r"`dissipation` .*semi.*eigenvalue of -0.1",
        ),
        (
            lambda: PortHamiltonianSystem(2, dissipation=torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
            ValueError,
            r"`dissipation` should be positive semi-definite.*eigenvalue of -1",
        ),
        (
            lambda: PortHamiltonianSystem(2, dissipation=torch.tensor([[1.0, 2.0], [0.0, 1.0]])),
            ValueError,
            r"`dissipation` should be symmetric.* = 2",
        ),
        (
            lambda: PortHamiltonianSystem(2, dissipation=nn.Parameter(torch.ones(2))),
            ValueError,
            r"`dissipation` .*learned part, which stays positive semi-definite.*Found `dissipation = Parameter",
        ),
        (
            lambda: PortHamiltonianSystem(2, dissipation=PortMatrix(2, 2)),
            ValueError,
            r"`dissipation` .*any weights.*PortMatrix",
        ),
        (
            lambda: PortHamiltonianSystem(2, inverse_mass=0.0),
            ValueError,
            r"`inverse_mass` .*eigenvalue of 0",
        ),
        (
            lambda: PortHamiltonianSystem(2, inverse_mass=NonNegativeDiagonal(2)),
            ValueError,
            r"`inverse_mass` .*any weights.*NonNegativeDiagonal",
        ),
        (
            lambda: PortHamiltonianSystem(2, inverse_mass=NonNegativeDiagonal(2, network=(3,), eps=0.1, n_signals=1)),
            ValueError,
            r"`inverse_mass.n_signals` should be 0, as z never.*`inverse_mass.n_signals = 1`",
        ),
        (lambda: PortHamiltonianSystem(2, potential=1.0), TypeError, r"`potential` .*Found `float`"),
        (
            lambda: PortHamiltonianSystem(2, potential=Potential(3)),
            ValueError,
            r"`potential.dof` should be 2.*`potential.dof = 3`",
        ),
        (lambda: Potential(2, activation=torch.sin), ValueError, r"`activation` should be non-negative.*-1"),
        (lambda: NonNegativeDiagonal(2, activation=torch.tanh), ValueError, r"`activation` .*-1"),
        (lambda: NonNegativeDiagonal(2, eps=-1.0), ValueError, r"`eps` .*`eps = -1.0`"),
        (lambda: PositiveDefinite(2, eps=0.0), ValueError, r"`eps` should be positive.*`eps = 0.0`"),
        (lambda: PositiveDefinite(2, start=-1.0), ValueError, r"`start` .*`start = -1.0`"),
        (lambda: PositiveSemidefinite(2, start=0.0), ValueError, r"`start` .*positive for a constant"),
        (lambda: PositiveSemidefinite(2, n_signals=1), ValueError, r"`n_signals` .*network.*`n_signals = 1`"),
        (lambda: PortMatrix(2, 1, start=torch.ones(2)), ValueError, r"`start.shape` should be \(2, 1\).*\(2,\)"),
        (lambda: ScaledSigmoid(0.0), ValueError, r"`limit` .*`limit = 0.0`"),
        (lambda: mlp(2, 1, widths=(3, 0)), ValueError, r"`widths` .*`widths = 0`"),
        (lambda: symplectic_matrix(1.5), ValueError, r"`dof` .*`dof = 1.5`"),
        (lambda: GivenMatrix(None), TypeError, r"`value` .*Found `NoneType`"),
        (lambda: GivenMatrix(torch.ones(2, 2), diagonal=True), ValueError, r"`value` .*diagonal.*\(2, 2\)"),
        (lambda: GivenMatrix(torch.ones(2, 2, 2)), ValueError, r"`value` .*two axes.*\(2, 2, 2\)"),
        (lambda: GivenMatrix(torch.tensor([1.0, math.nan])), ValueError, r"`value` .*finite.*nan"),
    ],
)
def test_construction_errors_name_the_parameter(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("parts", "change", "match"),
    [
        ({}, {"u": torch.ones(4, 2)}, r"`u` .*\(4, 1\).*`u.shape = \(4, 2\)`"),
        ({}, {"u": torch.ones(3, 1)}, r"`u` .*\(4, 1\).*`u.shape = \(3, 1\)`"),
        ({}, {"u": torch.ones(5, 4, 1)}, r"`u` .*`u.shape = \(5, 4, 1\)`"),
        ({}, {"p": torch.ones(4, 3)}, r"`x.p` .*\(\*batch, 2\).*`x.p.shape = \(4, 3\)`"),
        ({}, {"q": torch.ones(2)}, r"`x.q` .*\(4, 2\).*`x.q.shape = \(2,\)`"),
        ({"potential": Potential(2)}, {"q": None}, r"`x.q` should be given.*`x.q = None`"),
        ({"dissipation": PositiveSemidefinite(2, network=(3,))}, {"q": None}, r"`q` should be given"),
        (
            {"dissipation": PositiveSemidefinite(2, network=(3,), n_signals=2)},
            {},
            r"`z` should be a tensor of shape \(\*batch, 2\).*`None`",
        ),
        (
            {"dissipation": PositiveSemidefinite(2, network=nn.Linear(2, 3))},
            {},
            r"`network` .*4 numbers.*\(4, 3\)",
        ),
        ({"dissipation": lambda q: q.new_ones(4, 3, 2)}, {}, r"`dissipation` .*\(2, 2\).*\(3, 2\)"),
        (
            {"dissipation": GivenMatrix(lambda q: q.new_ones(4, 3), diagonal=True)},
            {},
            r"`dissipation` .*\(2,\).*\(3,\)",
        ),
        ({"port": lambda q: q}, {}, r"`port` .*\(2, 1\).*\(4, 2\)"),
        ({"inverse_mass": lambda q: q.unsqueeze(-1)}, {}, r"`inverse_mass` .*\(2, 2\).*\(2, 1\)"),
        (
            {"potential": lambda q: q.sum(-1, keepdim=True)},
            {},
            r"`potential` should give one value per state, shape \(4,\).*\(4, 1\)",
        ),
        (
            {"potential": Potential(2, network=nn.Linear(2, 2))},
            {},
            r"`network` .*one number.*\(4, 2\)",
        ),
    ],
)
def test_evaluation_errors_name_the_parameter(parts, change, match):
    values = {"q": torch.ones(4, 2), "p": torch.ones(4, 2), "u": torch.ones(4, 1)} | change
    system = PortHamiltonianSystem(2, **parts)
    with pytest.raises(ValueError, match=match):
        system.vector_field(PhaseState(values["q"], values["p"]), values["u"])
