"""Observed motions to learn from, drawn as in the paper or with sampled inputs, exact or with noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from odeopt.checks import is_integer, is_list, is_number, require
from odeopt.systems.mechanics import Mechanism
from odeopt.systems.observed import ObservedSystem, check_increasing, check_inputs, check_observations, check_seed

INPUTS = (0.0, -1.0, 1.0, -2.0, 2.0)
# rk4 over steps of a tenth of the data's is exact to 1e-9 on all four systems
_N_SUBSTEPS = 10


class Trajectories(NamedTuple):
    """Observed motions under known inputs.

    Attributes:
        t: Times, shape ``(n_times,)``.
        x: Observations, shape ``(n_times, n, n_observed)``; :attr:`ObservedSystem.observation` names their numbers.
        u: Inputs, each held until the next time, shape ``(n_times - 1, n, n_inputs)``; None where nothing drove the
            system.
    """

    t: Tensor
    x: Tensor
    u: Tensor | None = None

    def checked(self, model: ObservedSystem) -> Trajectories:
        """Return these motions, inputs included, or raise an error that names what does not fit the model."""
        check_observations("x", self.x, model)
        require(self.x.dim() == 3, "x", tuple(self.x.shape), "of three axes, times, motions and numbers")
        t = check_increasing(self.t)
        require(len(t) == len(self.x), "t", tuple(t.shape), f"one time for each of {len(self.x)} observations")
        u = check_inputs(self.u, len(t) - 1, self.x.shape[1:2], model.n_inputs, like=self.x)
        return Trajectories(t, self.x, u)

    def windows(self, n_points: int) -> Trajectories:
        """Cut the motions into all overlapping pieces of a few points, which need equal steps of time.

        Args:
            n_points: Observations in a piece, at least two.

        Returns:
            As many motions as there are pieces, with times in double precision that start at zero.

        Raises:
            ValueError: If the motions are too short, or steps of time differ by more than their rounding, or this may
                be more than a twentieth of a step.
        """
        t = check_increasing(self.t)
        n_times, rounding = len(t), 2 * torch.finfo(t.dtype).eps * t.abs().max().item()
        is_right = is_integer(n_points) and 2 <= n_points <= n_times
        require(is_right, "n_points", n_points, f"between 2 and the {n_times} observations of a motion, an integer")
        steps = t.double().diff()
        step = steps.mean()  # far from zero it is known better than any one of them
        is_even = bool(((steps - step).abs() <= 1e-4 * step + rounding).all())
        is_precise = rounding <= 0.05 * step
        if not (is_even and is_precise):
            usual = steps.median()
            at = int(((steps - usual).abs() > 1e-4 * usual + rounding).int().argmax())
            found = f"steps of {usual:.5g} and, from `t[{at}]` to `t[{at + 1}]`, of {steps[at]:.5g}"
            if not is_precise:
                found = f"steps of {step:.3g} at times up to {t.abs().max():.5g}"
            raise ValueError(
                "Parameter `t` should be evenly spaced where motions are cut into windows, and precise enough to tell, "
                f"which {t.dtype} may not be. Found {found}."
            )
        x, u = (
            None if value is None else value.unfold(0, n, 1).permute(3, 0, 1, 2).flatten(1, 2)
            for value, n in ((self.x, n_points), (self.u, n_points - 1))
        )
        return Trajectories(step * torch.arange(n_points, dtype=step.dtype, device=step.device), x, u)

    def to(self, like: Tensor) -> Trajectories:
        """Convert observations and inputs to the dtype and the device of a tensor; times stay as they are."""
        return Trajectories(self.t, self.x.to(like), None if self.u is None else self.u.to(like))


class Data(NamedTuple):
    """Motions to learn from and to judge by.

    Attributes:
        train: Motions to learn from, with noise if there is any.
        test: Motions from first observations that training has not seen, without noise.
        prediction: From those of ``test``: twice as many observations, without inputs and noise.
        noise: Standard deviation of the noise of each number observed, shape ``(n_observed,)``.
    """

    train: Trajectories
    test: Trajectories
    prediction: Trajectories
    noise: Tensor


def make_data(
    mechanism: Mechanism,
    *,
    n: int = 128,
    n_times: int = 20,
    inputs: Sequence[float] | str = INPUTS,
    noise: float = 0.0,
    seed: int = 0,
) -> Data:
    """Simulate motions of a true system, in double precision.

    First observations are drawn uniformly; one half is for training, the other for testing.

    Args:
        mechanism: The true system.
        n: Number of first observations, even.
        n_times: Observations of each motion, the first included.
        inputs: Values at which the input is held, one motion for each and each first observation; or ``"sampled"``: as
            many motions, under inputs that are drawn anew for each step, normal with deviation sqrt(2), which is that
            of the default values.
        noise: Standard deviation of what is added to the observations of ``train``, relative to that of each number.
        seed: Of the first observations, sampled inputs and noise; the same seed, the same data.

    Raises:
        ValueError: If an argument is out of range, or a motion does not stay finite.
    """
    require(is_integer(n) and n >= 2 and n % 2 == 0, "n", n, "an even number of at least 2")
    require(is_integer(n_times) and n_times >= 2, "n_times", n_times, "at least 2")
    require(is_number(noise) and noise >= 0, "noise", noise, "a finite number of at least 0")
    check_seed(seed)
    is_sampled = isinstance(inputs, str) and inputs == "sampled"  # arrays compare by elements
    wanted = "a list of finite numbers, at least one, or 'sampled'"
    is_right = is_sampled or (is_list(inputs) and len(inputs) > 0 and all(map(is_number, inputs)))
    require(is_right, "inputs", inputs, wanted)
    generator = torch.Generator().manual_seed(seed + 1)
    n_inputs, n_values = mechanism.model.n_inputs, len(INPUTS) if is_sampled else len(inputs)
    first = mechanism.first_observations(n, seed=seed)
    x0, shape = [x0.repeat(n_values, 1) for x0 in first.chunk(2)], (n_times - 1, n_values * n // 2, n_inputs)
    if is_sampled:
        u = [2**0.5 * torch.randn(shape, generator=generator, dtype=first.dtype) for _ in x0]
    else:
        u = [torch.tensor(inputs, dtype=first.dtype).repeat_interleave(n // 2)[None, :, None].expand(shape)] * 2
    t, x, u = simulate(mechanism, torch.cat(x0), n_times, torch.cat(u, dim=1))  # at once: half the evaluations
    train, test = (
        Trajectories(t, x_half.contiguous(), u_half.contiguous())
        for x_half, u_half in zip(x.chunk(2, dim=1), u.chunk(2, dim=1), strict=True)
    )
    deviation = noise * train.x.flatten(0, 1).std(0)
    noisy = train.x + deviation * torch.randn(train.x.shape, generator=generator, dtype=train.x.dtype)
    return Data(train._replace(x=noisy), test, simulate(mechanism, first[n // 2 :], 2 * n_times), deviation)


def simulate(mechanism: Mechanism, x0: Tensor, n_times: int, u: Tensor | None = None) -> Trajectories:
    """Observe a true system from first observations on, at its own interval.

    Args:
        mechanism: The true system.
        x0: First observations, double precision, shape ``(n, n_observed)``.
        n_times: Observations of each motion, the first included.
        u: Inputs; see :meth:`odeopt.systems.ObservedSystem.rollout`.

    Returns:
        The motions.

    Raises:
        ValueError: If a shape does not fit or a motion does not stay finite.
    """
    t = mechanism.dt * torch.arange(n_times, dtype=x0.dtype)
    with torch.no_grad():
        solution = mechanism.model.rollout(x0, t, u, n_substeps=_N_SUBSTEPS)
    require(solution.is_success, "x0", x0.shape, f"where motions stay finite: {solution.message}")
    inputs = check_inputs(u, n_times - 1, x0.shape[:-1], mechanism.model.n_inputs, like=x0)
    return Trajectories(t, solution.states, inputs)
