"""Learning a system from its motions, judging what was learned, and fixing what no motion can tell."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import math
import os
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odeopt.checks import check_class, is_integer, is_number, require, require_counts
from odeopt.files import replaced
from odeopt.modes import outside_inference_mode
from odeopt.ode import STRUCTURE_METHODS, Status, integrate
from odeopt.physics import PhaseState
from odeopt.progress import tqdm
from odeopt.systems.data import Trajectories
from odeopt.systems.observed import ObservedSystem, PortHamiltonianModel, check_seed, weights_like


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """Settings of a fit.

    Attributes:
        n_passes: Times that training sees each window.
        n_points: Observations in a window, at least two; the motion is predicted from the first.
        n_batches: Steps of Adam in a pass: windows are shuffled and split into as many parts, whose sizes differ by one
            at most.
        lr: Peak of the learning rate, which rises over a tenth of the training and falls along a cosine.
        n_substeps: Steps of rk4 between two observations.
        seed: Of the shuffling.
    """

    n_passes: int = 1000
    n_points: int = 4
    n_batches: int = 5
    lr: float = 1e-2
    n_substeps: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        require_counts(n_passes=self.n_passes, n_batches=self.n_batches, n_substeps=self.n_substeps)
        require(is_integer(self.n_points), "n_points", self.n_points, "an integer of at least 2")
        require(is_number(self.lr) and self.lr > 0, "lr", self.lr, "a finite positive number")
        check_seed(self.seed)


class FitResult(NamedTuple):
    """Losses and status of a fit.

    Attributes:
        losses: Mean squared error of the observations predicted, by pass; see :meth:`ObservedSystem.residual`.
        status: ``Status.NON_FINITE_STATE`` if a loss or its gradient was not finite: the fit ended there, with the
            weights before it.
        message: What happened, where it did not go well.
        seconds: Wall-clock seconds.
    """

    losses: list[float]
    status: Status
    message: str
    seconds: float


@torch.inference_mode(False)  # which also undoes `torch.no_grad()`
def fit(
    model: ObservedSystem, data: Trajectories, config: FitConfig | None = None, *, progress_bar: bool = True
) -> FitResult:
    """Fit a model, in place, to the windows of motions.

    Gradients are recorded also where the caller has switched them off, as by ``torch.no_grad()``.

    Args:
        model: The model; its weights' dtype is what is computed in. Where it observes momenta, angles may be unwrapped
            or lie in (-pi, pi]: on circles errors count modulo 2 pi.
        data: Motions, wherever their clock starts.
        config: How; the default of :class:`FitConfig` if None.
        progress_bar: Whether to show one.

    Returns:
        Losses and status.

    Raises:
        ValueError: If the motions do not fit the model, are not finite or not evenly spaced, or a part of the model is
            not finite or not invertible at their first observations; if weights differ in dtype or device.
        TypeError: If an argument, or what the motions hold, is of another class.

    Warns:
        RuntimeWarning: If a loss was not finite, with which the fit ends.
    """
    config = FitConfig() if config is None else config
    check_class("model", model, ObservedSystem)
    check_class("data", data, Trajectories)
    check_class("config", config, FitConfig)
    weights = [p for p in model.parameters() if p.requires_grad]
    require(len(weights) > 0, "model", type(model).__name__, "one that has weights to learn")
    is_inference = any(p.is_inference() for p in weights)
    require(not is_inference, "model", type(model).__name__, "made outside of `torch.inference_mode()`")
    like = weights_like(model, weights[0])
    began = time.perf_counter()
    with torch.no_grad():
        t, x, u = data.checked(model).windows(config.n_points).to(like)
        n = x.shape[1]
        require(config.n_batches <= n, "n_batches", config.n_batches, f"at most the number of windows, {n}")
        model.check_finite(model.encode(x[0]), u[0])
    steps, n_steps = t.diff().tolist(), config.n_passes * config.n_batches
    optimizer = torch.optim.Adam(weights, lr=config.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _one_cycle(step / n_steps))
    generator, losses = torch.Generator().manual_seed(config.seed), []
    bar = tqdm(range(config.n_passes), disable=not progress_bar, desc="fit", unit="pass")
    for i in bar:
        total = x.new_zeros(())
        for batch in torch.randperm(n, generator=generator, device="cpu").tensor_split(config.n_batches):
            target = x[:, batch]
            predicted = model.roll(model.encode(target[0]), steps, u[:, batch], n_substeps=config.n_substeps)
            loss = model.residual(predicted, target)[1:].square().mean()
            optimizer.zero_grad()
            length = loss.detach()
            if loss.isfinite():
                loss.backward()
                length = torch.nn.utils.clip_grad_norm_(weights, 1.0)
            if not length.isfinite():
                bar.close()
                advice = "lower `lr`"
                if not losses:  # no pass has gone well
                    advice = "bring `t` and `x` to units in which the motions are numbers of about one"
                    advice += ", or lower `lr`" if optimizer.state else ""
                what = "gradient" if loss.isfinite() else "loss"
                message = f"A {what} was {length.item()} in pass {i + 1} of {config.n_passes}: {advice}."
                warnings.warn(message, RuntimeWarning, stacklevel=3)  # past the decorator
                return FitResult(losses, Status.NON_FINITE_STATE, message, time.perf_counter() - began)
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(batch) / n
        losses.append(total.item())
        bar.set_postfix(loss=f"{losses[-1]:.3g}")
    return FitResult(losses, Status.SUCCESS, "", time.perf_counter() - began)


def _one_cycle(part: float, warmup: float = 0.1) -> float:
    """Learning rate over its peak, after a part of the training."""
    if part < warmup:
        return 0.05 + 0.95 * part / warmup
    return 0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * (part - warmup) / (1 - warmup)))


def fit_kept(
    model: ObservedSystem,
    data: Trajectories,
    config: FitConfig,
    path: str | os.PathLike,
    *,
    settings: dict,
    progress_bar: bool = True,
) -> FitResult:
    """Fit a model unless a file has what an earlier call made of it, and keep what comes out in that file.

    Args:
        model: The model.
        data: Motions.
        config: How to fit.
        path: The file, whose folder is made; it appears when the fit is done.
        settings: What else tells one fit from another, as plain values: the seed of the model's first weights, options
            that their names and shapes do not show. The data and ``config`` are compared in any case.
        progress_bar: Whether to show one.

    Returns:
        Losses and status.

    Raises:
        ValueError: If the file is of other settings, data or weights, or cannot be read; or as for :func:`fit`.
    """
    check_class("data", data, Trajectories)
    checked = data.checked(model)
    options = dataclasses.asdict(config) | {"data": _digest(checked), "model": _described(model)}
    for name in settings.keys() & options.keys():
        require(settings[name] == options[name], f"settings[{name!r}]", settings[name], f"{options[name]!r}, as fitted")
    path, wanted = Path(path), settings | options
    if path.exists():
        content = path.read_bytes()
        try:
            kept = torch.load(io.BytesIO(content), weights_only=True)
            losses, status, message, seconds = kept["result"]
            result, weights = FitResult(losses, Status(status), message, seconds), dict(kept["weights"])
            names = wanted | kept["settings"]
            changed = [name for name in sorted(names) if wanted.get(name) != kept["settings"].get(name)]
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            found = f"Found `{path}`, which cannot be read; delete it to fit anew."
            raise ValueError(f"Parameter `path` should be new or hold a fit. {found}") from error
        if changed:
            raise ValueError(
                "Parameter `path` should be new or hold a fit of the same settings. "
                f"Found `{path}`, which differs in {', '.join(changed)}; choose another folder or delete it."
            )
        model.load_state_dict(weights)
        return result
    result = fit(model, data, config, progress_bar=progress_bar)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    kept = {"settings": wanted, "weights": weights, "result": [*result._replace(status=str(result.status))]}
    with replaced(path) as temporary:
        torch.save(kept, temporary)
    return result


def _digest(data: Trajectories) -> str:
    """SHA-256 of motions, with their shapes and dtypes."""
    digest = hashlib.sha256()
    for value in data:
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _described(model: ObservedSystem) -> str:
    """Class of a model, how it observes, and the names, shapes and dtypes of its weights."""
    weights = [f"{name} {value.dtype} {tuple(value.shape)}" for name, value in model.state_dict().items()]
    return ", ".join([type(model).__name__, model.coordinates.kinds, model.observes, *weights])


class Errors(NamedTuple):
    """Errors of predictions, each the sum of squares over a motion and all that is observed.

    Angles observed as they are count modulo 2 pi; see :meth:`ObservedSystem.residual`.

    Attributes:
        mean: Mean over motions; infinite where one did not stay finite.
        deviation: Standard deviation over them.
        n_diverged: Motions that did not stay finite.
        drift: How far predictions get off the circles; see :meth:`ObservedSystem.drift`.
    """

    mean: float
    deviation: float
    n_diverged: int
    drift: float

    def __str__(self) -> str:
        if self.n_diverged:
            return f"diverged ({self.n_diverged})"
        return f"{self.mean:.3g} ± {self.deviation:.2g}"

    def as_json(self) -> dict[str, Any]:
        """The fields by name and the text, with None in place of numbers that are not finite."""
        fields = {name: value if math.isfinite(value) else None for name, value in self._asdict().items()}
        return fields | {"text": str(self)}


def trajectory_errors(model: ObservedSystem, data: Trajectories, *, n_substeps: int = 1) -> Errors:
    """Predict motions from their first observations alone, and sum the squared errors over each.

    Args:
        model: The model.
        data: Motions, without noise.
        n_substeps: Steps between two observations; as many as the model was fitted with.

    Returns:
        Errors over the motions.

    Raises:
        ValueError: If the motions do not fit the model, or as for :meth:`ObservedSystem.rollout`.
    """
    check_class("model", model, ObservedSystem)
    check_class("data", data, Trajectories)
    data = data.checked(model)
    t, x, u = data.to(weights_like(model, data.x))
    with torch.no_grad():
        predicted = model.rollout(x[0], t, u, n_substeps=n_substeps).states
    squares = model.residual(predicted, x).double().square().sum((0, 2))
    n_diverged = int((~squares.isfinite()).sum())
    if n_diverged:
        return Errors(math.inf, math.inf, n_diverged, math.nan)
    return Errors(squares.mean().item(), squares.std(correction=0).item(), 0, model.drift(predicted))


class Rises(NamedTuple):
    """Steps without inputs in which the energy rose, which that of a passive system never does.

    Attributes:
        n: How many did, by more than rounding; where the energy is not finite, it counts as having risen.
        n_steps: Of how many, over all motions.
        largest: Largest change of energy in a step, relative to the range that energies span; negative where none rose,
            infinite where the energy is not finite.
        status: How the integration ended.
    """

    n: int
    n_steps: int
    largest: float
    status: Status

    def as_json(self) -> dict[str, Any]:
        """The fields by name, with None in place of a number that is not finite."""
        return self._asdict() | {"largest": self.largest if math.isfinite(self.largest) else None}


@outside_inference_mode  # the model is copied, and a copy made in it could not be differentiated
def energy_rises(
    model: PortHamiltonianModel, data: Trajectories, *, method: str = "discrete_gradient", factor: float = 1.0
) -> Rises:
    """Let a system run from first observations, without inputs and in double precision, and watch its energy.

    Whatever the weights, the flow of a model cannot gain energy; of the methods that solve it only
    ``"discrete_gradient"`` keeps that, for steps of any length that it can solve.

    Args:
        model: Learned or true; left as it is.
        data: Motions, of which the first observations and the times count.
        method: How to solve; one step from each time to the next.
        factor: How many times as long as the motions' the steps are.

    Returns:
        The steps in which the energy rose.

    Raises:
        ValueError: If the factor is not positive, or as for :func:`odeopt.integrate`.
    """
    require(is_number(factor) and factor > 0, "factor", factor, "positive")
    check_class("model", model, PortHamiltonianModel)
    check_class("data", data, Trajectories)
    data = Trajectories(*(value.cpu().double() for value in data.checked(model)))
    model = copy.deepcopy(model).cpu().double()
    t = factor * (data.t - data.t[0])  # without inputs nothing depends on the clock
    # far beyond the steps of its training a learned potential is rough; an equation not solved would blame the model
    options = {"max_iters": 200} if method in STRUCTURE_METHODS else None
    with torch.no_grad():
        x0 = PhaseState(*model.encode(data.x[0]).chunk(2, dim=-1))
        solution = integrate(model.system, x0, t, method=method, options=options)
        energy, gradient = model.system.energy(solution.states), model.system.energy_gradient(solution.states)
    change, size = energy.diff(dim=0), torch.cat(solution.states, dim=-1).abs().amax(-1)
    # of the energies, and of the equations of a step, which are solved to three quarters of the digits
    eps, slope = torch.finfo(energy.dtype).eps, torch.cat(gradient, dim=-1).abs().sum(-1)
    rounding = 16 * eps * energy.abs() + eps**0.75 * (1 + size) * slope
    rounding = rounding[1:] + rounding[:-1]
    is_lost = ~energy[1:].isfinite()
    n = int(((change > rounding) | is_lost).sum())
    known = energy[energy.isfinite()]
    largest = math.inf if is_lost.any() else (change.max() / (known.max() - known.min())).item()
    return Rises(n, change.numel(), largest, solution.status)


class Gauge(NamedTuple):
    r"""Unit and zero of the energy, which motions leave free.

    :math:`(M^{-1}/\alpha, \alpha V + c, \alpha D, \alpha g)` moves as :math:`(M^{-1}, V, D, g)` does where the velocity
    is observed; where the momentum is, the scale is one. Where a momentum is conserved but for the inputs there is more
    that is free, and is not fixed here: with the cart's, m the first row of M, also :math:`(M + c\, m m^\top, g + c\,
    m)` moves alike for any c. So the mass and the port of a cart-pole cannot be told from its motions.

    Attributes:
        scale: The model's energy in that of the truth, :math:`\alpha`.
        offset: :math:`c / \alpha`, in the truth's energy.
    """

    scale: float
    offset: float


class Parts(NamedTuple):
    """Parts of a system at some positions.

    Attributes:
        V: Potential, shape ``(n,)``.
        inverse_mass: Shape ``(n, dof, dof)``.
        D: Dissipation, shape ``(n, dof, dof)``.
        g: Input matrix, shape ``(n, dof, n_inputs)``.
    """

    V: Tensor
    inverse_mass: Tensor
    D: Tensor
    g: Tensor


def parts_at(model: PortHamiltonianModel, q: Tensor, gauge: Gauge | None = None) -> Parts:
    """Evaluate the parts of a system, in double precision and, where a gauge is given, in the truth's.

    Args:
        model: Learned or true.
        q: Positions, shape ``(n, dof)``.
        gauge: That of the model, as from :func:`fix_gauge`.

    Returns:
        The parts.
    """
    like = weights_like(model, q)
    with torch.no_grad():
        q = q.to(like)
        V, inverse, D, g = (
            part(q).to("cpu", torch.float64)
            for part in (model.potential, model.inverse_mass, model.dissipation, model.port)
        )
    scale, offset = gauge or Gauge(1.0, 0.0)
    return Parts(V / scale - offset, inverse * scale, D / scale, g / scale)


def fix_gauge(model: PortHamiltonianModel, truth: PortHamiltonianModel, q: Tensor) -> Gauge:
    """Find the gauge of a model: least squares of its inverse mass against the true one, then the mean of V.

    The dissipation and the input matrix have no say in it, so that comparing them is a test.

    Args:
        model: Learned, observed as the truth is.
        truth: The true system, in double precision.
        q: Positions over which to compare, shape ``(n, dof)``, double precision.

    Returns:
        The gauge.

    Raises:
        ValueError: If the two are not observed alike.
    """
    require(model.observes == truth.observes, "model", model.observes, f"one that observes the {truth.observes}")
    found, wanted = parts_at(model, q), parts_at(truth, q)
    scale = 1.0
    if truth.observes == "velocity":
        scale = ((found.inverse_mass * wanted.inverse_mass).sum() / found.inverse_mass.square().sum()).item()
    return Gauge(scale, (found.V / scale - wanted.V).mean().item())


def part_errors(model: PortHamiltonianModel, truth: PortHamiltonianModel, q: Tensor) -> dict[str, float]:
    """Relative errors of the parts, in the truth's gauge: root mean squares over positions.

    Args:
        model: Learned, observed as the truth is.
        truth: The true system, in double precision.
        q: Positions over which to compare, shape ``(n, dof)``, double precision.

    Returns:
        By the name of the part: V relative to its deviation from its mean, the others to themselves; NaN where the
        truth is zero.
    """
    gauge = fix_gauge(model, truth, q)
    found, wanted = parts_at(model, q, gauge), parts_at(truth, q)
    sizes = {name: value.square().sum() for name, value in wanted._asdict().items()}
    sizes["V"] = (wanted.V - wanted.V.mean()).square().sum()
    errors = {}
    for name, size in sizes.items():
        error = (getattr(found, name) - getattr(wanted, name)).square().sum()
        errors[name] = (error / size).sqrt().item() if size > 0 else math.nan
    return errors
