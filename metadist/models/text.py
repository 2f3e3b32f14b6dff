"""Encoders of sentences, as :mod:`metadist.data.tokens` numbers them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.episode import PADDING

_LENGTH = 4.0


class TextBag(nn.Module):
    """Embedded tokens, each weighted by what is learned of it, summed to a vector of one length: order plays no part.

    The weighted average of Arora et al. 2017 with learned weights. Vectors begin at random and nearly orthogonal, so a
    word that training never met is still told from any other; of all encoders here it does best on classes whose words
    are new.

    Args:
        vocabulary: numbers a token may have.
        out_features: numbers of an output; None ends with the vector.
        embedding: numbers of a token's vector.

    Input int64 ``[N, length]``, output ``[N, out_features]``.
    """

    def __init__(self, vocabulary: int, out_features: int | None, embedding: int = 512) -> None:
        super().__init__()
        self.embed = Embedding(vocabulary, embedding, std=embedding**-0.5)
        self.weight = nn.Parameter(torch.zeros(vocabulary, 1))
        self.length = nn.Parameter(torch.tensor(_LENGTH))
        self.head = nn.Identity() if out_features is None else nn.Linear(embedding, out_features)

    def forward(self, x: Tensor) -> Tensor:
        embedded, _ = self.embed(x)
        # From 0 to 2, so that no known word drowns the new ones, whose weight is 1; tenfold, it moves as a vector does.
        summed = (embedded * 2 * torch.sigmoid(10 * F.embedding(x, self.weight))).sum(1)
        return self.head(summed * torch.rsqrt((summed * summed).sum(-1, keepdim=True) + 1e-6) * self.length)


class TextConv(nn.Module):
    """Convolutions of several widths over embedded tokens, and the largest of each over the sentence (Kim 2014).

    Args:
        vocabulary: numbers a token may have.
        out_features: numbers of an output; None ends with the features, ``filters`` for each width.
        embedding: numbers of a token's vector.
        filters: of each width.
        widths: tokens that a filter sees.

    Input int64 ``[N, length]``, output ``[N, out_features]``.
    """

    def __init__(
        self,
        vocabulary: int,
        out_features: int | None,
        embedding: int = 64,
        filters: int = 64,
        widths: Sequence[int] = (1, 2, 3),
    ) -> None:
        super().__init__()
        self.embed = Embedding(vocabulary, embedding)
        self.convolutions = nn.ModuleList(nn.Linear(width * embedding, filters) for width in widths)
        self.widths = tuple(widths)
        self.head = nn.Identity() if out_features is None else nn.Linear(filters * len(widths), out_features)

    def forward(self, x: Tensor) -> Tensor:
        embedded, there = self.embed(x)
        found = [self._largest(embedded, there, w, c) for w, c in zip(self.widths, self.convolutions, strict=True)]
        return self.head(torch.cat(found, -1))

    @staticmethod
    def _largest(embedded: Tensor, there: Tensor, width: int, convolution: nn.Module) -> Tensor:
        """The largest answer of each filter, of windows that begin with a token; zero if none is above."""
        length = embedded.shape[1]
        padded = F.pad(embedded, (0, 0, 0, width - 1))
        windows = torch.cat([padded[:, i : i + length] for i in range(width)], -1)
        return (F.relu(convolution(windows)) * there).amax(1)


class TextTransformer(nn.Module):
    """A small transformer over embedded tokens, and the mean of what it makes of each (Vaswani et al. 2017).

    Layers normalise before they compute (Xiong et al. 2020), which needs no warm-up of the rate.

    Args:
        vocabulary: numbers a token may have.
        length: tokens of a sentence.
        out_features: numbers of an output; None ends with the mean.
        embedding: numbers of a token's vector, a multiple of ``heads``.
        layers: of attention and of two products each.
        heads: of an attention.

    Input int64 ``[N, length]``, output ``[N, out_features]``.
    """

    def __init__(
        self,
        vocabulary: int,
        length: int,
        out_features: int | None,
        embedding: int = 64,
        layers: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.embed = Embedding(vocabulary, embedding)
        self.place = nn.Parameter(torch.randn(length, embedding) * 0.02)
        self.layers = nn.ModuleList(Layer(embedding, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(embedding)
        self.head = nn.Identity() if out_features is None else nn.Linear(embedding, out_features)

    def forward(self, x: Tensor) -> Tensor:
        h, there = self.embed(x)
        h = h + self.place
        for layer in self.layers:
            h = layer(h, there)
        h = self.norm(h) * there
        return self.head(h.sum(1) / there.sum(1).clamp(min=1))


class Layer(nn.Module):
    """Attention over the tokens that are there, then two products at each, both added to what came in."""

    def __init__(self, embedding: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_products = nn.LayerNorm(embedding), nn.LayerNorm(embedding)
        self.queries_keys_values = nn.Linear(embedding, 3 * embedding)
        self.attended = nn.Linear(embedding, embedding)
        wider = 4 * embedding
        self.products = nn.Sequential(nn.Linear(embedding, wider), nn.GELU(), nn.Linear(wider, embedding))

    def forward(self, h: Tensor, there: Tensor) -> Tensor:
        """Of ``h [N, L, E]`` and ``there [N, L, 1]``, 1 for tokens and 0 for padding."""
        n, length, size = h.shape
        parts = self.queries_keys_values(self.before_attention(h)).view(n, length, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        # Not minus infinity: a sentence without tokens would have no number to attend with.
        mask = (there - 1).view(n, 1, 1, length) * 1e4
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        h = h + self.attended(seen.transpose(1, 2).reshape(n, length, size))
        return h + self.products(self.before_products(h))


class Embedding(nn.Module):
    """A vector for each number, zero for padding."""

    def __init__(self, vocabulary: int, embedding: int, std: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocabulary, embedding) * std)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of int64 ``[N, L]``: vectors ``[N, L, E]``, and ``[N, L, 1]`` of 1 for tokens and 0 for padding."""
        there = (x != PADDING).to(self.weight.dtype)[..., None]
        return F.embedding(x, self.weight) * there, there
