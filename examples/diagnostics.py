"""See what the learned optimizer does: energy, power and step sizes of each layer over a run.

Trains a network on MNIST, asks the optimizer before every third step what it will do, and draws the figure. With
``--log-dir`` TensorBoard gets the same numbers.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import odeopt
from odeopt.cli import arguments
from odeopt.progress import tqdm
from odeopt.report import plot_diagnostics, write_diagnostics


def main(argv: list[str] | None = None) -> None:
    """Train, and draw what was seen."""
    args = parse(argv)
    dataset = arguments.dataset(args)
    images, labels = dataset.train_images.to(args.device) / 255, dataset.train_labels.to(args.device)
    torch.manual_seed(args.seed)
    model = nn.Sequential(nn.Linear(images.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model.to(args.device)
    optimizer = odeopt.LearnedOptimizer(odeopt.param_groups(model), args.rule, total_steps=args.steps)
    history = {}
    with SummaryWriter(args.log_dir) if args.log_dir else nullcontext() as writer:
        for step in tqdm(range(args.steps), unit="step"):
            batch = torch.randint(len(images), (128,))
            loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            if step % args.every == 0:
                history[step] = optimizer.diagnostics()
                if writer:
                    writer.add_scalar("loss", loss.item(), step)
                    write_diagnostics(writer, history[step], step)
            optimizer.step()
    print(f"Loss of the last batch: {loss.item():.3f}")
    path = plot_diagnostics([*history.values()], args.out / "diagnostics.png", steps=[*history], title=args.rule)
    print(f"Figure: {path}")
    if args.log_dir:
        print(f"TensorBoard: tensorboard --logdir {args.log_dir}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = arguments.parser(__doc__, "dataset data_dir device seed out")
    add = parser.add_argument
    add("--rule", choices=odeopt.available_pretrained(), default="port-hamiltonian-spectral", metavar="NAME",
        help="a rule that ships")  # fmt: skip
    add("--steps", type=arguments.positive, default=300, help="length of the run")
    add("--every", type=arguments.positive, default=3, help="steps between two looks, which cost some eager steps each")
    add("--log-dir", type=Path, help="folder for TensorBoard")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
