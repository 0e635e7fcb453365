"""meta_train(): the loop that fits a rule, with validation, checkpoints and resume."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from odeopt.checks import is_number, require
from odeopt.files import held, replaced, unfit
from odeopt.meta.config import MetaConfig, MetaResult
from odeopt.meta.distributed import ALONE, LostRankError, World, current_world
from odeopt.meta.identity import are_close, differences, identity_of
from odeopt.meta.layouts import CompiledSteps
from odeopt.meta.outliers import Outliers
from odeopt.meta.validation import validation_score
from odeopt.progress import tqdm
from odeopt.rules.base import UpdateRule, check_tasks_apart
from odeopt.tasks import Draw, Mixture, Task
from odeopt.tasks.random import VALIDATION_SEED

_FORMAT = 4  # of checkpoints
_PATIENCE = 10.0  # seconds that a run which is interrupted waits for its last scalars


def meta_train(
    rule: UpdateRule,
    task: Task | Mixture,
    config: MetaConfig | None = None,
    *,
    validation_task: Task | Mixture | None = None,
    folder: str | os.PathLike | None = None,
    stop_after: float | None = None,
    progress_bar: bool = True,
    compile: bool = False,
    on_validation: Callable[[int, float], bool] | None = None,
) -> MetaResult:
    """Fit ``rule`` so that the loss of ``task`` falls fast.

    The exact meta-gradient over the full horizon is the default. Meta-gradients that are not finite or outliers are
    skipped and counted, long ones scaled down; the weights kept are those that did best in validation over the full
    horizon on tasks that training never sees.

    Where torch.distributed has a default group, as under ``torchrun``, every rank makes this call, with the same
    arguments. Each works on ``config.n_tasks`` tasks of its own, and all end up with the same weights: those of one
    process with as many tasks as they have together, to rounding. The first rank's initial weights count, and it
    alone writes and prints. A resumed run keeps the number of tasks per meta-step that it began with, divided over
    the ranks there are now, so that it gives the result of the uninterrupted one on any number of them.

    Args:
        rule: The rule; changed in place. On return it holds the best weights.
        task: Training tasks, or a mixture of them: each meta-step then averages over the meta-gradients of
            ``config.n_tasks`` draws per rank, each of which is skipped or scaled down by itself.
        config: Settings; the defaults when None.
        validation_task: Where validation tasks come from; ``task``, with other seeds, by default.
        folder: Where ``checkpoint.pt`` and TensorBoard scalars go. A checkpoint found there is continued, and
            gives the result the uninterrupted run would have given. None keeps nothing. It is the same run if settings,
            training and validation tasks (:meth:`odeopt.tasks.Task.fingerprint`, which says what it cannot tell
            apart) and the rule are the same; the rule holds the weights that the run began with, or those that an
            earlier call left in it.
        stop_after: Seconds after which this call stops at the next validation, to be resumed later.
        progress_bar: Whether to show one.
        compile: Whether the steps of a staged rule (the port-Hamiltonian ones) go through ``torch.compile``: a minute
            at the start, then about half the time. The numbers are the same to rounding.
        on_validation: Called with the meta-step and the score of each validation, those of a checkpoint that is
            continued first, on the first rank. Where it returns True this call stops, as by ``stop_after``.

    Returns:
        The result, also when stopped early: ``len(result.meta_losses)`` says how far it got.

    Raises:
        ValueError: If ``folder`` holds a checkpoint that cannot be read, or one of a run with other settings, tasks or
            weights, or with fewer tasks per meta-step than there are ranks; if gradients are disabled; if the rule's
            weights have several dtypes, or its steps mix tasks; if ``stop_after`` is no number; if a rank's arguments
            are not those of the others; if ``compile`` is set for a rule that is not staged, or an estimator that does
            not backpropagate; if ``task`` is a mixture and the estimator has runs that go on from call to call.
        OSError: If another process works on ``folder``, or it cannot be written to.
        TypeError: If an argument is of another class, or the rule returns something else than it should.
        LostRankError: If another rank stopped or cannot be reached. The last checkpoint is whole.

    Warns:
        RuntimeWarning: If no validation came out finite: nothing was learned then. With a folder also if a task gives
            other losses each time, so that the run cannot be resumed exactly.
    """
    config = MetaConfig() if config is None else config
    validation_task = task if validation_task is None else validation_task
    for name, value, wanted in (
        ("rule", rule, UpdateRule),
        ("task", task, Task | Mixture),
        ("config", config, MetaConfig),
        ("validation_task", validation_task, Task | Mixture),
        ("folder", folder, str | os.PathLike | None),
        ("on_validation", on_validation, Callable | None),
    ):
        if not isinstance(value, wanted):
            kind = " or ".join(cls.__name__ for cls in getattr(wanted, "__args__", (wanted,)))
            raise TypeError(f"Parameter `{name}` should be of class {kind}. Found `{value!r}`.")
    check_call(stop_after)
    folder = None if folder is None else Path(folder)
    run = _Run(rule, task, config, validation_task, folder, current_world(), compile)
    try:
        with _flushed():
            run.resume()
            _train(run, stop_after, on_validation, progress_bar)
    except LostRankError as error:
        then = "nothing was kept" if folder is None else f"the same command continues from {folder}"
        raise LostRankError(f"{error}, after meta-step {len(run.result.meta_losses)}; {then}.") from error
    finally:
        # after an interruption too: then the next call is told from one that begins with other weights
        rule.load_state_dict(run.best_weights)
        if run.result.best_step > 0:
            rule.trained_for = None  # what a file said of other weights
        run.close()
    if not math.isfinite(run.result.best_score) and run.world.is_first:
        warnings.warn(
            "No validation came out finite, so no weights could be chosen: the rule is as it was. "
            f"{run.result.n_skipped_nonfinite} meta-gradients were not finite.",
            RuntimeWarning,
            stacklevel=2,
        )
    return run.result


def check_call(stop_after: object) -> None:
    """Raise a ValueError where a call can train nothing: its time is no number, or gradients are disabled."""
    is_time = stop_after is None or is_number(stop_after)
    require(is_time, "stop_after", stop_after, "a number of seconds or None")
    if not torch.is_grad_enabled():
        raise ValueError(
            "`meta_train` takes gradients with respect to the weights of `rule`, so they should be enabled. Found "
            "`torch.is_grad_enabled() = False`; call it outside torch.no_grad() and torch.inference_mode()."
        )


@contextmanager
def _flushed() -> Iterator[None]:
    """Take numbers too small to be normal for zero, on this thread.

    Momenta of rows whose gradients are tiny or zero, as those of pixels that are always black, come to such numbers, on
    which a processor is a hundred times slower.
    """
    was_flushing = not (torch.full((1,), 1e-40, dtype=torch.float32, device="cpu") * 1).any()
    if torch.get_num_threads() > 1:  # workers that begin later would inherit the flag, and keep it
        torch.ones(2**20, device="cpu").exp_()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(was_flushing)


def _train(
    run: _Run, stop_after: float | None, on_validation: Callable[[int, float], bool] | None, progress_bar: bool
) -> None:
    n_done, n_wanted = len(run.result.meta_losses), run.config.n_meta_steps
    # seconds are those of all calls together
    began = time.perf_counter() - run.result.seconds
    stop_at = math.inf if stop_after is None else run.result.seconds + stop_after
    is_hidden = not (progress_bar and run.world.is_first)

    def is_end(news: Iterable[tuple[int, float]], is_late: bool = False) -> bool:
        is_heard = on_validation is not None and run.world.is_first
        answers = [on_validation(step, score) for step, score in news] if is_heard else []
        # clocks differ between ranks: the first one's decides
        return run.world.broadcast(is_late or any(answers))

    with tqdm(total=n_wanted, initial=n_done, disable=is_hidden, desc="meta-training") as bar:
        if not run.result.validation:
            run.validate(0)
            run.result.seconds = time.perf_counter() - began
        is_ended = is_end(run.result.validation)
        while not is_ended and len(run.result.meta_losses) < n_wanted:
            for loss in run.episode():
                bar.update()
                bar.set_postfix({"meta-loss": f"{loss:.3f}", "best score": f"{run.result.best_score:.4f}"})
            if run.after_episode():
                run.result.seconds = time.perf_counter() - began
                run.save()
                is_ended = is_end(run.result.validation[-1:], run.result.seconds > stop_at)


@dataclasses.dataclass(eq=False)
class _Run:
    """State of one meta-training run; everything in it that changes goes into the checkpoint."""

    rule: UpdateRule
    task: Task | Mixture
    config: MetaConfig
    validation_task: Task | Mixture
    folder: Path | None
    world: World
    is_compiled: bool = False

    def __post_init__(self) -> None:
        rule, config = self.rule, self.config
        self.objective, self.estimator = config.objective, config.estimator.fresh()
        is_fit = not (self.estimator.is_stateful and isinstance(self.task, Mixture))
        require(is_fit, "task", self.task, f"no mixture where `estimator = {config.estimator}`, whose runs go on")
        wanted = f"False where `estimator = {config.estimator}`, which does not backpropagate only"
        require(self.estimator.is_compilable or not self.is_compiled, "compile", self.is_compiled, wanted)
        # validation takes the steps as they are
        self.stepped: UpdateRule | CompiledSteps = CompiledSteps(rule) if self.is_compiled else rule
        self.parameters = [p for p in rule.parameters() if p.requires_grad]
        require(len(self.parameters) > 0, "rule", type(rule).__name__, "one with parameters to learn")
        dtypes = sorted({str(value.dtype) for value in rule.state_dict().values() if value.is_floating_point()})
        require(len(dtypes) <= 1, "rule", " and ".join(dtypes), "one with weights of one dtype")
        check_tasks_apart(rule)
        lr, beta2 = float(config.lr), float(config.beta2)  # a checkpoint with a number of NumPy's cannot be read back
        self.meta_optimizer = torch.optim.Adam(self.parameters, lr=lr, betas=(0.9, beta2))
        self.outliers = Outliers(config.outlier_factor)
        self.parts = {"rule": rule, "meta_optimizer": self.meta_optimizer, "outliers": self.outliers}
        self.scheduler = None
        if config.schedule == "one-cycle":
            self.scheduler = self.parts["scheduler"] = torch.optim.lr_scheduler.OneCycleLR(
                self.meta_optimizer, lr, total_steps=max(config.n_meta_steps, 2), cycle_momentum=False
            )
        self.result = MetaResult(rule, n_tasks_per_step=config.n_tasks * self.world.size)
        self.best_weights = _copy(rule.state_dict())
        self.averaged = _copy(rule.state_dict())
        self.n_tasks_seen = 0
        self.path = None if self.folder is None else self.folder / "checkpoint.pt"
        self.hold, self.writer = ExitStack(), None

    def episode(self) -> Iterator[float]:
        """Train on one batch of tasks; yield the meta-loss of each meta-step."""
        config, n_tasks = self.config, self.result.n_tasks_per_step
        indices = torch.arange(self.n_tasks_seen, self.n_tasks_seen + n_tasks)[self.world.share(n_tasks)]
        self.n_tasks_seen += n_tasks
        if isinstance(self.task, Mixture):  # one meta-step on draws, of which each rank has its own
            draws = (self.task.draw(number, config.seed) for number in indices.tolist())
            yield self._update([estimate for draw in draws for estimate in self._estimates(draw, ALONE)], self.world)
            return
        for estimate in self._estimates(Draw(self.task, indices, config.horizon, tells_horizon=True), self.world):
            yield self._update([estimate], ALONE)
            if len(self.result.meta_losses) == config.n_meta_steps:
                return

    def _estimates(self, draw: Draw, world: World) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Meta-gradients of a draw, one tensor for each parameter, and the meta-losses that they are of."""
        steps = self.estimator.gradients(
            self.stepped,
            draw.task,
            self.objective,
            indices=draw.indices,
            horizon=draw.horizon,
            seed=self.config.seed,
            update_scale=self.config.gain_margin,
            tells_horizon=draw.tells_horizon,
            world=world,
        )
        self.meta_optimizer.zero_grad()
        for meta_loss in steps:
            yield [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters], meta_loss
            self.meta_optimizer.zero_grad()

    def _update(self, estimates: list[tuple[list[Tensor], Tensor]], world: World) -> float:
        """Move along the mean of meta-gradients, each of bounded length; return the mean meta-loss.

        Meta-gradients that are not finite or outliers are left out and counted; where no other is left nothing moves.

        Args:
            estimates: Meta-gradients and meta-losses of this rank.
            world: The ranks that have estimates of their own; one alone where all have the same.
        """
        own = [[world.rank, torch.nn.utils.get_total_norm(grads).item()] for grads, _ in estimates]
        rows = world.gather(torch.tensor(own, dtype=torch.float64).view(-1, 2)).tolist()
        # unlike ranks may round a norm differently, and part for good where one of them skips
        rows = self.world.broadcast(rows)
        are_kept = [self._is_kept(norm) for _, norm in rows]
        kept = [(norm, is_kept) for (rank, norm), is_kept in zip(rows, are_kept, strict=True) if rank == world.rank]
        total, losses = [torch.zeros_like(p) for p in self.parameters], [loss.double() for _, loss in estimates]
        for (grads, _), (norm, is_kept) in zip(estimates, kept, strict=True):
            if is_kept:
                scale = (self.config.clip / (grads[0].new_tensor(norm) + 1e-12)).clamp(max=1.0)
                total = [x + scale * grad for x, grad in zip(total, grads, strict=True)]
        n, device = max(len(losses), 1), self.parameters[0].device
        mean = torch.stack(losses).mean() if losses else torch.zeros((), dtype=torch.float64)
        mean, *total = world.average([mean.to(device), *(x / n for x in total)], weight=n)
        for p, grad in zip(self.parameters, total, strict=True):
            p.grad = grad if any(are_kept) else None  # without any the step moves nothing
        self.meta_optimizer.step()
        self._after_update(statistics.median(norm for _, norm in rows))
        self.result.meta_losses.append(mean.item())
        return mean.item()

    def _is_kept(self, norm: float) -> bool:
        """Decide whether a meta-gradient of this length counts; called once for each."""
        if not norm < float("inf"):
            self.result.n_skipped_nonfinite += 1
            return False
        if self.outliers.has(norm):
            # thousands of times the usual length is chaos, not a direction: clipped it would still be a step
            self.result.n_skipped_outliers += 1
            return False
        return True

    def _after_update(self, norm: float) -> None:
        """Average the weights, write the log, and move on along the schedule."""
        step, decay = len(self.result.meta_losses) + 1, self.config.averaging
        for name, value in self.rule.state_dict().items():
            if value.is_floating_point():
                self.averaged[name].lerp_(value, 1 - decay)
            else:
                self.averaged[name].copy_(value)
        self._log("meta/gradient_norm", norm, step)
        self._log("meta/lr", self.meta_optimizer.param_groups[0]["lr"], step)
        if self.scheduler is not None and step < self.config.n_meta_steps:
            self.scheduler.step()

    def after_episode(self) -> bool:
        """Validate when it is time; return whether it was."""
        n_done = len(self.result.meta_losses)
        self._log("meta/loss", self.result.meta_losses[-1], n_done)
        every, n_validated = self.config.validate_every, self.result.validation[-1][0]
        if n_done // every == n_validated // every and n_done < self.config.n_meta_steps:
            return False
        self.validate(n_done)
        return True

    def validate(self, step: int) -> None:
        config = self.config
        current = _copy(self.rule.state_dict())
        self.rule.load_state_dict(self.averaged)
        score = validation_score(
            self.rule,
            self.validation_task,
            indices=torch.arange(config.n_validation_tasks),
            horizon=config.horizon,
            seed=VALIDATION_SEED,
            held_out=config.objective.held_out,
            world=self.world,
        )
        self.result.validation.append((step, score))
        self._log("validation/score", score, step)
        if score < self.result.best_score:
            self.result.best_score, self.result.best_step = score, step
            self.best_weights = _copy(self.averaged)
        self.rule.load_state_dict(current)

    def save(self) -> None:
        estimator = {} if self.path is None else self.estimator.state_dict(self.world)  # every rank's part of it
        if self.path is None or not self.world.is_first:
            return
        result = {name: value for name, value in vars(self.result).items() if name != "rule"}
        checkpoint = {"format": _FORMAT, "estimator": estimator, "result": result}
        for name in ("identity", "initial", "best_weights", "averaged", "n_tasks_seen"):
            checkpoint[name] = getattr(self, name)
        checkpoint |= {name: part.state_dict() for name, part in self.parts.items()}
        with replaced(self.path) as temporary:
            torch.save(checkpoint, temporary)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one; the first rank reads it for all."""
        self.world.broadcast_result(self._open)
        if self.path is not None or self.world.size > 1:
            self.identity = identity_of(self.rule, self.task, self.validation_task, self.config)
        self._start_alike()
        self.initial = _copy(self.rule.state_dict())
        content = self.world.broadcast_result(self._read)
        if content is None:
            return
        try:
            checkpoint = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            found = ", which cannot be read; delete it to start anew"
            raise unfit(self.path, "a whole checkpoint", found) from error
        if checkpoint.get("format") != _FORMAT:
            found = ", written by another one; finish the run with that version or delete it to start anew"
            raise unfit(self.path, "a checkpoint of this version of odeopt", found)
        changed = differences(self.identity, checkpoint["identity"])
        if not any(are_close(self.initial, checkpoint[name]) for name in ("initial", "best_weights")):
            changed.append("`initial weights`")
        if changed:
            found = f" with another {', '.join(changed)}; choose another folder or delete it"
            raise unfit(self.path, "a checkpoint of the same run", found)
        self.initial = checkpoint["initial"]
        result = MetaResult(self.rule, **checkpoint["result"])
        if result.n_tasks_per_step < self.world.size:
            raise ValueError(
                f"The run in `{self.path}` has {result.n_tasks_per_step} tasks per meta-step, too few for "
                f"{self.world.size} ranks. Continue it on at most {result.n_tasks_per_step}."
            )
        for name, value in self.rule.state_dict().items():
            self.best_weights[name] = checkpoint["best_weights"][name].to(value.device)
            self.averaged[name] = checkpoint["averaged"][name].to(value.device)
        for name, part in self.parts.items():
            part.load_state_dict(checkpoint[name])
        self.result = result
        self.estimator.load_state_dict(checkpoint["estimator"])
        self.n_tasks_seen = checkpoint["n_tasks_seen"]

    def _open(self) -> None:
        if self.folder is not None:
            self.hold.enter_context(held(self.folder))  # else a second run would replace the checkpoint of the first
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder))

    def _read(self) -> bytes | None:
        return None if self.path is None or not self.path.exists() else self.path.read_bytes()

    def _start_alike(self) -> None:
        """Give every rank the first one's weights, and refuse ranks that are about to run something else."""
        if self.world.size == 1:
            return
        weights = {name: value.cpu() for name, value in self.rule.state_dict().items()}
        identity, weights = self.world.broadcast((self.identity, weights))
        if changed := differences(identity, self.identity):
            raise ValueError(
                f"Every rank should train the same rule in the same way. Found another {', '.join(changed)} on rank "
                f"{self.world.rank}."
            )
        self.rule.load_state_dict(weights)
        self.best_weights, self.averaged = _copy(self.rule.state_dict()), _copy(self.rule.state_dict())

    def close(self) -> None:
        with self.hold:
            if self.writer is not None and isinstance(sys.exception(), KeyboardInterrupt):
                # it may have come while a lock of the writer was taken, and then closing never ends
                closing = threading.Thread(target=self.writer.close, daemon=True)
                closing.start()
                closing.join(_PATIENCE)
            elif self.writer is not None:
                self.writer.close()

    def _log(self, name: str, value: float, step: int) -> None:
        if self.writer is not None:
            self.writer.add_scalar(name, value, step)


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in weights.items()}
