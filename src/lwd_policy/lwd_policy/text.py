# SPDX-License-Identifier: Apache-2.0
"""Free text to a vector: a small transformer over bytes, trained together with the trunk on paraphrases."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

MAX_BYTES = 96  # of an instruction; what is longer is cut
_PADDING = 256


def encode_bytes(texts: Sequence[str]) -> Tensor:
    """UTF-8 bytes [B, MAX_BYTES] of lower-cased texts, padded with 256."""
    rows = torch.full((len(texts), MAX_BYTES), _PADDING, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        content = " ".join(text.lower().split()).encode()[:MAX_BYTES]
        row[: len(content)] = torch.tensor(list(content), dtype=torch.long)
    return rows


class TextEncoder(nn.Module):
    """Byte embedding, convolution to about word size, transformer, mean over what is not padding."""

    def __init__(self, dim: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.dim = dim
        self.embedding = nn.Embedding(_PADDING + 1, dim, padding_idx=_PADDING)
        self.position = nn.Parameter(torch.zeros(MAX_BYTES // 2, dim))
        self.convolution = nn.Conv1d(dim, dim, kernel_size=5, stride=2, padding=2)
        layer = nn.TransformerEncoderLayer(
            dim, heads, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [B, MAX_BYTES] of `encode_bytes`. Returns [B, dim]."""
        empty = (tokens == _PADDING).view(len(tokens), -1, 2).all(-1)
        empty = empty & ~empty.all(-1, keepdim=True)  # an empty text attends to its padding, not to nothing
        hidden = self.convolution(self.embedding(tokens).transpose(1, 2)).transpose(1, 2) + self.position
        hidden = self.norm(self.transformer(hidden, src_key_padding_mask=empty))
        weight = (~empty).to(hidden.dtype).unsqueeze(-1)
        pooled: Tensor = (hidden * weight).sum(1) / weight.sum(1)
        return pooled
