"""Initial value problems: a field, a first state, output times, and what is known of the solution."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from odeopt.checks import require
from odeopt.ode.checks import State, check_state, check_times, tensors_of
from odeopt.ode.recorder import Field, map_state
from odeopt.physics import PhaseState, PortHamiltonianSystem


@dataclass(frozen=True, eq=False)
class Problem:
    """An initial value problem on which solvers are compared.

    Attributes:
        name: Names the problem in tables and on the command line.
        group: The class of problems it belongs to.
        field: Module or function ``(t, x) -> dx/dt``; None for the one of ``system``. A function has to follow the
            dtype and device of its state; a module is moved.
        x0: State at ``t[0]``, float64; a :class:`PhaseState` where there is a system.
        t: Output times, evenly spaced so that steps of every size can end on them, shape ``(n_times,)``.
        exact: Closed form: function of times, shape ``(n_times,)`` in float64, with the states there, each of shape
            ``(n_times, *shape)``; None where there is none.
        system: The problem as a port-Hamiltonian system, for methods that keep its structure; None if it is none.
        effort: Port effort u of the system, function of the 0-d time; None for zero. Likewise moved if it is a module.
        energy: Function of states with the energy of each; by default that of the system, None if there is none.
        is_autonomous: Whether the field does not depend on the time.
        is_stiff: Whether explicit methods are held to steps much under what accuracy needs.

    Raises:
        ValueError: If the state, the times or the parts are not as described.
    """

    name: str
    group: str
    x0: State
    t: Tensor
    field: Field | None = None
    exact: Callable[[Tensor], State] | None = None
    system: PortHamiltonianSystem | None = None
    effort: Callable[[Tensor], Tensor] | None = None
    energy: Callable[[State], Tensor] | None = None
    is_autonomous: bool = True
    is_stiff: bool = False

    def __post_init__(self) -> None:
        check_state(self.x0)
        dtypes = [x.dtype for x in tensors_of(self.x0)]
        is_real = not any(dtype.is_complex for dtype in dtypes)
        require(is_real, "x0.dtype", dtypes, "real: a complex number is two states")
        steps = check_times(self.t, tensors_of(self.x0)[0]).diff()
        rounding = 4 * torch.finfo(self.t.dtype).eps * self.t.abs().max()
        is_even = bool(((steps - steps[0]).abs() <= rounding).all())
        require(is_even, "t", self.t.tolist(), "evenly spaced")
        if self.system is None:
            require(self.field is not None, "field", self.field, "given unless a system is")
            require(self.effort is None, "effort", self.effort, "None where there is no system")
        else:
            require(isinstance(self.x0, PhaseState), "x0", self.x0, "a PhaseState where there is a system")
            require(self.field is None, "field", self.field, "None where a system is given, which has its own")
            object.__setattr__(self, "field", SystemField(self.system, self.effort))
            if self.energy is None:
                object.__setattr__(self, "energy", self.system.energy)

    @property
    def spacing(self) -> float:
        """Time between two outputs."""
        return (self.t[1] - self.t[0]).abs().item()

    def to(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> Problem:
        """Return the problem in another precision or on another device.

        Args:
            dtype: Of the state, the times and the tensors that the field, or the system and its effort, hold.
            device: Likewise.

        Returns:
            A problem that shares no module with this one.
        """
        t = self.t.to(device, dtype)
        if torch.finfo(dtype).eps < torch.finfo(self.t.dtype).eps:  # in finer numbers coarse ones are not evenly spaced
            t = torch.linspace(t[0].item(), t[-1].item(), len(t), dtype=dtype, device=device)
        moved = {"x0": map_state(lambda x: x.to(device, dtype), self.x0), "t": t}
        names = ("field" if self.system is None else "system", "effort", "energy")
        parts = {name: getattr(self, name) for name in names}

        def module_of(part: object) -> object:
            return getattr(part, "__self__", part)  # of a method

        # modules are copied together, so that the energy of a system or field stays its own; other functions are shared
        held = {name: part for name, part in parts.items() if isinstance(module_of(part), nn.Module)}
        copies = copy.deepcopy(held)
        for part in copies.values():
            module_of(part).to(device, dtype)
        return replace(self, **moved, **{"field": None} | parts | copies)


class SystemField(nn.Module):
    """The vector field of a port-Hamiltonian system under a given effort, as a function of time and state.

    Args:
        system: The system.
        effort: Port effort, function of the time; None for zero.
    """

    def __init__(self, system: PortHamiltonianSystem, effort: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.system, self.effort = system, effort

    def forward(self, t: Tensor, x: PhaseState) -> PhaseState:
        return self.system.vector_field(x, None if self.effort is None else self.effort(t))


def flatten(states: State) -> Tensor:
    """Write states, each of shape ``(n_times, *shape)``, as float64 rows, shape ``(n_times, n)``."""
    return torch.cat([x.reshape(len(x), -1).double() for x in tensors_of(states)], 1)
