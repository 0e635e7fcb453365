"""Further problems of kinds that no training had, written when the rule was done: nothing was chosen on them."""

from __future__ import annotations

import math
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from unseen_problems import as_problems, as_squares, of_images, of_picture, perceptron, rows_of

from odeopt.suite.problems import Problem

# -------------------- networks


class Headless(nn.Module):
    """A network without a last layer that opponents would step apart from the hidden matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Identity()


class Flow(Headless):
    """Six affine couplings of points of the plane (Dinh et al. 2017); returns negative log-likelihoods."""

    def __init__(self) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(perceptron(1, 32, 32, 2, activation=nn.Tanh) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        """Negative log-likelihood of each point."""
        total = x.new_zeros(len(x))
        for coupling in self.couplings:
            kept, moved = x.chunk(2, 1)
            log_scale, shift = coupling(kept).chunk(2, 1)
            x, total = torch.cat((moved * log_scale.tanh().exp() + shift, kept), 1), total + log_scale.tanh()[:, 0]
        return x.square().sum(1) / 2 + math.log(2 * math.pi) - total


class Segmenter(nn.Module):
    """A small U-Net with BatchNorm (Ronneberger et al. 2015)."""

    def __init__(self) -> None:
        super().__init__()

        def block(n_in: int, n_out: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())

        self.first, self.second, self.third = block(1, 8), block(8, 16), block(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.back2, self.back1, self.head = block(32, 16), block(16, 8), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the pixels."""
        a = self.first(x)
        b = self.second(F.max_pool2d(a, 2))
        c = self.up2(self.third(F.max_pool2d(b, 2)))
        return self.head(self.back1(torch.cat((a, self.up1(self.back2(torch.cat((b, c), 1)))), 1)))


class Memory(nn.Module):
    """An LSTM, and a head that reads its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 48, batch_first=True), nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Value of each sequence."""
        return self.head(self.lstm(x)[0][:, -1])


class SkipGram(Headless):
    """Two tables of embeddings, whose inner products are logits (Mikolov et al. 2013)."""

    def __init__(self, n_words: int = 500, size: int = 32) -> None:
        super().__init__()
        self.words, self.contexts = nn.Embedding(n_words, size), nn.Embedding(n_words, size)
        nn.init.uniform_(self.words.weight, -0.5 / size, 0.5 / size)
        nn.init.zeros_(self.contexts.weight)

    def forward(self, word: Tensor, others: Tensor) -> Tensor:
        """Logits of the contexts."""
        return (self.words(word)[:, None] * self.contexts(others)).sum(-1)


class Painting(Headless):
    """An image that is trained itself, seen by convolutions that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Parameter(0.1 * torch.randn(1, 3, 32, 32))
        generator = torch.Generator().manual_seed(1)
        for k, (n_in, n_out) in enumerate(((3, 16), (16, 32))):
            self.register_buffer(f"filters{k}", torch.randn(n_out, n_in, 3, 3, generator=generator) / (3 * n_in**0.5))

    def forward(self, shift: Tensor) -> Tensor:
        """Correlations of the features of the shifted image (Gatys et al. 2016)."""
        x = torch.roll(self.image, shift.tolist(), (2, 3))
        found = []
        for filters in (self.filters0, self.filters1):
            x = F.relu(F.conv2d(x, filters, stride=2, padding=1))
            flat = x.flatten(2)[0]
            found.append((flat @ flat.T / flat.shape[1]).flatten())
        return torch.cat(found)


class Trajectory(Headless):
    """A vector field of tanh, integrated by 20 steps of the midpoint rule (Chen et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.field = perceptron(2, 48, 48, 2, activation=nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        """States after each step, shape ``(batch, 40)``."""
        states = []
        for _ in range(20):
            x = x + 0.1 * self.field(x + 0.05 * self.field(x))
            states.append(x)
        return torch.cat(states, 1)


class Mixer(nn.Module):
    """Two mixer blocks on patches of four pixels a side (Tolstikhin et al. 2021)."""

    def __init__(self, side: int, width: int = 48) -> None:
        super().__init__()
        n = (side // 4) ** 2
        self.patches, self.head = nn.Conv2d(1, width, 4, 4), nn.Linear(width, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.across = nn.ModuleList(perceptron(n, 64, n, activation=nn.GELU) for _ in range(2))
        self.within = nn.ModuleList(perceptron(width, 128, width, activation=nn.GELU) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the classes."""
        x = self.patches(as_squares(x)).flatten(2).mT
        for k, (across, within) in enumerate(zip(self.across, self.within, strict=True)):
            x = x + across(self.norms[2 * k](x).mT).mT
            x = x + within(self.norms[2 * k + 1](x))
        return self.head(self.norms[-1](x).mean(1))


class Process(Headless):
    """A Gaussian process with a length scale for each input; returns the negative log marginal likelihood."""

    def __init__(self) -> None:
        super().__init__()
        self.log_lengths, self.log_scale = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(()))
        self.log_noise, self.mean = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Negative log marginal likelihood per point."""
        z = x / self.log_lengths.exp()
        kernel = (2 * self.log_scale - (z[:, None] - z).square().sum(-1) / 2).exp()
        noise = (2 * self.log_noise).exp() + 1e-4
        return -torch.distributions.MultivariateNormal(
            self.mean.expand(len(y)), kernel + noise * torch.eye(len(y), device=y.device)
        ).log_prob(y) / len(y)


class Reversal(nn.Module):
    """An encoder and a decoder of torch's own layers (Vaswani et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(17, 48), nn.Parameter(0.02 * torch.randn(12, 48))
        self.transformer = nn.Transformer(48, 4, 1, 1, 96, 0.0, batch_first=True)
        self.head = nn.Linear(48, 17)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits of the tokens that follow."""
        a, b = (self.tokens(x) + self.places[: x.shape[1]] for x in (source, target))
        mask = nn.Transformer.generate_square_subsequent_mask(b.shape[1], device=b.device)
        return self.head(self.transformer(a, b, tgt_mask=mask, tgt_is_causal=True)).mT


class Grid(Headless):
    """Features on grids of four resolutions, read between their points, and a perceptron (Mueller et al. 2022)."""

    def __init__(self) -> None:
        super().__init__()
        self.grids = nn.ParameterList(nn.Parameter(1e-4 * torch.randn(1, 2, n, n)) for n in (8, 16, 32, 64))
        self.decoder = perceptron(8, 32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Values at points."""
        found = [F.grid_sample(grid, x[None, None], align_corners=True)[0, :, 0].T for grid in self.grids]
        return self.decoder(torch.cat(found, 1))


class StateSpace(nn.Module):
    """Two diagonal linear recurrences with real decays and gates (after Gu et al. 2022)."""

    def __init__(self, n_tokens: int = 12, width: int = 48) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(n_tokens, width), nn.Linear(width, n_tokens)
        self.decays = nn.ParameterList(nn.Parameter(torch.linspace(-4, 1, width)) for _ in range(2))
        self.inputs = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.outputs = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next token."""
        x = self.tokens(x)
        ages = torch.arange(x.shape[1], device=x.device)
        ages = (ages[:, None] - ages).clamp(min=-1)
        for decay, put, out, norm in zip(self.decays, self.inputs, self.outputs, self.norms, strict=True):
            u, gate = put(norm(x)).chunk(2, -1)
            rate = F.softplus(decay)
            kernel = torch.where(ages[..., None] < 0, 0.0, (-rate * ages.clamp(min=0)[..., None]).exp() * rate)
            x = x + out(torch.einsum("tsw,bsw->btw", kernel, u) * F.silu(gate))
        return self.head(x).mT


# -------------------- batches


def of_moons(generator: torch.Generator, is_held_out: bool) -> tuple[Tensor, Tensor]:
    """Points of two half-circles."""
    angle, side = math.pi * torch.rand(256, generator=generator), torch.randint(2, (256,), generator=generator)
    x = torch.stack((angle.cos() + side, (1 - 2 * side) * angle.sin() + 0.5 * side), 1) - 0.5
    return x + 0.05 * torch.randn(256, 2, generator=generator), torch.zeros(256)


def of_clutter(images: Tensor, generator: torch.Generator, is_held_out: bool) -> tuple[Tensor, Tensor]:
    """Images under noise and bars, and which pixels are bright in the image itself."""
    rows = rows_of(generator, len(images), 32, is_held_out=is_held_out)
    x = F.interpolate(as_squares(images[rows]), size=16, mode="area")
    bars = (torch.rand(len(x), 1, 1, 16, generator=generator) < 0.15).float()
    return x + 0.5 * bars + 0.4 * torch.randn(x.shape, generator=generator), (x > 0.4).float()


def of_additions(generator: torch.Generator, is_held_out: bool) -> tuple[Tensor, Tensor]:
    """The adding problem over 30 steps (Hochreiter, Schmidhuber 1997)."""
    values = torch.rand(64, 30, generator=generator)
    first, second = (torch.randint(k, k + 15, (64,), generator=generator) for k in (0, 15))
    marks = F.one_hot(first, 30) + F.one_hot(second, 30)
    return torch.stack((values, marks.float()), -1), (values * marks).sum(1, keepdim=True)


@cache
def _topics() -> Tensor:
    generator = torch.Generator().manual_seed(13)
    return (2 * torch.randn(20, 500, generator=generator)).softmax(1)


def of_words(generator: torch.Generator, is_held_out: bool) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Pairs of words of one topic, and five words of any beside each."""
    topic = torch.randint(20, (256,), generator=generator)
    pair = torch.multinomial(_topics()[topic], 2, replacement=True, generator=generator)
    others = torch.multinomial(_topics().mean(0), 5 * 256, replacement=True, generator=generator).view(256, 5)
    target = torch.zeros(256, 6)
    target[:, 0] = 1
    return (pair[:, 0], torch.cat((pair[:, 1:], others), 1)), target


@cache
def _style() -> Tensor:
    x = torch.linspace(0, 6 * math.pi, 32)
    waves = torch.stack([(a * x[:, None] + b * x).sin() for a, b in ((1, 0.5), (0.3, 1.2), (1, -1))])
    painting = Painting()
    painting.image.data = waves[None]
    return painting(torch.zeros(2, dtype=torch.long)).detach()


def of_shifts(generator: torch.Generator, is_held_out: bool) -> tuple[Tensor, Tensor]:
    """A shift, and what is to be seen of the image."""
    return torch.randint(4, (2,), generator=generator), _style()


def of_spirals(generator: torch.Generator, is_held_out: bool) -> tuple[Tensor, Tensor]:
    """Starts, and the states of a cubic spiral that follow, with noise."""
    x = start = 2 * torch.rand(64, 2, generator=generator) - 1
    field = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]])
    states = []
    for step in range(200):
        x = x + 0.01 * (x**3 @ field)
        if step % 10 == 9:
            states.append(x)
    return start, torch.cat(states, 1) + 0.01 * torch.randn(64, 40, generator=generator)


def of_surface(generator: torch.Generator, is_held_out: bool) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Points of a function of six inputs, two of which count."""
    x = 2 * torch.rand(64, 6, generator=generator) - 1
    y = (3 * x[:, 0]).sin() + x[:, 1].square() + 0.1 * torch.randn(64, generator=generator)
    return (x, y), torch.zeros(64)


def of_reversals(generator: torch.Generator, is_held_out: bool) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Tokens, and the same from behind after a sign that begins."""
    source = torch.randint(16, (64, 10), generator=generator)
    target = source.flip(1)
    return (source, torch.cat((torch.full((64, 1), 16), target[:, :-1]), 1)), target


def of_mixtures(generator: torch.Generator, is_held_out: bool) -> tuple[Tensor, Tensor]:
    """Values that are not a function of the input (Bishop 1994)."""
    y = 2 * torch.rand(128, 1, generator=generator) - 1
    return 2 * y + (4 * y).sin() + 0.2 * torch.randn(128, 1, generator=generator), y


def of_chains(generator: torch.Generator, is_held_out: bool) -> tuple[Tensor, Tensor]:
    """Tokens, each of which repeats the one eight places before, mostly."""
    tokens = torch.randint(12, (32, 33), generator=generator)
    kept = torch.rand(32, 33, generator=generator) < 0.9
    for k in range(8, 33):
        tokens[:, k] = torch.where(kept[:, k], tokens[:, k - 8], tokens[:, k])
    return tokens[:, :-1], tokens[:, 1:]


def mean_output(outputs: Tensor, target: Tensor) -> Tensor:
    """Mean of the outputs, which are negative log-likelihoods; raised above zero, so that ratios have a meaning."""
    return outputs.mean() + 2


def mixture_likelihood(outputs: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of mixtures of eight normal distributions, raised above zero as well."""
    weight, mean, log_scale = outputs.chunk(3, 1)
    log_scale = log_scale.clamp(min=-4)
    each = -((target - mean) / log_scale.exp()).square() / 2 - log_scale - math.log(2 * math.pi) / 2
    return 2 - (weight.log_softmax(1) + each).logsumexp(1).mean()


def problems(images: Tensor, labels: Tensor, name: str) -> dict[str, Problem]:
    """The problems, by name; arguments as those of ``unseen_problems.problems``."""
    side = math.isqrt(images.shape[1])
    rows = [
        ("flow", "normalizing flow", 600, Flow, of_moons, mean_output),
        ("segmentation", "segmentation, U-Net", 300, Segmenter, partial(of_clutter, images),
         F.binary_cross_entropy_with_logits),
        ("additions", "adding problem, LSTM", 1000, Memory, of_additions, F.mse_loss),
        ("words", "word embeddings", 800, SkipGram, of_words, F.binary_cross_entropy_with_logits),
        ("painting", "an image as the parameter", 500, Painting, of_shifts, F.mse_loss),
        ("spirals", "neural ODE", 500, Trajectory, of_spirals, F.mse_loss),
        ("mixer", "MLP-Mixer", 400, lambda: Mixer(side), partial(of_images, images, labels), F.cross_entropy),
        ("process", "Gaussian process", 200, Process, of_surface, mean_output),
        ("reversals", "reversal, encoder and decoder", 600, Reversal, of_reversals, F.cross_entropy),
        ("grid", "picture, grids of features", 600, Grid, of_picture, F.mse_loss),
        ("mixture", "mixture density", 600, lambda: perceptron(1, 64, 64, 24, activation=nn.Tanh), of_mixtures,
         mixture_likelihood),
        ("chains", "copies, state space", 500, StateSpace, of_chains, F.cross_entropy),
    ]  # fmt: skip
    return as_problems(rows, name)
