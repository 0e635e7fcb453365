"""Meta-training on several ranks: two gloo processes, and what one process makes of the same run."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys

import pytest
import torch
from meta_toys import configured
from rank_toys import on_two_processes
from rule_toys import flat_weights

import odeopt
from odeopt.__main__ import main
from odeopt.files import held
from odeopt.meta import LostRankError, MetaConfig, World, meta_train
from odeopt.meta.distributed import ALONE, current_world
from odeopt.rules import HamiltonianUpdate, PortHamiltonianUpdate
from odeopt.tasks import RandomQuadratic
from odeopt.tasks.base import FINGERPRINT_SEED

TASK = RandomQuadratic(3, dtype=torch.float64)
# three tasks on each of two ranks are six on one; five validation tasks do not divide by two
CONFIG = {"n_meta_steps": 8, "n_tasks": 3, "horizon": 5, "validate_every": 2, "n_validation_tasks": 5, "lr": 1e-2}
RUNS = {
    "full": {},
    "truncated": {"truncation": 2, "gain_margin": 1.5},
    "checkpointed, detached": {"checkpoint_every": 2, "detach": True},
    "more ranks than validation tasks": {"n_validation_tasks": 1, "schedule": "constant"},
}
# float64: sums over tasks in another order, grown over the meta-steps
SAME = {"rtol": 1e-9, "atol": 1e-11}


def tiny_rule(seed=0):
    torch.manual_seed(seed)
    return PortHamiltonianUpdate(hidden=(3,), modes=1).double()


def train(options, *, folder=None, stop_after=None, seed=0, n_tasks=None):
    config = configured(**(CONFIG | options | ({} if n_tasks is None else {"n_tasks": n_tasks})))
    rule = tiny_rule(seed)
    result = meta_train(rule, TASK, config, folder=folder, stop_after=stop_after)
    return {
        "weights": flat_weights(rule),
        "losses": torch.tensor(result.meta_losses, dtype=torch.float64),
        "validation": torch.tensor(result.validation, dtype=torch.float64),
        "best": (result.best_step, result.n_skipped_outliers, result.n_skipped_nonfinite, result.n_tasks_per_step),
    }


def assert_same(got, expected):
    for name in ("weights", "losses", "validation"):
        torch.testing.assert_close(got[name], expected[name], **SAME)
    assert got["best"] == expected["best"]


def raised(call, *args, **kwargs):
    """Kind and message of the exception that a call raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 -- the tests that read it match the message
        call(*args, **kwargs)
    return type(caught.value).__name__, str(caught.value)


# -------------------- what a rank does


def exchanges(rank):
    """Every exchange of numbers; what this rank made of it."""
    world = current_world()
    ours = [torch.full((2, 1), 1.0 + rank), torch.tensor(10.0 * rank, dtype=torch.float64)]
    return {
        "rank": (world.rank, world.size, world.is_first),
        "share": [(s := world.share(n)).stop - s.start for n in (5, 1, 4)],
        "average": world.average(ours, weight=1 + 2 * rank),
        "gather": world.gather(torch.arange(3.0 * rank).view(-1, 1)),
        "broadcast": world.broadcast({"rank": rank}),
        "broadcast_result": world.broadcast_result(lambda: rank),
        "error": raised(world.broadcast_result, lambda: 1 / rank),
        "local_first": world.local_first(lambda: rank),
    }


class Watched(RandomQuadratic):
    """Quadratics that remember which of them were asked for."""

    def __init__(self):
        super().__init__(3, dtype=torch.float64)
        self.asked = set()

    def init_params(self, indices, seed):
        self.asked.update((seed, index) for index in indices.tolist())
        return super().init_params(indices, seed)


class Broken(RandomQuadratic):
    """Quadratics whose losses are not numbers where the task's number says so."""

    def __init__(self, index):
        super().__init__(3, dtype=torch.float64)
        self.index = index

    def draw(self, indices, seed):
        W, y = super().draw(indices, seed)
        return torch.where((indices == self.index).view(-1, 1, 1), torch.nan, W), y


def train_on_two(rank, folder):
    """All that two ranks are asked for, in one go: starting processes takes longer than what they do."""
    out = {name: train(options, seed=rank) for name, options in RUNS.items()}  # the first rank's weights count
    out["exchanges"] = exchanges(rank)
    # written on two ranks, to be continued on one
    train({}, folder=folder / "two", stop_after=0.0 if rank == 0 else None)
    out["own folder"] = (folder / f"own{rank}", train({}, folder=folder / f"own{rank}"))[0].exists()
    # begun on one rank with six, three, and one task per meta-step
    out["continued"] = train({}, folder=folder / "one", n_tasks=6)
    out["uneven"] = train({}, folder=folder / "three")
    out["too many ranks"] = raised(train, {}, folder=folder / "single", n_tasks=1)
    with held(folder / "held") if rank == 0 else contextlib.nullcontext():
        out["held"] = raised(train, {}, folder=folder / "held")
    config, watched = MetaConfig(**CONFIG), Watched()
    meta_train(tiny_rule(), watched, config)
    out["asked"] = sorted(name for name in watched.asked if name[0] != FINGERPRINT_SEED)
    result = meta_train(tiny_rule(), Broken(4), config, validation_task=TASK)  # task 4 is the second rank's
    out["non-finite"] = (result.n_skipped_nonfinite, len(result.meta_losses))
    other = HamiltonianUpdate().double() if rank else tiny_rule()
    out["unlike"] = raised(meta_train, other, TASK, config)  # breaks the group: the last thing to do
    return out


def dies(rank, folder):
    """The command line, on a rank that ends without a word at its hundredth evaluation, eight of the task's
    fingerprint aside."""
    loss, n_evaluations = RandomQuadratic.loss, []

    def deadly(self, params, batch):
        n_evaluations.append(0)
        if rank == 1 and len(n_evaluations) == 108:
            os._exit(9)
        return loss(self, params, batch)

    RandomQuadratic.loss = deadly
    with open(folder / f"stderr{rank}", "w", buffering=1) as sys.stderr:
        return main(command(folder))


# -------------------- one process


def test_process_alone_exchanges_nothing():
    assert type(current_world()) is World
    assert (ALONE.rank, ALONE.size, ALONE.is_first) == (0, 1, True)
    values = [torch.ones(2), torch.zeros(1)]
    assert all(a is b for a, b in zip(ALONE.average(values, weight=3), values, strict=True))
    assert ALONE.gather(values[0]) is values[0]
    assert ALONE.broadcast(5) == ALONE.broadcast_result(lambda: 5) == ALONE.local_first(lambda: 5) == 5
    assert ALONE.share(7) == slice(0, 7)


@pytest.mark.parametrize("n", [1, 2, 5, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_shares_are_a_fair_partition(n, size):
    shares = []
    for rank in range(size):
        world = World()
        world.rank, world.size = rank, size
        shares.append(list(range(n))[world.share(n)])
    assert list(itertools.chain(*shares)) == list(range(n))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_checkpoint_of_the_first_version_is_refused(tmp_path):
    train({}, folder=tmp_path)
    path = tmp_path / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["format"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"a checkpoint of this version of odeopt. Found `.*checkpoint.pt`"):
        train({}, folder=tmp_path)


def test_resumed_run_may_take_segments_of_another_length(tmp_path):
    expected = train({})
    train({}, folder=tmp_path, stop_after=0)
    assert_same(train({"checkpoint_every": 2}, folder=tmp_path), expected)


# -------------------- two ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def pair(folder):
    train({}, folder=folder / "one", stop_after=0, n_tasks=6)
    train({}, folder=folder / "three", stop_after=0)
    train({}, folder=folder / "single", stop_after=0, n_tasks=1)
    results = on_two_processes(train_on_two, folder)
    assert None not in results
    return results


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_equal_one_process_with_twice_the_tasks(pair, name):
    first, second = (result[name] for result in pair)
    assert torch.equal(first["weights"], second["weights"])
    assert torch.equal(first["losses"], second["losses"])
    assert torch.equal(first["validation"], second["validation"])
    expected = train(RUNS[name], n_tasks=6)
    assert_same(first, expected)
    assert first["best"][-1] == 6
    assert (expected["weights"] - flat_weights(tiny_rule())).abs().max() > 1e-3  # they went somewhere


def test_no_task_is_worked_on_twice(pair):
    first, second = (set(result["asked"]) for result in pair)
    training, validation = ({i for seed, i in first | second if (seed == 0) is wanted} for wanted in (True, False))
    assert training == set(range(8 * 6))
    assert validation == set(range(5))
    assert not first & second


def test_ranks_exchange_numbers_that_all_of_them_see(pair):
    first, second = (result["exchanges"] for result in pair)
    assert (first.pop("rank"), second.pop("rank")) == ((0, 2, True), (1, 2, False))
    assert [sum(n) for n in zip(first.pop("share"), second.pop("share"), strict=True)] == [5, 1, 4]
    assert (first.pop("local_first"), second.pop("local_first")) == (0, 1)
    for result in (first, second):
        column, number = result["average"]
        assert torch.equal(column, torch.full((2, 1), 1.75))  # (1 * 1 + 2 * 3) / 4
        assert torch.equal(number, torch.tensor(7.5, dtype=torch.float64))
        assert torch.equal(result["gather"], torch.arange(3.0).view(-1, 1))
        assert (result["broadcast"], result["broadcast_result"]) == ({"rank": 0}, 0)
        assert result["error"] == ("ZeroDivisionError", "division by zero")


def test_run_of_two_ranks_is_continued_on_one(pair, folder):
    assert len(torch.load(folder / "two" / "checkpoint.pt", weights_only=True)["result"]["meta_losses"]) == 2
    assert_same(train({}, folder=folder / "two"), train({}, n_tasks=6))


def test_run_of_one_process_is_continued_on_two_ranks(pair):
    assert_same(pair[0]["continued"], train({}, n_tasks=6))
    assert torch.equal(pair[0]["continued"]["weights"], pair[1]["continued"]["weights"])


def test_batch_that_does_not_divide_is_shared_unevenly_and_weighted(pair):
    assert_same(pair[0]["uneven"], train({}))
    assert torch.equal(pair[0]["uneven"]["weights"], pair[1]["uneven"]["weights"])


def test_more_ranks_than_tasks_are_refused(pair):
    for result in pair:
        kind, message = result["too many ranks"]
        assert kind == "ValueError"
        assert "has 1 tasks per meta-step, too few for 2 ranks. Continue it on at most 1." in message


def test_folder_that_another_process_works_on_is_refused_on_every_rank(pair, folder):
    for result in pair:
        kind, message = result["held"]
        assert kind == "OSError"
        assert f"that nothing else works on. Found `{folder / 'held'}`" in message


def test_rank_whose_gradient_is_not_finite_makes_all_skip(pair):
    assert [result["non-finite"] for result in pair] == [(1, 8), (1, 8)]


def test_ranks_that_would_train_different_rules_are_refused(pair):
    kind, message = pair[1]["unlike"]
    assert kind == "ValueError"
    assert "Found another `rule class`, `rule config`, `learned weights` on rank 1" in message
    kind, message = pair[0]["unlike"]
    assert kind == LostRankError.__name__
    assert "Rank 0 noticed that another rank stopped" in message
    assert message.endswith("after meta-step 0; nothing was kept.")


def test_only_the_first_rank_writes(pair, folder):
    assert [result["own folder"] for result in pair] == [True, False]
    assert sorted(path.name.split(".")[0] for path in (folder / "own0").iterdir()) == ["checkpoint", "events", "lock"]


# -------------------- the command line

TOML = """
[rule]
class = "port-hamiltonian"
modes = 1
hidden = [3]
[task]
class = "RandomQuadratic"
dim = 3
[training]
n_meta_steps = 12
n_tasks = {n_tasks}
horizon = 5
validate_every = 2
n_validation_tasks = 2
"""


def command(folder, *options, n_tasks=2):
    config = folder / "tiny.toml"
    config.write_text(TOML.format(n_tasks=n_tasks), encoding="utf-8")
    files = ["--out", str(folder / "rule.safetensors"), "--folder", str(folder / "run")]
    return ["train", "--config", str(config), *files, *options]


def test_dead_rank_stops_the_run_which_torchrun_continues(tmp_path):
    status, dead = on_two_processes(dies, tmp_path, joins=False)
    assert dead is None
    assert status == 1
    (line,) = (tmp_path / "stderr0").read_text().replace("\r", "\n").strip().split("\n")[-1:]
    assert line.startswith("python -m odeopt train: Rank 0 noticed that another rank stopped or cannot be reached")
    assert line.endswith(f"after meta-step 10; the same command continues from {tmp_path / 'run'}.")
    assert "Traceback" not in (tmp_path / "stderr0").read_text()
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert len(checkpoint["result"]["meta_losses"]) == 10
    assert not (tmp_path / "rule.safetensors").exists()

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "odeopt", *command(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("12 of 12 meta-steps") == 1
    assert done.stderr.count("| 10/12 [") == 1  # where one bar begins
    whole = tmp_path / "whole"
    whole.mkdir()
    assert main(command(whole, n_tasks=4)) == 0
    got, expected = (odeopt.load(f / "rule.safetensors") for f in (tmp_path, whole))
    # float32 here, as users have it: rounding of 1e-7, over twelve steps of meta-Adam
    torch.testing.assert_close(flat_weights(got), flat_weights(expected), rtol=1e-4, atol=1e-5)
    assert got.trained_for["tasks_per_meta_step"] == 4


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (None, "told to stop (SIGTERM); "),
        ("1", "Rank 1 was told to stop (SIGTERM), as torchrun does when another rank has stopped; "),
    ],
)
def test_command_that_is_told_to_stop_says_how_to_continue(tmp_path, monkeypatch, capsys, rank, said):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    loss, n_evaluations, before = RandomQuadratic.loss, [], signal.getsignal(signal.SIGTERM)

    def stopped(self, params, batch):
        n_evaluations.append(0)
        if len(n_evaluations) == 50:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, params, batch)

    monkeypatch.setattr(RandomQuadratic, "loss", stopped)
    assert main(command(tmp_path)) == 128 + signal.SIGTERM
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line == f"python -m odeopt train: {said}the same command continues from {tmp_path / 'run'}."
    assert signal.getsignal(signal.SIGTERM) is before
    assert main(command(tmp_path)) == 0
    assert "12 of 12 meta-steps" in capsys.readouterr().out
