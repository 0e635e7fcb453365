"""Ranks that are threads of one process, or processes, for tests of what ranks exchange."""

import datetime
import multiprocessing
import os
import socket
import threading

import torch
import torch.distributed as dist

from odeopt.meta import World

# what ranks import, torch._dynamo when they build an optimizer: once for all of them, and for all tests of a process
PRELOADED = (
    "odeopt.__main__",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
)


class Thread(World):
    """A rank that is a thread; keeps what it gathered and broadcasted."""

    def __init__(self, rank, size, barrier, box):
        self.rank, self.size, self.barrier, self.box = rank, size, barrier, box
        self.sent, self.broadcasted = [], []

    def gather(self, values):
        self.sent.append(values.shape)
        return torch.cat(self._exchange(values))

    def average(self, tensors, weight):
        weights, *columns = zip(*self._exchange((weight, *tensors)), strict=True)
        return [sum(w * x for w, x in zip(weights, column, strict=True)) / sum(weights) for column in columns]

    def broadcast(self, value):
        self.broadcasted.append(type(value))
        return self._exchange(value)[0]

    def broadcast_result(self, make):
        return self._exchange(make() if self.is_first else None)[0]

    def _exchange(self, value):
        self.box[self.rank] = value
        self.barrier.wait(30)
        values = list(self.box)
        self.barrier.wait(30)
        return values


def on_threads(size, work):
    """Call ``work`` with each rank of a world of ``size``; return the ranks and what they returned."""
    barrier, box, got, errors = threading.Barrier(size), [None] * size, [None] * size, []
    worlds = [Thread(rank, size, barrier, box) for rank in range(size)]

    def run(world):
        try:
            got[world.rank] = work(world)
        except Exception as error:  # the first one is the reason, the others wait for nothing
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(world,)) for world in worlds]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    if errors:
        raise errors[0]
    return worlds, got


def on_two_processes(function, folder, *, joins=True):
    """Call ``function(rank, folder)`` on two ranks that are processes; return what each returns, None where it died.

    The ranks are forked from a process that has imported what they need and has done nothing else. They are a group
    of gloo unless ``function`` joins one by itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=_on_rank, args=(function, rank, folder, port, joins)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    paths = [folder / f"result{rank}.pt" for rank in range(2)]
    return [torch.load(path, weights_only=True) if path.exists() else None for path in paths]


def _on_rank(function, rank, folder, port, joins):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    if joins:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    torch.save(function(rank, folder), folder / f"result{rank}.pt")
