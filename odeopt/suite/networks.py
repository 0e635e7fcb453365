"""Networks as people write them today: plain modules, whose last layer is called ``head``."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Perceptron(nn.Module):
    """Layers of one activation.

    Args:
        n_inputs: Inputs per example; further axes are flattened.
        widths: Widths of the hidden layers, at least one.
        n_outputs: Outputs per example.
        activation: Class of the activation.
    """

    def __init__(
        self, n_inputs: int, widths: tuple[int, ...], n_outputs: int, activation: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        self.stem = nn.Linear(n_inputs, widths[0])
        hidden = [(activation(), nn.Linear(*pair)) for pair in itertools.pairwise(widths)]
        self.body = nn.Sequential(*itertools.chain(*hidden), activation())
        self.head = nn.Linear(widths[-1], n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x.flatten(1))))


class Block(nn.Module):
    """Pre-norm transformer block: self-attention, then a GELU perceptron of four times the width.

    Args:
        width: Width of the residual stream.
        n_heads: Heads of the attention, which divide the width.
        is_causal: Whether a position sees itself and those before it only.
    """

    def __init__(self, width: int, n_heads: int, is_causal: bool) -> None:
        super().__init__()
        self.n_heads, self.is_causal = n_heads, is_causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class CharacterTransformer(nn.Module):
    """Causal transformer with learned positions, whose head has weights of its own.

    Args:
        n_characters: Size of the alphabet.
        context: Number of positions.
        width: Width of the residual stream.
        n_layers: Number of blocks.
        n_heads: Heads of the attention.
        init_std: Draw weights as GPT-2 does, with this standard deviation, less in the layers that write to the
            residual stream; as torch does by default.
    """

    def __init__(
        self,
        n_characters: int,
        context: int,
        *,
        width: int,
        n_layers: int,
        n_heads: int = 4,
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        self.stem, self.positions = nn.Embedding(n_characters, width), nn.Embedding(context, width)
        self.body = nn.Sequential(*(Block(width, n_heads, is_causal=True) for _ in range(n_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, n_characters)
        if init_std is not None:
            for name, param in self.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(param)
                elif param.ndim == 2:
                    writes = name.endswith(("out.weight", "mlp.2.weight"))
                    nn.init.normal_(param, std=init_std / (2 * n_layers) ** 0.5 if writes else init_std)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.stem(characters) + self.positions.weight[: characters.shape[1]]
        return self.head(self.norm(self.body(x)))


class CharacterGRU(nn.Module):
    """Recurrent network over characters.

    Args:
        n_characters: Size of the alphabet.
        n_embedded: Width of the embedding.
        width: Width of the state.
    """

    def __init__(self, n_characters: int, *, n_embedded: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Embedding(n_characters, n_embedded)
        self.body = nn.GRU(n_embedded, width, batch_first=True)
        self.head = nn.Linear(width, n_characters)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.body(self.stem(characters))[0])


class VisionTransformer(nn.Module):
    """Transformer over square patches of grey images, averaged over positions before the head.

    Args:
        side: Side of an image in pixels.
        n_patches: Patches along a side, which they divide.
        width: Width of the residual stream.
        n_layers: Number of blocks.
        n_heads: Heads of the attention.
        n_outputs: Number of classes.
    """

    def __init__(
        self, side: int, n_patches: int = 4, *, width: int, n_layers: int, n_heads: int = 4, n_outputs: int = 10
    ) -> None:
        super().__init__()
        patch = side // n_patches
        self.stem, self.positions = nn.Conv2d(1, width, patch, patch), nn.Embedding(n_patches**2, width)
        self.body = nn.Sequential(*(Block(width, n_heads, is_causal=False) for _ in range(n_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, n_outputs)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2) + self.positions.weight
        return self.head(self.norm(self.body(x)).mean(1))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm, and a shortcut, projected where the shape changes.

    Args:
        n_in: Channels of the input.
        n_out: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
    """

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.norm2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        is_same = n_in == n_out and stride == 1
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(n_in, n_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (inner + self.shortcut(x)).relu()


class ResidualNet(nn.Module):
    """Small residual convnet with BatchNorm for grey images.

    Args:
        channels: Channels of each residual block; a block that changes them halves the resolution.
        n_outputs: Number of classes.
    """

    def __init__(self, channels: tuple[int, ...] = (16, 16, 32, 32), n_outputs: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels[0], 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels[0])
        pairs = itertools.pairwise((channels[0], *channels))
        self.body = nn.Sequential(*(ResidualBlock(n_in, n_out, 1 + (n_in != n_out)) for n_in, n_out in pairs))
        self.head = nn.Linear(channels[-1], n_outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.norm(self.stem(images)).relu()).mean((2, 3)))


class VariationalAutoencoder(nn.Module):
    """Gaussian code, Bernoulli pixels; the noise of the code is an input.

    Args:
        n_pixels: Pixels of an image.
        width: Width of the hidden layers.
        n_latents: Numbers in a code.
    """

    def __init__(self, n_pixels: int, *, width: int = 256, n_latents: int = 16) -> None:
        super().__init__()
        self.stem, self.encode = nn.Linear(n_pixels, width), nn.Linear(width, 2 * n_latents)
        self.decode, self.head = nn.Linear(n_latents, width), nn.Linear(width, n_pixels)

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of the pixels, and mean and logarithm of the variance of the code."""
        mean, log_variance = self.encode(self.stem(pixels).relu()).chunk(2, -1)
        code = mean + (0.5 * log_variance).exp() * noise
        return self.head(self.decode(code).relu()), mean, log_variance


class CoordinateNetwork(Perceptron):
    """Brightness at a point of a picture, from sines and cosines of its coordinates.

    Args:
        n_octaves: Number of frequencies, from half a period over the picture on, each twice the one before.
        widths: Widths of the hidden layers.
    """

    def __init__(self, n_octaves: int = 1, widths: tuple[int, ...] = (96, 96, 96)) -> None:
        super().__init__(2 + 4 * n_octaves, widths, 1, nn.Tanh)
        self.register_buffer("frequencies", torch.pi / 2 * 2.0 ** torch.arange(n_octaves))

    def forward(self, points: Tensor) -> Tensor:
        angles = (points.unsqueeze(-1) * self.frequencies).flatten(1)
        return super().forward(torch.cat((points, angles.sin(), angles.cos()), 1)).squeeze(1)
