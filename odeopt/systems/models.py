"""Learned models: port-Hamiltonian systems, and baselines with less knowledge of mechanics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from odeopt.checks import require_one_of
from odeopt.physics import PortHamiltonianSystem, PortMatrix, PositiveDefinite, PositiveSemidefinite, Potential, mlp
from odeopt.systems.coordinates import Coordinates
from odeopt.systems.observed import ObservedSystem, PortHamiltonianModel, check_n_inputs, check_seed, momentum

_WIDTHS, _SMALL = (40, 40), (16,)
# bound of the inverse mass: p = M dq/dt would leave all bounds where it passes by zero
_LEAST_INVERSE_MASS = 0.05


class Sine(nn.Module):
    """Sine as the activation of a network: smooth as tanh, and at home where a potential repeats itself."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def _network(
    coordinates: Coordinates, n_outputs: int, *, widths: Sequence[int], activation: Callable[[], nn.Module]
) -> nn.Sequential:
    """Network of positions as they are seen."""
    return nn.Sequential(coordinates, mlp(coordinates.n_features, n_outputs, widths=widths, activation=activation))


def structured(
    coordinates: str,
    *,
    observes: str,
    n_inputs: int = 1,
    dissipative: bool = True,
    widths: Sequence[int] = _WIDTHS,
    small_widths: Sequence[int] = _SMALL,
    activation: Callable[[], nn.Module] = nn.Tanh,
) -> PortHamiltonianModel:
    r"""Port-Hamiltonian system whose mass, potential, dissipation and input matrix are learned functions of positions.

    Passive for any weights, since D is semi-definite and M definite by construction.

    Args:
        coordinates: A letter for each degree of freedom, R or S; see :class:`Coordinates`.
        observes: ``"momentum"`` or ``"velocity"``.
        n_inputs: Number of inputs.
        dissipative: Whether there is a D; without it energy is conserved but for the inputs.
        widths: Hidden widths of the networks of V and the inverse of M.
        small_widths: Hidden widths of those of D = C C^T and g; without any, C and g are affine in what is seen.
        activation: Makes the activations of the former; those of the latter are tanh.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_n_inputs(n_inputs)
    seen = Coordinates(coordinates)
    dof = seen.dof

    network = partial(_network, seen, widths=widths, activation=activation)
    small = partial(_network, seen, widths=small_widths, activation=nn.Tanh)
    dissipation = PositiveSemidefinite(dof, network=small(dof * dof)) if dissipative else None
    system = PortHamiltonianSystem(
        dof,
        n_inputs=n_inputs,
        inverse_mass=PositiveDefinite(dof, network=network(dof * (dof + 1) // 2), eps=_LEAST_INVERSE_MASS),
        potential=Potential(dof, network=network(1)),
        dissipation=dissipation,
        port=PortMatrix(dof, n_inputs, network=small(dof * n_inputs)),
    )
    return PortHamiltonianModel(system, coordinates, observes=observes)


class UnstructuredHamiltonian(ObservedSystem):
    r"""Hamiltonian, dissipative, but H is one network of position and momentum.

    .. math:: \dot q = \partial H/\partial p, \qquad
        \dot p = -\partial H/\partial q - D(q)\, \partial H/\partial p + g(q)\, u

    Where the velocity is observed there is also a network of the inverse mass, by which ``p = M(q) dq/dt``.

    Args:
        coordinates: A letter for each degree of freedom, R or S; see :class:`Coordinates`.
        observes: ``"momentum"`` or ``"velocity"``.
        n_inputs: Number of inputs.
        widths: Hidden widths of the networks of H and the inverse mass.
        small_widths: Hidden widths of those of D = C C^T and g; without any, C and g are affine in what is seen.
        activation: Makes the activations.

    Raises:
        ValueError: If an argument is out of range.
    """

    parts = ("inverse_mass", "dissipation", "port")

    def __init__(
        self,
        coordinates: str,
        *,
        observes: str,
        n_inputs: int = 1,
        widths: Sequence[int] = _WIDTHS,
        small_widths: Sequence[int] = _SMALL,
        activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__(coordinates, observes=observes, n_inputs=n_inputs)
        dof, seen = self.dof, self.coordinates
        self.hamiltonian = mlp(seen.n_features + dof, 1, widths=widths, activation=activation)
        self.inverse_mass = None
        if observes == "velocity":
            network = _network(seen, dof * (dof + 1) // 2, widths=widths, activation=activation)
            self.inverse_mass = PositiveDefinite(dof, network=network, eps=_LEAST_INVERSE_MASS)
        small = partial(_network, seen, widths=small_widths, activation=nn.Tanh)
        self.dissipation = PositiveSemidefinite(dof, network=small(dof * dof))
        self.port = PortMatrix(dof, n_inputs, network=small(dof * n_inputs))

    def _momentum(self, q: Tensor, v: Tensor) -> Tensor:
        return momentum(self.inverse_mass(q), v)

    def _velocity(self, q: Tensor, p: Tensor) -> Tensor:
        return (self.inverse_mass(q) @ p.unsqueeze(-1)).squeeze(-1)

    def field(self, state: Tensor, u: Tensor) -> Tensor:
        keeps_graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad():
            if not (keeps_graph and state.requires_grad):
                state = (state.clone() if state.is_inference() else state.detach()).requires_grad_()
            # at fixed others: stages of a solver may make p a function of q
            q, p = (part.view_as(part) for part in state.chunk(2, dim=-1))
            H = self.hamiltonian(torch.cat((self.coordinates(q), p), dim=-1)).sum()
            dH_dq, dH_dp = torch.autograd.grad(H, (q, p), create_graph=keeps_graph)
        drag = (self.dissipation(q) @ dH_dp.unsqueeze(-1)).squeeze(-1)
        force = (self.port(q) @ u.unsqueeze(-1)).squeeze(-1)
        rate = torch.cat((dH_dp, force - dH_dq - drag), dim=-1)
        return rate if keeps_graph else rate.detach()


class GeometricBaseline(ObservedSystem):
    """A network of the rates of position and momentum, or velocity: it knows of circles, and of no mechanics.

    Args:
        coordinates: A letter for each degree of freedom, R or S; see :class:`Coordinates`.
        observes: ``"momentum"`` or ``"velocity"``.
        n_inputs: Number of inputs.
        widths: Hidden widths.
        activation: Makes the activations.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        coordinates: str,
        *,
        observes: str,
        n_inputs: int = 1,
        widths: Sequence[int] = (64, 64),
        activation: Callable[[], nn.Module] = nn.Tanh,
    ) -> None:
        super().__init__(coordinates, observes=observes, n_inputs=n_inputs)
        state = self.encode(torch.zeros(self.n_observed))
        n_seen = len(self._seen(state)) + n_inputs
        self.network = mlp(n_seen, len(state), widths=widths, activation=activation)

    def field(self, state: Tensor, u: Tensor) -> Tensor:
        return self.network(torch.cat((self._seen(state), u.expand(*state.shape[:-1], -1)), dim=-1))

    def _seen(self, state: Tensor) -> Tensor:
        """Return what the network reads of a state."""
        q, rate = state.chunk(2, dim=-1)
        return torch.cat((self.coordinates(q), rate), dim=-1)


class NaiveBaseline(GeometricBaseline):
    """A network of the rate of what is observed, which knows nothing: it may leave the circle.

    The arguments are those of :class:`GeometricBaseline`; observations are read by the coordinates.
    """

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, state: Tensor) -> Tensor:
        return state

    def _seen(self, state: Tensor) -> Tensor:
        return state


def make_model(kind: str, coordinates: str, *, observes: str, seed: int = 0, **options: object) -> ObservedSystem:
    """Build a model of a kind with weights drawn from a seed, whatever was drawn before.

    Args:
        kind: One of :data:`MODELS`.
        coordinates: A letter for each degree of freedom, R or S; see :class:`Coordinates`.
        observes: ``"momentum"`` or ``"velocity"``.
        seed: Of the weights.
        options: Further arguments of the model.

    Raises:
        ValueError: If there is no such kind, or an argument is out of range.
    """
    require_one_of(MODELS, kind=kind)
    check_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[kind](coordinates, observes=observes, **options)


MODELS: dict[str, Callable[..., ObservedSystem]] = {
    "port-Hamiltonian": structured,
    "without dissipation": partial(structured, dissipative=False),
    "unstructured": UnstructuredHamiltonian,
    "geometric": GeometricBaseline,
    "naive": NaiveBaseline,
}
