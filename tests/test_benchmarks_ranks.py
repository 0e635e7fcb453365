"""The benchmark of ranks: under torchrun its first rank prints what was measured, and what is modelled from it."""

import itertools
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "examples" / "benchmarks" / "ranks.py"


def test_two_ranks_measure_and_the_first_one_prints():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    done = subprocess.run([*command, "--repeats", "1", "--size", "5000"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 ranks on it") == 1
    # two sums and seven numbers per tensor in float32
    assert "sums of 148 tensors: 5,328 bytes" in done.stdout
    table = done.stdout[done.stdout.index("Modelled, gpt2 (124,439,808 parameters)") :].split("\n\n")[1].splitlines()
    rows = {int(cells[0]): list(map(float, cells[1:])) for cells in (line.split() for line in table[3:])}
    assert list(rows) == [2, 8, 64, 256, 1024]
    step, sent, state, meta_step, efficiency = zip(*rows.values(), strict=True)
    # a step is shared out, the state with it; exchanges grow with the depth of a tree
    assert [round(a / b) for a, b in itertools.pairwise(state)] == [4, 8, 4, 4]
    assert list(step) == sorted(step, reverse=True)
    assert list(sent) == sorted(sent)
    assert list(meta_step) == sorted(meta_step)
    assert all(0 < x <= 100 for x in efficiency)
