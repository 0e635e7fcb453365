"""The learned port-Hamiltonian rule: every coordinate owns a small system with energy, friction and port."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from odeopt.modes import is_readable
from odeopt.ode import integrate_unit, is_fixed_step, linear_step
from odeopt.physics import (
    PhaseState,
    PortHamiltonianSystem,
    PowerBalance,
    QuadraticEnergy,
    RelativisticEnergy,
    spectral_power_balance,
)
from odeopt.rules.base import StagedRule, per_coordinate, per_tensor, state_dtype
from odeopt.rules.port_hamiltonian import kinetic as energies
from odeopt.rules.port_hamiltonian.checks import check_arguments, depends_on_q, is_linear, is_spectral
from odeopt.rules.port_hamiltonian.coefficients import (
    Outputs,
    Shared,
    aligned_move,
    decay_growth,
    depth_factor,
    horizon_factor,
    long_run_factor,
    network_from_zero,
    power_schedule,
    trust,
)
from odeopt.rules.port_hamiltonian.signals import (
    Observation,
    ShapeFeatures,
    fan_features,
    length_signal,
    run_length,
    shape_features,
    transferring_features,
)
from odeopt.rules.port_hamiltonian.system import HeldPart, Modulation, bounded_inverse_mass, potential_network
from odeopt.rules.preprocessing import averaging_weight, coordinate_rms, running_scale
from odeopt.rules.rows import Rows

_EPS_EFFORT = 1e-10  # under v in u = -g / sqrt(v); v is relative to the tensor's scale, so this is 1e-5 of it
_EPS_SIGNAL = 1e-4  # under squares and ratios in logarithms, which it bounds from below
_SLOW_DECAY = 0.999
_START_GAIN = 0.35
_MEMORY_WARMUP = 10  # steps after which the memory moves in logarithmic time


class PortHamiltonianState(NamedTuple):
    r"""State of the rule for one parameter tensor.

    Attributes:
        p: Momenta, shape ``(*batch, modes, n)``; the modes come first so that memory runs along coordinates.
        q: Positions, likewise; ``(*batch, 0, n)`` where no part of the system depends on them.
        second_moment: Running square of the gradient in units of ``scale`` squared, shape ``(*batch, n)``
            (coordinatewise variant: running rms, in units of the gradient; ``(*batch, 0)`` under
            ``normalization="tensor"``, which keeps none).
        scale: Running mean magnitude of the tensor's gradient, shape ``(*batch, 1)``.
        slow_scale: The same over a long memory, shape ``(*batch, 1)``.
        step: Number of steps taken, shape ``(*batch, 1)``.
        memory: Slow variables that the network of the tensor moves, and the growth of the log step size under
            ``alignment_rate``, if there is one; shape ``(*batch, n_memory)``.
    """

    p: Tensor
    q: Tensor
    second_moment: Tensor
    scale: Tensor
    slow_scale: Tensor
    step: Tensor
    memory: Tensor


class PortHamiltonianUpdate(StagedRule):
    r"""A port-Hamiltonian system per coordinate, driven by the gradient, moving the parameter by its output.

    .. math::
        \dot x = (J - R)\,\nabla H(x) + B u, \quad y = B^\top \nabla H(x), \quad
        u = -g / \sqrt{v}, \quad \dot\theta = \kappa\, y

    Effort ``u``, friction, port gain and step size ``kappa`` are held over one step of unit length, which
    ``solver`` integrates. A small network per tensor reads statistics (or, coordinatewise, only time) and
    emits the coefficients by which friction and gain of each coordinate follow from
    ``log(rms_i / rms_tensor)``, ``u_i p_i`` and ``|u_i|``. The friction ``2 sigmoid(.)`` is non-negative for any
    weights, so each system is passive for any weights. The untrained rule is two heavy balls with a
    normalised gradient. The update does not change when the loss is multiplied by a constant.

    The kinetic energy K of a mode (``kinetic``) is what distinguishes well-known optimizers. A spectral energy is a
    function of the singular values of a whole matrix, so its mode has one port gain g and one friction rate per tensor:

    .. math::
        \dot P = -\phi P + g\, u, \qquad \dot\theta = \kappa \sqrt{\text{out} / \text{rest}}\; g\,
        \frac{\partial K}{\partial P}, \qquad \frac{\partial K}{\partial P} = U k'(\Sigma) V^\top, \quad k' \ge 0

    The momentum's equation is solved by ``solver``; the output has a quadrature of one node, at the lookahead point. A
    matrix is a tensor of two axes, or of more with several rows (out, rest), unless it is a lookup table; all other
    tensors have the quadratic energy in place of a spectral one. With ``matrix_normalization="tensor"``, s one number
    per matrix, ``matrix_interval=1`` and no decay the loss plus :math:`\sum_k (\kappa_k / s) K_k` never rises along the
    flow while all that is held over a step is held, for any weights; :meth:`energy` and :meth:`power_balance` account
    for it.

    Args:
        modes: Degrees of freedom of each coordinate's system.
        solver: A method of :func:`odeopt.ode.integrate`, or ``"exponential"``, which solves the friction exactly
            (for systems without networks of q). Adaptive methods choose one step size for all coordinates, and so
            couple them.
        coordinatewise: If True no signal crosses coordinates (the seed's setting).
        mass: ``"unit"``, or ``"network"`` for a mass that depends on ``q``.
        potential: ``"none"``, or ``"network"`` for a potential V(q) >= 0.
        friction: ``"modulated"``; ``"network"`` to let it depend on ``q`` too; or ``"constant"``, the same for all
            coordinates of a tensor.
        port: ``"modulated"``, ``"network"`` or ``"constant"``, likewise.
        normalization: ``"coordinate"``, as above; or ``"tensor"`` for efforts ``u = -g / a``, with ``a`` the running
            mean magnitude of the tensor's gradient. It keeps no square per coordinate: friction and gain then follow
            the coordinate's present magnitude over the tensor's rms.
        hidden: Widths of the per-tensor network.
        decay: Decay of the running moments, per step, in ``[0, 1)``.
        time_scales: Scales of the time signals ``tanh(t / tau)``, in steps.
        uses_progress: Whether the network sees ``progress`` (and whether it is known).
        initial_kappa: Step size of the untrained rule where the fan-in is one, in units of the parameter; it
            falls with the fourth root of the fan-in.
        memory: Slow variables per tensor that the network sees, and moves by at most ``1 / max(t, 10)`` at step t; the
            first one is added to log kappa. So step sizes can grow for as long as gradients point along the momenta,
            and fall with powers of t at any horizon, where a fixed rate would let them die out exponentially.
        ratio_floor: Lower bound of the ratio ``rms_i / rms_tensor`` (with ``normalization="tensor"`` that of the
            present magnitude) in friction and gain, in ``[0, 1]``. 0 means no bound and is required with
            ``coordinatewise``. Coordinates that see small gradients get large gains, which enter the update twice. If a
            unit becomes active after a long silence, all its coordinates would get such gains at once, and throw a
            trained network out of its minimum. Ratios below about a hundredth are not distinguished anyway.
        backend: Implementation of the solver: ``"torchdiffeq"``; ``"odeopt"``, this library's own explicit methods,
            which give the same numbers to rounding at a fraction of the cost; or ``"auto"``, ours where there is one.
        kinetic: Kinetic energy of each mode, or one for all: ``"quadratic"`` (heavy ball); ``"relativistic"``, with
            bounded velocities (sign momentum in the limit of a small ``speed_limit``); or ``"spectral"``
            (orthogonalised momentum: Muon). All but the quadratic one need momenta that are stepped in closed form: a
            ``solver`` of this library and no networks of q.
        speed_limit: Bound of the velocity of a relativistic mode, in units of its momentum, which a steady effort of
            one brings to ``gain / friction``.
        output: ``"sum"`` of the modes' outputs; or ``"spectral"``: of a matrix the sum of the outputs of quadratic
            modes is orthogonalised, by its own norm. That is the gradient of no energy of the momenta, and nothing is
            claimed of the loss plus the stored energy.
        matrix_normalization: Efforts of matrices under spectral energies: ``"tensor"``, ``u = -g / a`` as above; or
            ``"coordinate"``, ``u = -g / sqrt(v)``, with which a spectral mode stays passive, but the loss plus the
            stored energy may rise.
        matrix_scale: Operator norm of a matrix's steps, by its shape: ``"transfer"``, sqrt(out / rest), for changes
            of a layer's output that are alike at any width; or ``"muon"``, sqrt(max(1, out / rest)).
        matrix_polynomial: k' of all spectral modes (and of ``output``): ``"muon"`` for the five factors of Muon;
            ``"short"`` for three factors, with 3/5 of the products, which bring singular values above .0111 of the norm
            into a band like Muon's, and raise smaller ones less (:data:`odeopt.physics.SHORT_COEFFICIENTS`); or
            ``"learned"``: the shapes of five factors are weights of the rule, which begin as Muon's
            (:class:`odeopt.physics.SpectralEnergy`). Passive for any weights, and of the same bound. On a CPU the
            matrices are then stepped by tensor operations, not in C, which would not be exact enough for all weights.
        initial_matrix_kappa: Step size of the untrained rule for square matrices under spectral energies: about the
            operator norm of a step, in units of the parameter.
        initial_lookahead: Point at which the untrained rule evaluates the velocity of a spectral mode, in steps from
            its start along the momentum's chord: 1 is its end (Muon without Nesterov momentum), ``1 + mu`` the Nesterov
            point of a momentum that decays by ``mu`` per step.
        initial_coherence: Exponent, under the untrained rule, of a momentum's coherence, which multiplies a spectral
            step: the momentum's rms over the rms that it would have if all gradients had been like the present one.
            Where gradients are mostly noise, coherence and steps are small, and so are the first steps. 0 is none, and
            stays none in training.
        initial_decay: Decoupled decay of matrices of the untrained rule, per step and unit of the matrix's step size:
            :math:`\dot\theta = \kappa (c\, y - \lambda\theta)`, c the scale of the shape. Not part of the effort: the
            closed loop of a spectral mode minimises about the loss under a bound of the operator norm, not the loss
            plus a square; the decay of :class:`odeopt.LearnedOptimizer` comes on top. Where :math:`\kappa\lambda` is
            above 1 the step is that many times shorter, and ends where the two balance. 0 is none, and stays none in
            training.
        decay_growth: Upper bound of a multiplier of that decay: the slow running mean of a tensor's gradient magnitude
            over the fast one, at least 1. Normalised efforts do not shrink with the gradient. So where a network has
            learned its examples by heart and gradients vanish, the decay counts as if it were a part of the loss, while
            elsewhere it is decoupled. 1 is none.
        decay_onset: Ratio of those means below which the multiplier is at most 1.5; above, it grows as the square of
            the ratio, until it has caught up. Gradients fall by a few times in the course of any fit, and by hundreds
            where examples are known by heart. 1 is none, which also holds where ``progress`` is None: step sizes do not
            fall to zero then, and gradients do not become as small.
        schedule: ``"power"`` for step sizes that fall as a power of the remaining fraction of the run, where
            ``progress`` is told, to zero at its end; the network sets the exponent, at first 1, and sees the length of
            the run in place of the progress. ``"none"`` leaves the schedule to the network.
        horizon_power: With ``schedule="power"``, how fast step sizes fall with the length of the run: those of T steps
            are :math:`(T / 500)^{-\text{power}}` times as large, from the second step on. Where the length is unknown,
            T is the number of steps so far, at least 100, and step sizes are halved: the mean of what falls linearly to
            zero.
        decay_horizon: With ``initial_decay`` and ``horizon_power``, length of a run, in steps, beyond which the decay
            per step falls too: :math:`(T / T_0)^{-\text{power}}` times, but at least .7, with the steps so far for T
            where the length is not told. The longer a run, the more it would decay its matrices. 0 is none.
        depth_power: With spectral energies, how fast steps of matrices fall with the number N of matrices in the
            network, which :meth:`for_depth` tells: :math:`(4 / (N - 1))^{\text{power}}`, N held between 1.25 and 5.
            Layers that follow each other add up their changes of the output, so that each may make a part of it;
            networks of more than five matrices are residual as a rule, and want no smaller steps.
        alignment_rate: How fast the step size of a tensor follows the alignment of effort and momenta, their cosine a:
            its logarithm moves by ``alignment_rate * (max(a - 0.2, 0) - max(-a - 0.5, 0)) / max(t, 10)`` at step t, so
            it grows for as long as gradients go on pointing along the momenta, and falls where each step overshoots.
            It keeps one number per tensor, which the network does not see. 0 is none.
        alignment_horizon: With ``alignment_rate``, number of steps from which on the logarithm goes back, in proportion
            to the inverse of the steps so far, at steps whose alignment moves it neither up nor down. Step sizes that
            let a run begin quickly are too long for the end of a long one. 0 is none.
        trust_ratio: Bound of the rms of a matrix's step, before the schedule, over the rms of the matrix; a tenth of
            the step is always allowed, so that matrices of zeros are trained. 0 is none.
        narrow: With spectral energies, matrices of at most this many rows or columns are stepped by coordinates, as
            vectors are. The few singular values of a layer of one output, or of one input, are all
            brought to one size, and what each of its many coordinates would need is lost. 0 is none.
        row_power: With spectral modes, how fast the port gain of a row of a matrix (of a unit, a filter) falls with
            the row's momentum, in [0, 1]; see :func:`~odeopt.rules.port_hamiltonian.kinetic.row_gains`. Effort and
            output of the row are both multiplied by it, so the mode stays passive; units whose gradients are small
            move further. 0 is none.
        matrix_products: Precision of the products that orthogonalise a matrix, with spectral energies: ``"full"``, that
            of the momenta; ``"bfloat16"``, with sums in float32, as in Muon; or ``"auto"``, bfloat16 for float32
            momenta on CUDA and full precision elsewhere, in meta-training, too. Large matrices are stepped several
            times as quickly in bfloat16 where the processor has units for it (CPUs with AMX, GPUs since Ampere), and
            more slowly elsewhere. :meth:`energy` and :meth:`power_balance` account for velocities in full precision.
        matrix_interval: With spectral energies, a matrix moves with every k-th gradient that it takes, by k times the
            step of velocity and decay; bounds of a step (``trust_ratio``, that of the decay) are bounds of the k-fold
            one. Momenta, scales, memory and the count of steps go on at every step, as do all other tensors.
            Orthogonalising is left out where no matrix of a call moves, if the tensors are on a CPU; elsewhere that
            would be a host synchronisation, and nothing is saved. The first move waits for k gradients, since one
            gradient tells little of the next k steps; and at step 1 the length of the run is not known yet. Steps after
            the last move, fewer than k, are lost: under a schedule they are close to zero, but in fewer than k steps no
            matrix moves at all. Each mode stays passive, but its output at the steps between two moves moves nothing:
            with k above 1, nothing is claimed of the loss plus the stored energy.

    Raises:
        ValueError: If an argument is out of range, or there is no such ``solver`` under ``backend``.

    References:
        Zhong, Dey, Chakraborty (2020), Dissipative SymODEN, Eq. (8): the system.
        Maddison et al. (2018), Hamiltonian descent methods: kinetic energies other than the quadratic one.
        Jordan et al. (2024), Muon: An optimizer for hidden layers in neural networks.
        Large et al. (2024), Scalable optimization in the modular norm, Prop. 3: step sizes of composed layers.
        Jacobs (1988), Increased rates of convergence through learning rate adaptation: the sign of what
        ``alignment_rate`` does.
        Ioannou, Kokotovic (1984), Instability analysis and improvement of robustness of adaptive control: leakage,
        which ``alignment_horizon`` begins.
        You, Gitman, Ginsburg (2017), Large batch training of convolutional networks, Eq. (6): trust ratios.
        Chen et al. (2024), Lion secretly solves constrained optimization: as Lyapunov predicts: decoupled decay.
        Li et al. (2025), NorMuon: Making Muon more efficient and scalable: rows of one size; there of the output alone.
        van der Schaft, Jeltsema (2014), Port-Hamiltonian systems theory, Ch. 2: passivity.
    """

    uses_layers = True
    starts_at_zero = True

    def __init__(
        self,
        *,
        modes: int = 2,
        solver: str = "rk4",
        coordinatewise: bool = False,
        mass: str = "unit",
        potential: str = "none",
        friction: str = "modulated",
        port: str = "modulated",
        normalization: str = "coordinate",
        hidden: tuple[int, ...] = (16, 16),
        decay: float = 0.95,
        time_scales: tuple[float, ...] = (3.0, 30.0, 300.0),
        uses_progress: bool = False,
        initial_kappa: float = 0.06,
        memory: int = 0,
        ratio_floor: float = 0.0,
        backend: str = "auto",
        kinetic: str | tuple[str, ...] = "quadratic",
        speed_limit: float = 1.0,
        output: str = "sum",
        matrix_normalization: str = "tensor",
        matrix_scale: str = "transfer",
        matrix_polynomial: str = "muon",
        initial_matrix_kappa: float = 0.03,
        initial_lookahead: float = 1.0,
        initial_coherence: float = 0.0,
        initial_decay: float = 0.0,
        decay_growth: float = 1.0,
        decay_onset: float = 1.0,
        schedule: str = "none",
        horizon_power: float = 0.0,
        decay_horizon: float = 0.0,
        depth_power: float = 0.0,
        alignment_rate: float = 0.0,
        alignment_horizon: float = 0.0,
        trust_ratio: float = 0.0,
        narrow: int = 0,
        row_power: float = 0.0,
        matrix_products: str = "auto",
        matrix_interval: int = 1,
    ) -> None:
        arguments = locals()
        defaults = {name: p.default for name, p in inspect.signature(PortHamiltonianUpdate).parameters.items()}
        config = {name: arguments[name] for name in defaults}
        check_arguments(config, defaults)
        # integers too: tensors take no large ones, and 1 and 1.0 are to be one rule
        numbers = {name: float(config[name]) for name, default in defaults.items() if isinstance(default, float)}
        config |= numbers
        lists = {"hidden": list(hidden), "time_scales": list(time_scales)}
        super().__init__(**config | lists | {"kinetic": kinetic if isinstance(kinetic, str) else list(kinetic)})
        for name in config.keys() - {"time_scales"}:  # a buffer
            setattr(self, name, config[name])
        self.n_memory = memory + (self.alignment_rate > 0)
        # those that are added to log kappa: the first one of the network, and the last of all
        self._growths = [0] * (memory > 0) + [memory] * (self.alignment_rate > 0)
        self.kinetic = (kinetic,) * modes if isinstance(kinetic, str) else tuple(kinetic)
        self.is_spectral = is_spectral(config)
        # of coordinates; those of what is no matrix have the quadratic energy in spectral modes. In a dictionary,
        # because they have no weights and are no modules of the rule
        quadratic, relativistic = QuadraticEnergy(), RelativisticEnergy(self.speed_limit)
        self._energies = {"quadratic": quadratic, "relativistic": relativistic, "spectral": quadratic}
        self.spectral_energy = energies.spectral_energy(matrix_polynomial) if self.is_spectral else None
        self.spectral_modes = [k for k, name in enumerate(self.kinetic) if name == "spectral"]
        self._other_modes = [k for k in range(modes) if k not in self.spectral_modes]
        self.steps_tables, self.steps_transposed, self.depth_factor = False, False, 1.0
        self.stores_q, self.is_linear = depends_on_q(config), is_linear(config)
        self.has_fixed_step = self.is_linear or is_fixed_step(solver)
        self.crosses_coordinates = not (coordinatewise and self.has_fixed_step)
        self.system = PortHamiltonianSystem(
            modes,
            inverse_mass=bounded_inverse_mass(modes) if mass == "network" else None,
            potential=potential_network(modes) if potential == "network" else None,
            dissipation=HeldPart("friction", modes, depends_on_q=friction == "network"),
            port=HeldPart("gain", modes, depends_on_q=port == "network"),
        )
        for name in ("spectral", "relativistic"):
            mask = torch.tensor([kinetic == name for kinetic in self.kinetic])
            self.register_buffer(f"is_{name}_mode", mask, persistent=False)
        self.register_buffer("time_scales", torch.tensor(time_scales, dtype=torch.float64), persistent=False)
        # in double precision, for rules in double
        self.register_buffer("decays", torch.tensor([self.decay, _SLOW_DECAY], dtype=torch.float64), persistent=False)
        self.register_buffer("magnitude_units", torch.tensor([1.0, 0.5]), persistent=False)
        # per mode: log gain and its slope, and for the friction a logit and three slopes; a constant has no slope
        self.n_gain, self.n_friction = 2 - (port == "constant"), 4 - 3 * (friction == "constant")
        self.n_numbers = self.n_gain + self.n_friction
        n_tensor_signals = 0 if coordinatewise else 6 + 2 * modes
        n_signals = n_tensor_signals + len(time_scales) + 2 * uses_progress + memory
        of_matrices = [int(self.is_spectral)] * 4
        self.output_sizes = Outputs(self.n_numbers * modes, 1, memory, int(schedule == "power"), *of_matrices)
        self.coefficient_network = network_from_zero(n_signals, sum(self.output_sizes), hidden)
        frictions = torch.logspace(math.log10(0.1), math.log10(0.7), modes, dtype=torch.float64)
        start = torch.zeros(self.n_numbers, modes, dtype=torch.float64)
        start[0], start[self.n_gain] = math.log(_START_GAIN), torch.logit(frictions / 2)
        self.register_buffer("start", start.flatten(), persistent=False)

    def _apply(self, fn, recurse=True):
        constants = {name: self._buffers[name] for name in ("decays", "start", "time_scales")}
        super()._apply(fn, recurse)
        for name, x in constants.items():  # which would be other constants in a narrow dtype: .999 is 1 in bfloat16
            self._buffers[name] = x.to(self._buffers[name].device)
        return self

    def init_state(self, param: Tensor) -> PortHamiltonianState:
        *batch, n = param.shape
        dtype = state_dtype(param.dtype)
        momenta = torch.zeros((*batch, self.modes, n), dtype=dtype, device=param.device)
        second_moment = per_coordinate(param)
        return PortHamiltonianState(
            p=momenta,
            q=torch.zeros_like(momenta) if self.stores_q else momenta[..., :0, :],
            second_moment=second_moment if self.normalization == "coordinate" else second_moment[..., :0],
            scale=per_tensor(param),
            slow_scale=per_tensor(param),
            step=per_tensor(param),
            memory=torch.zeros((*batch, self.n_memory), dtype=dtype, device=param.device),
        )

    @property
    def n_stages(self) -> int:
        """Number of sums over a tensor that a step waits for."""
        return 1 if self.coordinatewise else 2

    @property
    def is_staged(self) -> bool:
        """True if coordinates meet in sums only, and a coordinate without gradient and momentum stays so.

        An adaptive solver chooses one step size for all coordinates, and a potential moves those at rest.
        """
        return self.has_fixed_step and self.potential == "none"

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        if grad.shape[-1] == 0:
            return grad, state
        observation, shared = self._prepare(grad, state, param, shape, progress)
        if self.is_whole(shape):
            return self._advance_matrix(observation, state, shared, tuple(shape), param)
        return self._advance(observation, state, shared)

    def is_matrix(self, shape) -> bool:
        """True for the shape of a matrix that is not a lookup table, where an energy is spectral."""
        may_be = self.is_spectral and not self.steps_tables and shape is not None
        return may_be and energies.is_matrix(self._turned(shape))

    def is_whole(self, shape) -> bool:
        """True for the shape of a tensor that is stepped as a matrix, by a spectral energy; see ``narrow``."""
        return self.is_matrix(shape) and min(shape[0], math.prod(shape[1:])) > self.narrow

    def for_tables(self) -> PortHamiltonianUpdate:
        """The rule as it steps lookup tables, whose rows are vectors of their own: by coordinate energies."""
        rule = copy.copy(self)
        rule.steps_tables = True
        return rule

    def for_transposed(self) -> PortHamiltonianUpdate:
        """The rule as it steps matrices that are stored (in, out): scales and signals are those of (out, in)."""
        rule = copy.copy(self)
        rule.steps_transposed = True
        return rule

    def _turned(self, shape) -> tuple[int, ...]:
        """Shape (out, rest) of a matrix, by which its scale and signals go."""
        return (math.prod(shape[1:]), shape[0]) if self.steps_transposed and len(shape) > 1 else tuple(shape)

    def operator_scale(self, shape) -> float:
        """Operator norm of the step of a matrix, in units of that of a square one; see ``matrix_scale``."""
        return energies.operator_scale(self._turned(shape), self.matrix_scale)

    def for_depth(self, n_matrices: int) -> PortHamiltonianUpdate:
        """The rule as it steps one of ``n_matrices`` matrices of a network; see ``depth_power``."""
        if self.depth_power == 0:  # nothing changes: no copy at each step of a run
            return self
        rule = copy.copy(self)
        rule.depth_factor = depth_factor(n_matrices, self.depth_power)
        return rule

    def _advance_matrix(self, observation, state, shared, shape, param) -> tuple[Tensor, PortHamiltonianState]:
        """Step a matrix: spectral modes, or the sum of all, move it along the velocity of a spectral energy.

        The momenta of spectral modes are damped and driven by one number per tensor each, as the passivity of their
        energies asks; the output is their velocity at the lookahead point, a quadrature of one node.

        Where ``matrix_interval`` lets a matrix stay, its momenta are stepped and the update is zero.
        """
        friction, gain = self._matrix_modulation(observation, state, shared)
        p, spectral = state.p, self.spectral_modes
        efforts, rows = self._matrix_efforts(observation, p, shape)
        new_p, integral = linear_step(p, gain * efforts, friction, self.solver)
        new_state, moves = self._next_state(new_p, state.q, observation, state, shared), self._moves(shared)
        if moves is not None and is_readable(moves) and not moves.any():
            return torch.zeros_like(observation.u), new_state
        kappa = shared.matrix_kappa * self.operator_scale(shape)
        if self.output == "spectral":
            outputs = (gain * integral).sum(-2)
            update = kappa * self._spectral_velocity(outputs, shape)
        else:
            before, after = p[..., spectral, :], new_p[..., spectral, :]
            ahead = self._ahead(before, after, shared)
            velocity = self._spectral_velocity(ahead, shape, before, after)
            rates = friction[..., spectral, :1], gain[..., spectral, :1]
            if self.initial_coherence > 0:
                log_coherence = energies.coherence(after, efforts[..., spectral, :], *rates).log()
                velocity = velocity * (log_coherence * shared.coherence.unsqueeze(-1)).exp()
            update = kappa / _START_GAIN * rows * (rates[1] * velocity).sum(-2)
            if self._other_modes:
                outputs = gain * self._coordinate_integral(new_p, integral)
                kappa = shared.kappa * self.matrix_interval
                update = update + kappa * outputs[..., self._other_modes, :].sum(-2)
        if param is not None and self.initial_decay > 0:
            rate = shared.matrix_kappa * shared.matrix_decay
            # at lr <= 1 no step goes beyond where velocity and decay balance, however large step sizes have grown
            update = (update - rate * param) / rate.clamp(min=1.0)
        return update if moves is None else torch.where(moves, update, 0.0), new_state

    def _spectral_velocity(self, x: Tensor, shape: tuple[int, ...], *others: Tensor) -> Tensor:
        return energies.spectral_velocity(self.spectral_energy, x, shape, *others, products=self.matrix_products)

    def _moves(self, shared: Shared) -> Tensor | None:
        """Whether a matrix moves at this step, bool, shape ``(*batch, 1)``; None where it does at every one."""
        return None if self.matrix_interval == 1 else torch.remainder(shared.step, self.matrix_interval) == 0

    def _matrix_modulation(self, observation: Observation, state, shared: Shared) -> tuple[Tensor, Tensor]:
        """Friction and gain of each mode, ``(*batch, modes, n)``; ``(*batch, modes, 1)`` if all modes are spectral."""
        by_kind = self._by_kind(shared)
        held = 2 * torch.sigmoid(by_kind[self.n_gain]), by_kind[0].exp()
        if not self._other_modes:
            return held
        modulated, is_held = self._modulation(observation, state, shared), self.is_spectral_mode.unsqueeze(-1)
        friction, gain = (torch.where(is_held, x, y) for x, y in zip(held, modulated, strict=True))
        return friction, gain

    def _matrix_efforts(self, observation: Observation, p: Tensor, shape) -> tuple[Tensor, Tensor | float]:
        """Effort of each mode, shape ``(*batch, modes, n)``, and the gains of rows, which scale spectral ones."""
        u = observation.u.unsqueeze(-2).expand_as(p)
        if self.row_power == 0:
            return u, 1.0
        spectral, is_transposed = p[..., self.spectral_modes, :], self.steps_transposed
        rows = energies.row_gains(spectral, shape, self.row_power, is_transposed=is_transposed)
        scaled = rows.unsqueeze(-2) * u
        if self._other_modes:
            scaled = torch.where(self.is_spectral_mode.unsqueeze(-1), scaled, u)
        return scaled, rows

    def _ahead(self, before: Tensor, after: Tensor, shared: Shared) -> Tensor:
        """Momenta at the lookahead point, on the line through the ends of the step."""
        return before + shared.lookahead.unsqueeze(-1) * (after - before)

    def _prepare(self, grad, state, param, shape, progress) -> tuple[Observation, Shared]:
        shape_of_block = tuple(grad.shape[-1:] if shape is None else shape)
        n_blocks, rest = divmod(grad.shape[-1], max(1, math.prod(shape_of_block)))
        if rest:
            wanted = f"that of a tensor of {grad.shape[-1]} coordinates, or of each of its blocks"
            raise ValueError(f"Parameter `shape` should be {wanted}. Found `shape = {shape_of_block}`.")
        features = shape_features(self, shape_of_block, n_blocks, state.step.dtype, state.step.device)
        return self._observe_and_share(grad, state, Rows(features), param, progress, self.is_whole(shape))[:2]

    def forward_rows(self, grad, state, rows, *, param=None, progress=None):
        observation, shared, once = self._observe_and_share(grad, state, rows, param, progress)
        update, new_state = self._advance(observation, state, shared)
        return update, PortHamiltonianState(*new_state[:3], *once.kept)

    def _observe_and_share(
        self, grad, state, rows, param, progress, is_whole=False
    ) -> tuple[Observation, Shared, Shared]:
        """Take both stages of a step: what is seen of each coordinate, shared by each row, and by each tensor."""
        sums = rows.sum(self.statistics(0, grad, state, rows.broadcast(rows.features), None, param))
        shared = self.coefficients(0, sums, state, rows.features, None, progress)
        observation = self.observe(grad, state, rows.broadcast(shared), is_whole)
        if not self.coordinatewise:
            sums = rows.sum(self._second_sums(observation, state, param))
            shared = self.coefficients(1, sums, state, rows.features, shared, progress, has_param=param is not None)
        return observation, rows.broadcast(shared), shared

    def features(self, shape, n_blocks=1):
        turned, size = self._turned(shape), n_blocks * math.prod(shape)
        if not self.is_spectral:
            return fan_features(turned).of_size(size).joined()
        found = transferring_features(turned, is_table=self.steps_tables).of_size(size)
        if self.is_whole(shape):
            found = found._replace(step_rms=energies.step_rms(turned, self.matrix_scale))
        return found.joined()

    def statistics(self, stage, grad, state, features, shared, param):
        """Sums over coordinates: of the magnitude, shrunk; then of ``v, u^2, theta^2, u p_k, p_k^2``."""
        if self.coordinatewise:
            return grad[..., :0]
        if stage == 0:
            return (ShapeFeatures.split(features).shrink * grad.abs()).sum(-1, keepdim=True)
        return self._second_sums(self.observe(grad, state, shared), state, param)

    def _second_sums(self, observation: Observation, state, param: Tensor | None) -> Tensor:
        u, p = observation.u, state.p
        theta = torch.zeros_like(u) if param is None else param.to(u.dtype)
        squares = torch.stack((observation.second_moment, u * u, theta * theta), dim=-2)
        return torch.cat((squares, u.unsqueeze(-2) * p, p * p), dim=-2).sum(-1)

    def observe(self, grad: Tensor, state: PortHamiltonianState, shared: Shared, is_whole: bool = False) -> Observation:
        """Normalise a gradient, shape ``(*batch, n)``, by the running moments."""
        if self.coordinatewise:
            rms = coordinate_rms(grad, state.second_moment, shared.weight)
            return Observation(-grad / torch.where(rms > 0, rms, 1.0), rms)
        relative = grad / -shared.divisor
        if (self.matrix_normalization if is_whole else self.normalization) == "tensor":
            return Observation(relative, relative.square(), is_tensor_wide=True)
        square = shared.carried * state.second_moment + shared.weight * relative.square()
        return Observation(relative * (square + _EPS_EFFORT).rsqrt(), square)

    def _log_ratio(self, observation: Observation, shared: Shared) -> Tensor:
        """Log of each coordinate's running rms over that of its tensor, or of the floor, shape ``(*batch, n)``."""
        if self.coordinatewise:
            # the coordinate's present magnitude beside its own history: the tensor is out of sight
            return 0.5 * (observation.u.square() + _EPS_SIGNAL).log()
        log_ratio = 0.5 * (observation.second_moment + _EPS_SIGNAL).log() - shared.log_rms
        return log_ratio if self.ratio_floor == 0 else log_ratio.clamp(min=math.log(self.ratio_floor))

    def coefficients(self, stage, sums, state, features, shared, progress, *, has_param=True):
        """Running scale of the tensor (stage 0), then the coefficients that its network emits (the last stage)."""
        features = None if self.coordinatewise else ShapeFeatures.split(features)
        if stage == 0:
            shared = self._running_scales(sums, state, features)
            if not self.coordinatewise:
                return shared
            return self._with_network(shared, state.memory, [], features, progress, torch.zeros_like(shared.step))
        d, means = self.modes, sums / features.size
        v, u2, theta2, up, p2 = means.split((1, 1, 1, d, d), dim=-1)
        alignment = up * (u2 * p2 + _EPS_SIGNAL).rsqrt()
        theta_signal = 0.25 * (theta2 * features.theta_factor + 1e-6).log() if has_param else torch.zeros_like(v)
        shape_signals = features.signals.expand(*v.shape[:-1], -1)
        signals = [shared.magnitudes, alignment, 0.5 * (p2 + _EPS_SIGNAL).log(), theta_signal, shape_signals]
        log_rms = 0.5 * (v + _EPS_SIGNAL).log()
        mean_square = theta2 if has_param else None
        return self._with_network(
            shared, state.memory, signals, features, progress, log_rms, alignment.mean(-1, keepdim=True), mean_square
        )

    def _running_scales(self, sums: Tensor, state, features: ShapeFeatures | None) -> Shared:
        """Mean magnitude of the tensor's gradient over a short and over a long memory."""
        step = state.step + 1
        weight = averaging_weight(step, self.decays.to(step.dtype))
        if self.coordinatewise:
            zero = torch.zeros_like(step)
            return Shared(step, weight[..., :1], state.scale, state.slow_scale, zero, zero, zero)
        mean_abs = sums / (features.size * features.shrink)
        before = torch.cat((state.scale, state.slow_scale), dim=-1)
        scales, divisors, carried = running_scale(mean_abs, before, weight)
        # bounded below, and finite where both are zero
        magnitudes = (mean_abs / divisors + _EPS_SIGNAL).log() * self.magnitude_units.to(step.dtype)
        # coordinates keep their squares in units of the short memory
        scale, slow_scale = scales.split(1, dim=-1)
        return Shared(step, weight[..., :1], scale, slow_scale, divisors[..., :1], carried[..., :1], magnitudes)

    def _with_network(
        self,
        shared: Shared,
        memory: Tensor,
        signals: list[Tensor],
        features: ShapeFeatures | None,
        progress: Tensor | None,
        log_rms: Tensor,
        alignment: Tensor | None = None,
        mean_square: Tensor | None = None,
    ) -> Shared:
        """Complete what a tensor shares by the coefficients that its network emits."""
        step, network = shared.step, self.coefficient_network
        times = [torch.tanh(step / self.time_scales.to(step.dtype))]
        is_told = progress is not None
        progress = torch.zeros_like(step) if progress is None else torch.ones_like(step) * progress
        length = run_length(step, progress) if self.schedule == "power" else None
        if self.uses_progress:
            # under a schedule of its own the rule sees the length of the run, from the second step on, not its place
            times += [torch.full_like(step, float(is_told)), progress if length is None else length_signal(length)]
        inputs = torch.cat([*times, *signals, torch.tanh(memory[..., : self.memory])], dim=-1)
        inputs = inputs.to(network[-1].weight.dtype)
        out = Outputs(*network(inputs).to(step.dtype).split(self.output_sizes, dim=-1))
        log_kappa, log_matrix_kappa = out.log_kappa, out.log_matrix_kappa
        if self.n_memory > 0:
            moves = torch.tanh(out.memory_moves)
            if self.alignment_rate > 0:
                move = self.alignment_rate * aligned_move(alignment)
                if self.alignment_horizon > 0:
                    move = torch.where((move == 0) & (step > self.alignment_horizon), -memory[..., -1:], move)
                moves = torch.cat((moves, move), dim=-1)
            memory = memory + moves / step.clamp(min=_MEMORY_WARMUP)
            growth = sum(memory[..., k : k + 1] for k in self._growths)
            log_kappa, log_matrix_kappa = log_kappa + growth, log_matrix_kappa + growth
        # a start that is stable for wide layers: their outputs sum the steps of fan-in many coordinates
        start = self.initial_kappa if self.coordinatewise else self.initial_kappa * features.kappa_factor
        scheduled = power_schedule(progress, out.log_exponent) if self.schedule == "power" and is_told else 1.0
        if self.horizon_power > 0:
            scheduled = scheduled * horizon_factor(step, length if is_told else None, self.horizon_power)
        shared = shared._replace(
            per_mode=out.per_mode + self.start.to(step.dtype),
            kappa=start * log_kappa.exp() * scheduled,
            memory=memory,
            log_rms=log_rms,
        )
        if not self.is_spectral:
            return shared
        growth = 1.0
        if self.decay_growth > 1:
            onset = self.decay_onset if is_told else 1.0
            growth = decay_growth(shared.scale, shared.slow_scale, self.decay_growth, onset)
        if self.decay_horizon > 0:
            lasting = step if length is None or not is_told else length
            growth = growth * long_run_factor(lasting, self.decay_horizon, self.horizon_power)
        # of the step of a whole interval, so that what follows bounds it
        matrix_kappa = self.initial_matrix_kappa * self.depth_factor * self.matrix_interval * log_matrix_kappa.exp()
        if self.trust_ratio > 0 and mean_square is not None:
            matrix_kappa = matrix_kappa * trust(mean_square, matrix_kappa * features.step_rms, self.trust_ratio)
        return shared._replace(
            matrix_kappa=matrix_kappa * scheduled,
            lookahead=self.initial_lookahead * out.log_lookahead.exp(),
            # larger steps of shallow networks do not call for more decay
            matrix_decay=self.initial_decay / self.depth_factor * out.log_matrix_decay.exp() * growth,
            coherence=self.initial_coherence * out.log_coherence.exp(),
        )

    def _by_kind(self, shared: Shared) -> tuple[Tensor, ...]:
        """Coefficients of all modes, gains first, each of shape ``(*batch, modes, 1)``."""
        return shared.per_mode.unflatten(-1, (self.n_numbers, self.modes)).unsqueeze(-1).unbind(-3)

    def advance(self, grad, state, shared):
        return self._advance(self.observe(grad, state, shared), state, shared)

    def _advance(self, observation: Observation, state, shared: Shared) -> tuple[Tensor, PortHamiltonianState]:
        """Integrate every coordinate's system over one step; return the update and the next state."""
        q = state.q
        if not self.is_linear:
            p, q, delta = self._integrate(state, *self._held(observation, state, shared))
        else:
            friction, gain = self._modulation(observation, state, shared)
            p, integral = linear_step(state.p, gain * observation.u.unsqueeze(-2), friction, self.solver)
            delta = (gain * self._coordinate_integral(p, integral)).sum(-2)
        return shared.kappa * delta, self._next_state(p, q, observation, state, shared)

    def _next_state(self, p, q, observation: Observation, state, shared: Shared) -> PortHamiltonianState:
        keeps = self.normalization == "coordinate" and not observation.is_tensor_wide
        second_moment = observation.second_moment if keeps else state.second_moment
        return PortHamiltonianState(p, q, second_moment, *shared.kept)

    def _coordinate_integral(self, p: Tensor, integral: Tensor) -> Tensor:
        """Integral of the velocity over a step, of a momentum that ends at ``p`` and whose own integral is given."""
        if "relativistic" not in self.kinetic:
            return integral
        # a quadrature of one node, at the end
        velocity = self._energies["relativistic"].velocity(p)
        return torch.where(self.is_relativistic_mode.unsqueeze(-1), velocity, integral)

    def _modulation(self, observation: Observation, state, shared: Shared) -> tuple[Tensor, Tensor]:
        """Friction and port gain of each mode of coordinates, held over a step, shape ``(*batch, modes, n)``."""
        u, log_ratio = observation.u.unsqueeze(-2), self._log_ratio(observation, shared).unsqueeze(-2)
        coefficients = self._by_kind(shared)
        (log_gain, *gain_slope), (logit, *slopes) = coefficients[: self.n_gain], coefficients[self.n_gain :]
        if slopes:
            by_log_rms, by_power, by_effort = slopes
            logit = logit + by_log_rms * log_ratio + by_power * (u * state.p) + by_effort * u.abs()
        if gain_slope:
            log_gain = log_gain + gain_slope[0] * log_ratio
        # under 2 the friction stays inside rk4's stability region on a step of length one
        return 2 * torch.sigmoid(logit), log_gain.exp()

    def _held(self, observation: Observation, state, shared: Shared) -> tuple[Tensor, Modulation]:
        """Effort, shape ``(*batch, n, 1)``, and modulation, as the system takes them."""
        dtype, u = self._system_dtype(state), observation.u.unsqueeze(-1)
        friction, gain = (x.expand_as(state.p) for x in self._modulation(observation, state, shared))
        return u.to(dtype), Modulation(friction.mT.to(dtype), gain.mT.unsqueeze(-1).to(dtype))

    def _integrate(self, state, u: Tensor, z: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        """Momenta, positions and integrated output after one step of the solver on the whole system."""
        d, p, q = self.modes, state.p, state.q

        def field(t, y):
            dx, output = self.system.vector_field_and_output(self._phase(y[..., :d, :], y[..., d:-1, :]), u, z)
            rates = (dx.p.mT, output.mT) if dx.q is None else (dx.p.mT, dx.q.mT, output.mT)
            return torch.cat(rates, dim=-2)

        start = torch.cat((p, q, torch.zeros_like(p[..., :1, :])), dim=-2)
        end = integrate_unit(field, start.to(u.dtype), method=self.solver, backend=self.backend).to(p.dtype)
        p, q, delta = end.split((d, q.shape[-2], 1), dim=-2)
        return p, q, delta.squeeze(-2)

    def _system_dtype(self, state: PortHamiltonianState) -> torch.dtype:
        """Dtype that the system computes in: networks of q need that of their weights."""
        return self.coefficient_network[-1].weight.dtype if self.stores_q else state.step.dtype

    def _phase(self, p: Tensor, q: Tensor) -> PhaseState:
        return PhaseState(q.mT if self.stores_q else None, p.mT)

    def energy(self, state: PortHamiltonianState, *, shape: torch.Size | tuple[int, ...] | None = None) -> Tensor:
        """Energy stored in a state, dimensionless.

        Args:
            state: The state.
            shape: As in :meth:`forward`.

        Returns:
            Energy of each coordinate's system, shape ``(*batch, n)``; of a matrix that spectral modes step that of the
            whole, shape ``(*batch, 1)``, the spectral ones in units of the momentum's Frobenius norm and without the
            coherence, a factor of the energy and of the output that a step holds.
        """
        if self._has_spectral_balance(shape):
            P = energies.as_matrix(state.p[..., self.spectral_modes, :], shape)
            spectral = self.spectral_energy.energy(P, energies.held_norm(P)).sum((-2, -1))
            others = energies.coordinate_energy(state.p, self._energies_of(self._other_modes))
            return (spectral + others.sum(-1)).unsqueeze(-1)
        if "relativistic" in self.kinetic:
            return energies.coordinate_energy(state.p, self._energies_of(range(self.modes)))
        dtype = self._system_dtype(state)
        return self.system.energy(self._phase(state.p.to(dtype), state.q.to(dtype)))

    def power_balance(
        self,
        grad: Tensor,
        state: PortHamiltonianState,
        *,
        param: Tensor | None = None,
        shape: torch.Size | tuple[int, ...] | None = None,
        progress: Tensor | None = None,
    ) -> PowerBalance:
        """Account for the energy at the start of the step that ``grad`` drives.

        It is that of the momenta, which every step damps and drives: also of a step at which ``matrix_interval`` lets
        the matrix stay, when the supplied power is that of an output which moves nothing.

        Args:
            grad: Gradient of the loss, shape ``(*batch, n)``.
            state: State before the step.
            param: As in :meth:`forward`.
            shape: As in :meth:`forward`.
            progress: As in :meth:`forward`.

        Returns:
            Energy rate, dissipated and supplied power and their residual per step: of each coordinate, ``(*batch, n)``,
            or of a matrix that spectral modes step, ``(*batch, 1)``, with the norm that the step holds, and without the
            coherence, which multiplies each of its powers alike.
        """
        return self._balance(*self._prepare(grad, state, param, shape, progress), state, shape)

    def _balance(self, observation: Observation, shared: Shared, state, shape) -> PowerBalance:
        if not self._has_spectral_balance(shape):
            u, z = self._held(observation, state, shared)
            x = self._phase(state.p.to(u.dtype), state.q.to(u.dtype))
            if "relativistic" not in self.kinetic:
                return self.system.power_balance(x, u, z)
            held = z.friction.mT, z.gain.squeeze(-1).mT
            return energies.coordinate_balance(x.p.mT, u.mT, *held, self._energies_of(range(self.modes)))
        friction, gain = self._matrix_modulation(observation, state, shared)
        p, spectral = state.p, self.spectral_modes
        efforts, _ = self._matrix_efforts(observation, p, tuple(shape))
        after = linear_step(p, gain * efforts, friction, self.solver)[0][..., spectral, :]
        before = p[..., spectral, :]
        ahead = self._ahead(before, after, shared)
        rates = friction[..., spectral, 0], gain[..., spectral, 0]
        P, efforts, *others = (energies.as_matrix(x, shape) for x in (before, efforts[..., spectral, :], after, ahead))
        norm = energies.held_norm(P, *others)
        rates = (rate.unsqueeze(-1).expand(norm.shape) for rate in rates)
        total = [x.sum((-2, -1)) for x in spectral_power_balance(P, efforts, *rates, self.spectral_energy, norm)]
        if self._other_modes:
            coordinates = energies.coordinate_balance(
                p, observation.u.unsqueeze(-2), friction, gain, self._energies_of(self._other_modes)
            )
            total = [x + y.sum(-1) for x, y in zip(total, coordinates, strict=True)]
        return PowerBalance(*(x.unsqueeze(-1) for x in total))

    def account(self, grad, state, *, param=None, shape=None, progress=None):
        """Energy and powers, summed over the tensor; its step size; friction and port gain of each mode, on average.

        The step size is the factor on the system's output, of a matrix the operator norm that the output is given:
        with ``matrix_interval`` that of the whole interval where the matrix moves, and zero at the steps between. A
        friction or port that is a network of q is left out.
        """
        observation, shared = self._prepare(grad, state, param, shape, progress)
        balance = self._balance(observation, shared, state, shape)
        found = {"energy": self.energy(state, shape=shape), "energy_rate": balance.energy_rate}
        found |= {"dissipated": balance.dissipated, "supplied": balance.supplied}
        if self.is_whole(shape):
            step_size = shared.matrix_kappa * self.operator_scale(shape)
            moves = self._moves(shared)
            step_size = step_size if moves is None else torch.where(moves, step_size, 0.0)
            modulation = self._matrix_modulation(observation, state, shared)
        else:
            step_size, modulation = shared.kappa, self._modulation(observation, state, shared)
        found = {name: x.sum(-1) for name, x in found.items()} | {"step_size": step_size.squeeze(-1)}
        if self.stores_q:
            return found
        return found | {name: x.mean(-1) for name, x in zip(("friction", "gain"), modulation, strict=True)}

    def _energies_of(self, modes: Iterable[int]) -> dict[int, energies.CoordinateEnergy]:
        return {k: self._energies[self.kinetic[k]] for k in modes}

    def _has_spectral_balance(self, shape) -> bool:
        # the energy of a summed output is no energy of the momenta; theirs are the quadratic ones then
        return self.output == "sum" and self.is_whole(shape)
