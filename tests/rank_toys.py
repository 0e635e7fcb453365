"""Ranks that are threads of one process, for tests of what ranks exchange."""

import threading

import torch

from odeopt.meta import World


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
