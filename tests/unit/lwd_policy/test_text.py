# SPDX-License-Identifier: Apache-2.0
"""Instructions to vectors: deterministic, bounded, indifferent to padding, case and spaces."""

import pytest
import torch

from lwd_policy.text import MAX_BYTES, TextEncoder, encode_bytes


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder().eval()


@torch.no_grad()
def test_a_text_reads_the_same_alone_and_in_a_batch(encoder: TextEncoder) -> None:
    texts = ["put the cube into the bowl", "stow", "", "räum die Tasse weg, bitte " * 3, "x" * 500]
    together = encoder(encode_bytes(texts))
    assert together.shape == (5, encoder.dim) and torch.isfinite(together).all()
    for text, row in zip(texts, together, strict=True):
        torch.testing.assert_close(encoder(encode_bytes([text]))[0], row, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_different_texts_differ_and_order_of_words_matters(encoder: TextEncoder) -> None:
    torch.nn.init.normal_(encoder.position, std=0.5)
    one, other = encoder(encode_bytes(["put the cup on the box", "put the box on the cup"]))
    assert (one - other).abs().max() > 1e-3


def test_case_and_spaces_do_not_matter_and_length_is_bounded() -> None:
    tokens = encode_bytes(["  Put THE\tcube \n", "put the cube", "y" * 10_000, "ö" * 10_000])
    assert tokens.shape == (4, MAX_BYTES)
    assert torch.equal(tokens[0], tokens[1])
    assert tokens.max() <= 256 and tokens.min() >= 0
