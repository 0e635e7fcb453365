"""``python -m odeopt search``: try settings of a meta-training, and keep the best rule."""

from __future__ import annotations

import argparse
from pathlib import Path

from odeopt import artifacts
from odeopt.checks import install_command
from odeopt.cli import arguments
from odeopt.cli.files import check_can_be_saved, prepare
from odeopt.meta.files import available_configs
from odeopt.meta.search import search
from odeopt.meta.search_files import load_search
from odeopt.report import draw_table


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "search",
        help="try settings of a meta-training, and keep the best rule",
        description="Train with one set of settings after the other, as a configuration with a section [search] says, "
        "and keep the rule that validates best. An interrupted search continues with the same command, inside the "
        f"trial that was interrupted. Needs Optuna: {install_command('search')}.",
    )
    parser.add_argument("--config", required=True, help="a TOML file, or one of "
                        f"{', '.join(available_configs('search'))}")  # fmt: skip
    parser.add_argument("--out", type=Path, help="where the best rule goes (default: runs/NAME.safetensors)")
    parser.add_argument("--folder", type=Path, help="study, table and logs; a search that is found here is continued "
                        "(default: runs/NAME.search)")  # fmt: skip
    parser.add_argument("--trials", type=arguments.positive, help="trials in all, in place of the configuration's")
    parser.add_argument("--meta-steps", type=arguments.positive, help="meta-steps per trial, in place of the "
                        "configuration's, with as many validations: for a quick look")  # fmt: skip
    arguments.add(parser, "data_dir markdown stop_after overwrite", device={"default": "cpu"})
    parser.set_defaults(run=run, on_interrupt=arguments.RESUMES)


def run(args: argparse.Namespace) -> int:
    """Search; return the exit status."""
    config = load_search(args.config, n_trials=args.trials, n_meta_steps=args.meta_steps)
    folder = args.folder or Path("runs") / f"{config.name}.search"
    out = args.out or Path("runs") / f"{config.name}.safetensors"
    prepare(out, args.overwrite)
    for values in config.probes():
        tried = config.at(values)
        check_can_be_saved(tried, tried.build_rule(), out)
    result = search(config, folder, data_dir=args.data_dir, device=args.device, stop_after=args.stop_after)
    if result.trials:
        print(draw_table(*result.rows(), markdown=args.markdown), end="\n\n")
        print(("  \n" if args.markdown else "\n").join(result.caption()))
        print(f"saved {folder / 'trials.json'}")
    if not result.is_finished:
        print(f"stopped early; the same command continues from {folder}")
        return 0
    if result.rule is None:
        raise ValueError(f"none of the {len(result.trials)} trials of {config.name} is complete: there is no rule.")
    artifacts.save(result.rule, out, trained_for=result.trained_for, overwrite=args.overwrite)
    print(f"saved {out}, the rule of trial {result.best.number}")
    return 0
