"""Time, memory and the machine, as the benchmarks measure and name them."""

from __future__ import annotations

import gc
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

import odeopt
from odeopt.evaluation import EVALUATION_SEED, scores_of
from odeopt.tasks import Task


def captured(step: Callable[[], object]) -> Callable[[], None]:
    """Capture a step in a CUDA graph, after some on the side as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of ``optimizer.state``."""
    tensors = (x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
    return sum(x.numel() * x.element_size() for x in tensors)


def extra_bytes(make: Callable[[], Optimizer], device: torch.device) -> int | None:
    """Peak of memory during a step, beyond parameters, gradients and state; None where it cannot be read.

    Args:
        make: Builds the optimizer on parameters that have gradients.
        device: On CUDA its allocator is asked, elsewhere the kernel (Linux).

    Returns:
        Bytes; on a CPU known to about one MB.
    """
    make().step()  # loads libraries, on CUDA compiles
    gc.collect()
    before = memory(device, "VmRSS")
    if before is None:
        return None
    optimizer = make()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    optimizer.step()
    return memory(device, "VmHWM") - before - state_bytes(optimizer)


def memory(device: torch.device, field: str) -> int | None:
    """Bytes held now (field VmRSS) or at the peak (VmHWM), on a CPU as Linux knows; None where there is none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        ask = torch.cuda.memory_allocated if field == "VmRSS" else torch.cuda.max_memory_allocated
        return ask(device)
    status = Path("/proc/self/status")
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1]) if status.exists() else None


def machine(device: torch.device) -> str:
    """Processor, threads and versions in one line."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    processor = found[1] if found else platform.processor() or platform.machine()
    if device.type == "cuda":
        processor = f"{torch.cuda.get_device_name(device)}, {processor}"
    return f"{processor}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, odeopt {odeopt.__version__}"


def scores_with_state(task: Task, dtype: torch.dtype, *, n_runs: int, n_steps: int) -> Tensor:
    """Mean of the last ten losses under the shipped rule with its state in ``dtype``, shape ``(n_runs,)``."""
    rule, losses = odeopt.load_pretrained("port-hamiltonian"), torch.zeros(n_steps + 1, n_runs, dtype=torch.float64)
    for run in range(n_runs):
        index = torch.tensor([run])
        params = {name: p[0].requires_grad_() for name, p in task.init_params(index, EVALUATION_SEED).items()}
        options = {"total_steps": n_steps, "state_dtype": dtype}
        optimizer = odeopt.LearnedOptimizer(params.values(), rule, **options)
        for step in range(n_steps + 1):
            batch = task.sample_batch(index, step, EVALUATION_SEED)
            loss = task.loss({name: p.unsqueeze(0) for name, p in params.items()}, batch).sum()
            losses[step, run] = loss.item()
            if step == n_steps:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return scores_of(losses, "last ten")
