"""Problems of kinds that no training had, as ``python -m odeopt suite`` takes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeopt.suite.problems import Batch, Problem

Sample = Callable[[torch.Generator, bool], tuple[Any, Tensor]]  # inputs and target; whether they are held out


class Drawn:
    """Batches that a function draws from a generator, which belongs to the seed and the step."""

    def __init__(self, sample: Sample, description: str) -> None:
        self.sample, self.description = sample, description

    def batch(self, step: int, seed: int, *, is_held_out: bool = False) -> Batch:
        """Draw the batch of a step of a run."""
        generator = torch.Generator().manual_seed(2 * (1_000_003 * seed + step) + is_held_out)
        inputs, target = self.sample(generator, is_held_out)
        return Batch(inputs if isinstance(inputs, tuple) else (inputs,), target)

    def held_out(self, seed: int) -> Iterator[Batch]:
        """Yield a few batches that no step sees."""
        return (self.batch(step, seed, is_held_out=True) for step in range(4))


class Network(nn.Module):
    """A body and a head, which is what opponents step apart from the hidden matrices."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, *inputs: Tensor) -> Tensor:
        """Head of the body."""
        return self.head(self.body(*inputs))


def perceptron(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> Network:
    """A perceptron."""
    layers = [layer for a, b in itertools.pairwise(widths[:-1]) for layer in (nn.Linear(a, b), activation())]
    return Network(nn.Sequential(*layers), nn.Linear(*widths[-2:]))


# -------------------- networks


class Sine(nn.Module):
    """A layer of sines (Sitzmann et al. 2020), with the initialisation that they need."""

    def __init__(self, n_in: int, n_out: int, *, is_first: bool, frequency: float = 20.0) -> None:
        super().__init__()
        self.linear, self.frequency = nn.Linear(n_in, n_out), frequency
        bound = 1 / n_in if is_first else math.sqrt(6 / n_in) / frequency
        nn.init.uniform_(self.linear.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Sine of the linear layer."""
        return torch.sin(self.frequency * self.linear(x))


def sine_network() -> Network:
    """Three layers of sines."""
    return Network(nn.Sequential(*(Sine(2 if k == 0 else 64, 64, is_first=k == 0) for k in range(3))), nn.Linear(64, 1))


class Poisson(Network):
    """Residuals of Poisson's equation within the square, and values on its border, of a network of tanh."""

    def __init__(self) -> None:
        plain = perceptron(2, 32, 32, 32, 1, activation=nn.Tanh)
        super().__init__(plain.body, plain.head)

    @torch.enable_grad()
    def forward(self, inside: Tensor, border: Tensor) -> Tensor:
        """Weighted residuals, all of which should be zero."""
        x = inside.requires_grad_()
        slope = torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)[0]
        curvature = sum(torch.autograd.grad(slope[:, k].sum(), x, create_graph=True)[0][:, k] for k in range(2))
        force = 2 * math.pi**2 * (math.pi * x).sin().prod(1)
        return torch.cat(((curvature + force) / 10, super().forward(border)[:, 0]))


class Factors(nn.Module):
    """Two tables, whose rows are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns, self.head = nn.Embedding(300, 8), nn.Embedding(200, 8), nn.Embedding(200, 1)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.1)

    def forward(self, i: Tensor, j: Tensor) -> Tensor:
        """Entries of the product."""
        return (self.rows(i) * self.columns(j)).sum(-1) + self.head(j)[:, 0]


class Adapted(nn.Module):
    """A linear layer that stays, and a product of two thin matrices that is trained beside it (Hu et al. 2022)."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) / math.sqrt(layer.in_features))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Sum of both."""
        return self.layer(x) + x @ self.down.T @ self.up.T


def pretrained(
    make: Callable[[], nn.Module],
    batches: Callable[[], Iterable[Batch]],
    criterion: Callable[[Any, Tensor], Tensor],
    trained: dict[bytes, dict[str, Tensor]],
) -> nn.Module:
    """A network that Adam has trained.

    Its weights are kept in ``trained`` under the state of the random numbers that it starts from: contenders of one
    seed share the training.
    """
    start, network = torch.get_rng_state().numpy().tobytes(), make()
    if start not in trained:
        optimizer = torch.optim.Adam(network.parameters())
        with torch.enable_grad():
            for batch in batches():
                optimizer.zero_grad()
                criterion(network(*batch.inputs), batch.target).backward()
                optimizer.step()
        trained[start] = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(trained[start])
    return network


def adapted(images: Tensor, labels: Tensor, trained: dict[bytes, dict[str, Tensor]]) -> Network:
    """A network that knows the digits below five, with adapters."""
    few, of_few = images[labels < 5], labels[labels < 5]

    def batches() -> Iterator[Batch]:
        for step in range(200):
            rows = slice(64 * step % (len(few) - 64), None)
            yield Batch((few[rows][:64],), of_few[rows][:64])

    network = pretrained(partial(perceptron, images.shape[1], 128, 128, 10), batches, F.cross_entropy, trained)
    layers = [Adapted(layer) if isinstance(layer, nn.Linear) else layer for layer in network.body]
    return Network(nn.Sequential(*layers), Adapted(network.head))


class GraphNetwork(nn.Module):
    """Two layers that average over neighbours (Kipf, Welling 2017)."""

    def __init__(self, averages: Tensor) -> None:
        super().__init__()
        self.register_buffer("averages", averages)
        self.first, self.head = nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, features: Tensor, nodes: Tensor) -> Tensor:
        """Logits of some nodes."""
        hidden = F.dropout(F.relu(self.averages @ self.first(features)), 0.5, self.training)
        return (self.averages @ self.head(hidden))[nodes]


class Denoiser(nn.Module):
    """A small network of convolutions that is told the level of the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, 2, padding=1)
        self.middle, self.norm, self.level = nn.Conv2d(32, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.Linear(8, 32)
        self.up, self.head = nn.ConvTranspose2d(32, 16, 4, 2, padding=1), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        """The noise in it."""
        told = self.level(torch.cos(level[:, None] * 2 ** torch.arange(8.0, device=level.device)))
        wide = F.silu(self.first(x))
        deep = F.silu(self.down(wide))
        deep = deep + F.silu(self.norm(self.middle(deep)) + told[..., None, None])
        return self.head(F.silu(self.up(deep)) + wide)


class Sums(nn.Module):
    """A causal transformer of torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(12, 48), nn.Parameter(0.02 * torch.randn(11, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(48, 12)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the digits of the sum."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.head(self.layers(self.tokens(x) + self.places, mask=mask, is_causal=True))[:, 7:].mT


class Experts(nn.Module):
    """Sixteen experts, each of them a perceptron; each input is sent to one of them (Fedus et al. 2022)."""

    def __init__(self, n_experts: int = 16, n_in: int = 16, width: int = 64) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(n_in, n_experts), nn.Linear(n_in, 4)
        self.inner = nn.Parameter(torch.randn(n_experts, width, n_in) / math.sqrt(n_in))
        self.outer = nn.Parameter(torch.randn(n_experts, n_in, width) / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        """Head of the input and of what its expert adds to it."""
        weight, expert = self.router(x).softmax(-1).max(-1, keepdim=True)
        hidden = F.relu(self.inner[expert[:, 0]] @ x[..., None])
        return self.head(x + weight * (self.outer[expert[:, 0]] @ hidden)[..., 0])


# -------------------- batches


def rows_of(generator: torch.Generator, n: int, size: int, *, is_held_out: bool) -> Tensor:
    """Rows of data, the last sixth of which is held out."""
    cut = 5 * n // 6
    low, high = (cut, n) if is_held_out else (0, cut)
    return torch.randint(low, high, (size,), generator=generator)


def of_picture(generator: torch.Generator, is_held_out: bool) -> tuple[Tensor, Tensor]:
    """Points of a picture of waves in a disk."""
    x = 2 * torch.rand(512, 2, generator=generator) - 1
    waves = (7 * x[:, :1] + 3 * (4 * x[:, 1:]).sin()).sin() * (5 * x[:, 1:] - 2 * x[:, :1]).cos()
    return x, torch.where(x.norm(dim=1, keepdim=True) < 0.8, waves, 0.0)


def of_square(generator: torch.Generator, is_held_out: bool) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Points within the square, and on its border."""
    inside, border = torch.rand(128, 2, generator=generator), torch.rand(64, 2, generator=generator)
    border[:32, 0], border[32:, 1] = (border[:32, 0] > 0.5).float(), (border[32:, 1] > 0.5).float()
    return (inside, border), torch.zeros(len(inside) + len(border))


@cache
def _linear() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    scales = torch.logspace(0, -2, 50)
    x = torch.randn(2400, 50, generator=generator) * scales
    weight = torch.randn(50, generator=generator) / scales.sqrt()
    return x, x @ weight + 0.1 * torch.randn(2400, generator=generator)


def of_regression(generator: torch.Generator, is_held_out: bool) -> tuple[Tensor, Tensor]:
    """Rows of a linear regression with condition 1e4."""
    x, y = _linear()
    rows = rows_of(generator, len(x), 64, is_held_out=is_held_out)
    return x[rows], y[rows, None]


@cache
def _ratings() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    a, b = torch.randn(300, 6, generator=generator), torch.randn(200, 6, generator=generator)
    i, j = (torch.randint(n, (24_000,), generator=generator) for n in (300, 200))
    return i, j, (a[i] * b[j]).sum(-1) / math.sqrt(6) + 0.2 * torch.randn(len(i), generator=generator)


def of_matrix(generator: torch.Generator, is_held_out: bool) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Entries of a matrix of rank six, with noise."""
    i, j, value = _ratings()
    rows = rows_of(generator, len(i), 128, is_held_out=is_held_out)
    return (i[rows], j[rows]), value[rows]


@cache
def _graph() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    label = torch.randint(5, (600,), generator=generator)
    share = torch.where(label[:, None] == label, 0.03, 0.004)
    edges = (torch.rand(600, 600, generator=generator) < share).float().triu(1)
    edges = edges + edges.T + torch.eye(600)
    scale = edges.sum(1).rsqrt()
    features = torch.randn(600, 64, generator=generator) + 0.5 * F.one_hot(label, 64)
    return scale[:, None] * edges * scale, features, label


def of_graph(generator: torch.Generator, is_held_out: bool) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The whole graph; a sixth of its nodes has labels."""
    _, features, label = _graph()
    nodes = torch.arange(100, 600) if is_held_out else torch.arange(100)
    return (features, nodes), label[nodes]


def as_squares(images: Tensor) -> Tensor:
    """Images of one channel, shape ``(n, 1, side, side)``, from shape ``(n, pixels)``."""
    return images.unflatten(1, (1, math.isqrt(images.shape[1]), -1))


def of_images(images: Tensor, labels: Tensor, generator: torch.Generator, is_held_out: bool) -> tuple[Tensor, Tensor]:
    """Images and their labels."""
    rows = rows_of(generator, len(images), 64, is_held_out=is_held_out)
    return images[rows], labels[rows]


def of_pairs(images: Tensor, generator: torch.Generator, is_held_out: bool) -> tuple[Tensor, Tensor]:
    """Two views of each image, half of whose pixels are dark."""
    x = images[rows_of(generator, len(images), 128, is_held_out=is_held_out)].repeat(2, 1)
    return x * (torch.rand(x.shape, generator=generator) > 0.4), torch.arange(128).repeat(2)


def contrast(outputs: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of finding the other view (van den Oord et al. 2018)."""
    a, b = F.normalize(outputs, dim=-1).chunk(2)
    return F.cross_entropy(a @ b.T / 0.2, target[: len(a)])


def of_noise(images: Tensor, generator: torch.Generator, is_held_out: bool) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Noisy images, the level of the noise, and the noise."""
    x = images[rows_of(generator, len(images), 32, is_held_out=is_held_out)]
    x = 2 * F.interpolate(as_squares(x), size=14, mode="area") - 1
    level, noise = torch.rand(len(x), generator=generator), torch.randn(x.shape, generator=generator)
    kept = torch.cos(level * math.pi / 2)[:, None, None, None]
    return (kept * x + (1 - kept.square()).clamp(min=0).sqrt() * noise, level), noise


def of_sums(generator: torch.Generator, is_held_out: bool) -> tuple[Tensor, Tensor]:
    """Digits of two numbers and of their sum, the lowest first."""
    a, b = (torch.randint(1000, (64,), generator=generator) for _ in range(2))
    first, second, total = (
        torch.stack([x // 10**k % 10 for k in range(n)], -1) for x, n in ((a, 3), (b, 3), (a + b, 4))
    )
    plus, equals = (torch.full((64, 1), sign) for sign in (10, 11))
    text = torch.cat((first, plus, second, equals, total), -1)
    return text[:, :-1], text[:, 8:]


def of_heavy_tails(generator: torch.Generator, is_held_out: bool) -> tuple[Tensor, Tensor]:
    """Values with noise of heavy tails."""
    x, noise = torch.randn(128, 8, generator=generator), torch.randn(128, generator=generator)
    noise = noise / torch.randn(128, 2, generator=generator).square().mean(-1).sqrt()
    return x, ((2 * x[:, 0]).sin() * x[:, 1] + x[:, 2].abs() + 0.3 * noise)[:, None]


@cache
def _clusters() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(12, 16, generator=generator), torch.randn(12, 4, 16, generator=generator) / 4


def of_clusters(generator: torch.Generator, is_held_out: bool) -> tuple[Tensor, Tensor]:
    """Points of twelve clusters, each with a function of its own."""
    centres, weights = _clusters()
    cluster = torch.randint(len(centres), (64,), generator=generator)
    x = centres[cluster] + 0.3 * torch.randn(64, 16, generator=generator)
    return x, (3 * weights[cluster] @ x[..., None]).sin()[..., 0]


def quantile_loss(outputs: Tensor, target: Tensor) -> Tensor:
    """Mean pinball loss of three quantiles (Koenker, Bassett 1978)."""
    levels, error = torch.tensor([0.1, 0.5, 0.9], device=outputs.device), target - outputs
    return torch.maximum(levels * error, (levels - 1) * error).mean()


def problems(images: Tensor, labels: Tensor, name: str) -> dict[str, Problem]:
    """The problems, by name.

    Args:
        images: Shape ``(n, pixels)``.
        labels: Shape ``(n,)``.
        name: Of the images.
    """
    rows = [
        ("sines", "sine network", 800, sine_network, of_picture, F.mse_loss),
        ("poisson", "Poisson's equation", 1000, Poisson, of_square, F.mse_loss),
        ("regression", "regression, condition 1e4", 500, lambda: Network(nn.Identity(), nn.Linear(50, 1)),
         of_regression, F.mse_loss),
        ("factors", "matrix of rank six", 1500, Factors, of_matrix, F.mse_loss),
        ("adapters", "adapters, new classes", 300, partial(adapted, images, labels, {}),
         partial(of_images, images, labels), F.cross_entropy),
        ("graph", "graph, 100 labels", 300, lambda: GraphNetwork(_graph()[0]), of_graph, F.cross_entropy),
        ("contrasts", "contrastive", 400, lambda: perceptron(images.shape[1], 128, 128, 32), partial(of_pairs, images),
         contrast),
        ("denoising", "denoising, convolutions", 600, Denoiser, partial(of_noise, images), F.mse_loss),
        ("sums", "sums, transformer", 800, Sums, of_sums, F.cross_entropy),
        ("experts", "sixteen experts", 800, Experts, of_clusters, F.mse_loss),
        ("quantiles", "quantiles, heavy tails", 500, lambda: perceptron(8, 64, 64, 3), of_heavy_tails, quantile_loss),
    ]  # fmt: skip
    return as_problems(rows, name)


def as_problems(rows: Iterable[tuple], name: str) -> dict[str, Problem]:
    """Problems by their keys, from rows of key, title, number of steps, network, sample and criterion.

    Args:
        rows: The rows.
        name: Of the images.
    """
    return {
        key: Problem(key, title, n_steps, make, Drawn(sample, f"{key}, {name}"), criterion)
        for key, title, n_steps, make, sample, criterion in rows
    }
