"""Command line: ``odeopt rules``, ``show``, ``train``, ``search``, ``tune``, ``matrix``, ``suite`` and ``solvers``.

``python -m odeopt`` does the same.

Under ``torchrun`` (``torchrun --nproc-per-node 2 -m odeopt train ...``) all its processes train one rule together.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from odeopt.checks import MissingExtraError
from odeopt.cli import arguments, matrix, rules, search, solvers, suite, train, tune
from odeopt.meta.distributed import LostRankError
from odeopt.tasks import DatasetCorrupt, DatasetUnavailable


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="odeopt" if Path(sys.argv[0]).stem == "odeopt" else "python -m odeopt", description=__doc__
    )
    parser.set_defaults(on_interrupt=arguments.BEGINS_ANEW)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (rules, train, search, tune, matrix, suite, solvers):
        command.add(commands)
    for each in commands.choices.values():
        arguments.add(each, "threads")
    args = parser.parse_args(argv)
    try:
        with arguments.Interrupts():
            return args.run(args)
    except (ValueError, OSError, DatasetCorrupt, DatasetUnavailable, MissingExtraError) as error:
        status, message = 2, error
    except LostRankError as error:
        status, message = 1, error
    except KeyboardInterrupt as error:
        status, message = 128 + signal.SIGINT, args.on_interrupt + arguments.after(error.__cause__)
        print(file=sys.stderr)  # below a progress bar
    except train.Terminated as error:
        status, message = 128 + signal.SIGTERM, error
    print(f"{parser.prog} {args.command}: {message}", file=sys.stderr, flush=True)
    return status
