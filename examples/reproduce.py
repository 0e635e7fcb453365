"""Make every figure and table of README and the pages of results again, stage by stage.

Each stage is one command, printed before it runs; its output goes to LOGS/NAME.log. Stages that are done are not run
again, unless the library, the shipped rules or the command have changed since; an interrupted reproduction continues
with the same command. ``--quick`` shows in minutes that every stage runs, on less of everything.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import odeopt
from odeopt.cli import arguments
from odeopt.files import write_json
from odeopt.progress import tqdm

EXAMPLES = Path(__file__).resolve().parent
QUICK_ENERGIES = "--folder runs/trained-energies-quick --dataset digits --steps 5 --problems sigmoid --meta-steps 1"
QUICK_MATRIX = "--quick --runs 2 --tuning-runs 1"
DEFAULT = "port-hamiltonian-spectral"
MATRIX = f"-m odeopt matrix --rule {DEFAULT} --references-from {{out}}/matrix.json"
QUICK_SEEDS = "--dataset digits --runs 2 --steps 10 --problems 50 --tuning-runs 1"
QUICK_VIEW = (
    "--folder runs/optimizers-view-quick --dataset digits --runs 2 --steps 2 --horizon 5 --seeds 1 --solvers dopri5"
)
# name, minutes on two cores, command, what --quick adds or changes; {out} is the folder of the figures
STAGES = (
    ("schematic", 1, "schematic.py --out {out}", ""),
    ("quadratic", 1, "quadratic.py --out {out}", "--runs 100"),
    ("mnist", 3, "mnist.py --out {out}", "--dataset digits --runs 2 --steps 20"),
    ("saddle", 1, "saddle.py --out {out}", "--runs 20 --steps 100"),
    ("estimators", 2, "studies/estimators.py --out {out}", "--quick"),
    ("general", 8, "studies/general.py --out {out}", "--dataset digits --runs 2 --steps 10 --tuning-runs 1"),
    ("meta-seeds", 45, "studies/meta_seeds.py --validate 4 --out {out}", QUICK_SEEDS),
    ("generalisation", 25, "studies/generalisation.py --out {out}", "--quick"),
    ("ablation", 40, "studies/ablation.py --out {out}", "--quick"),
    ("optimizers-view", 15, "solvers.py --out {out}", QUICK_VIEW),
    ("physics", 120, "physics.py --out {out}", "--quick"),
    ("matrix", 25, "-m odeopt matrix --out {out}", QUICK_MATRIX),
    ("matrix-default", 10, f"{MATRIX} --out {{out}}/{DEFAULT}", QUICK_MATRIX),
    ("matrix-untrained", 10, f"{MATRIX} --untrained --out {{out}}/{DEFAULT}-untrained", QUICK_MATRIX),
    ("solvers", 5, "-m odeopt solvers --out {out}", "--quick"),
    ("suite", 150, "-m odeopt suite --untold --untrained --out {out}", "--quick"),
    ("kinetic", 90, "studies/kinetic.py --out {out}", "--dataset digits --steps 20 --problems perceptron vit"),
    ("equal_loss", 25, "studies/equal_loss.py --runs 5 --out {out}", "--dataset digits --steps 16 --problems vit"),
    ("coordinate_check", 45, "studies/coordinate_check.py --out {out}", "--widths 16 32 --steps 1 2"),
    ("depth", 6, "studies/depth.py --out {out}", "--dataset digits --depths 0 2 --rates 1 2 --steps 20"),
    ("diagnostics", 1, "diagnostics.py --out {out}", "--dataset digits --steps 30"),
    ("rule", 1, "-m odeopt show port-hamiltonian-spectral --out {out}", ""),
    ("guard", 4, "studies/guard.py --out {out}", "--dataset digits --runs 1 --steps 40"),
    ("unseen", 25, "studies/unseen.py --out {out}", "--dataset digits --steps 5 --problems regression graph"),
    ("blind", 40, "studies/blind.py --runs 3 --out {out}", "--dataset digits --steps 5 --problems painting process"),
    ("finetuning", 15, "studies/finetuning.py --runs 3 --out {out}", "--dataset digits --steps 1 --problems convnet"),
    ("laws", 25, "studies/laws.py --runs 3 --out {out}", "--dataset digits --steps 5 --problems sigmoid"),
    ("cheaper", 20, "studies/cheaper.py --runs 3 --out {out}", "--dataset digits --steps 5 --problems sigmoid"),
    ("taught", 25, "studies/taught.py --runs 3 --out {out}", "--dataset digits --steps 5 --problems sigmoid"),
    ("heads", 20, "studies/heads.py --runs 3 --out {out}", "--dataset digits --steps 5 --problems sigmoid"),
    ("meta-curves", 1, "studies/meta_curves.py --out {out}", ""),
    ("trained-energies", 60, "studies/trained_energies.py --out {out}", QUICK_ENERGIES),
    ("seeds", 15, "studies/seeds.py --runs 3 --out {out}", "--dataset digits --steps 5 --problems sigmoid"),
    ("scale", 240, "studies/scale.py --out {out}", "--dataset digits --steps 5 --problems perceptron-64"),
    ("long-runs", 65, "studies/long_runs.py --out {out}", "--dataset digits --steps 2 --problems vit"),
    ("widest", 60, "studies/widest.py --out {out}", "--dataset digits --steps 1 --problems perceptron-2048"),
    ("step", 8, "benchmarks/step.py --out {out}", "--quick"),
    ("guard-cost", 1, "benchmarks/guard.py --json {out}/guard_cost.json", "--sizes 1e4"),
    ("meta", 10, "benchmarks/meta.py --json {out}/meta.json --out {out}", "--quick --dataset digits"),
)


def main(argv: list[str] | None = None) -> int:
    """Run the stages that are left; return how many failed."""
    args = parse(argv)
    path = args.logs / "done.json"
    done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    stages = [stage for stage in STAGES if not args.only or stage[0] in args.only]
    failed = []
    with tqdm(total=sum(minutes for _, minutes, *_ in stages), unit=" min", desc="reproducing") as bar:
        for name, minutes, command, quick in stages:
            words = command_of(command, quick if args.quick else "", args.out)
            # every stage looks for images there that is not told otherwise
            images = {} if args.data_dir is None else {"ODEOPT_DATA": str(args.data_dir.resolve())}
            mark = fingerprint([*words, *images.values()])
            bar.set_postfix_str(name)
            if done.get(name, {}).get("fingerprint") != mark:
                bar.write(f"{name}: {shlex.join(words)}", file=sys.stderr)
                began = time.perf_counter()
                with (args.logs / f"{name}.log").open("w", encoding="utf-8") as log:
                    status = subprocess.run(words, stdout=log, stderr=log, env=os.environ | images).returncode
                if status != 0:
                    failed.append(name)
                    bar.write(f"{name} failed with status {status}; see {args.logs / name}.log", file=sys.stderr)
                else:
                    done[name] = {"fingerprint": mark, "seconds": round(time.perf_counter() - began)}
                    write_json(path, done)
            bar.update(minutes)
    for name, *_ in stages:
        print(f"{name:16}" + (f"{done[name]['seconds']:6d} s" if name not in failed else "failed"))
    print(f"Figures in {args.out}, tables in {args.logs}.")
    return len(failed)


def command_of(command: str, extra: str, out: Path) -> list[str]:
    """Words of a stage's command."""
    words = [word.format(out=out) for word in command.split()] + extra.split()
    if words[0] != "-m":
        words[0] = str(EXAMPLES / words[0])
    return [sys.executable, *words]


def fingerprint(words: list[str]) -> str:
    """Digest of a command, of the library, of the shipped rules and of what lies beside the examples."""
    digest = hashlib.sha256("\0".join(words).encode())
    library = Path(odeopt.__file__).parent
    suffixes = (".py", ".safetensors", ".json", ".toml")
    for path in sorted(path for folder in (library, EXAMPLES) for path in folder.rglob("*") if path.suffix in suffixes):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options and check them before any work is done."""
    parser = arguments.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.on_interrupt = arguments.RESUMES
    add = parser.add_argument
    names = [name for name, *_ in STAGES]
    add("--quick", action="store_true", help="less of everything, on the digits where a stage can")
    add("--only", nargs="+", choices=names, metavar="STAGE", help=f"some of {', '.join(names)} (default: all)")
    add("--data-dir", type=Path, help="folder of the images of all stages, as examples/mnist.py takes it")
    add("--out", type=arguments.folder, help="folder of the figures (default: figs; with --quick runs/quick-figs)")
    add("--logs", type=arguments.folder, help="folder of the tables and of what is done (default: runs/reproduce; "
        "with --quick runs/reproduce-quick)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = arguments.folder("runs/quick-figs" if args.quick else "figs")
    if args.logs is None:
        args.logs = arguments.folder("runs/reproduce-quick" if args.quick else "runs/reproduce")
    return args


if __name__ == "__main__":
    sys.exit(main())
