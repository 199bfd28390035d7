"""Codebook orders are bijections, and look like their pictures."""

from __future__ import annotations

import numpy as np
import pytest

from anygen.codebooks import CodebookOrder
from anygen.errors import ConfigError, DataError


def slow_steps(name: str, kept: int, frames: int) -> list[tuple[int, int]]:
    """The orders, written as the loops they stand for."""
    if name == "sequential":
        return [(k, t) for k in range(kept) for t in range(frames)]
    if name == "delay":
        return [(k, s - k) for s in range(frames + kept - 1) for k in range(kept) if 0 <= s - k < frames]
    return [(k, t) for t in range(frames) for k in range(kept)]


@pytest.mark.parametrize("name", ["flat", "sequential", "delay", "coarse"])
@pytest.mark.parametrize("books", [1, 2, 3, 5])
@pytest.mark.parametrize("frames", [0, 1, 2, 3, 7, 64])
def test_order_equals_its_loop_and_inverts(name: str, books: int, frames: int) -> None:
    kept = (books + 1) // 2 if name == "coarse" else books
    order = CodebookOrder(name, books, kept)  # type: ignore[arg-type]
    codes = np.random.default_rng(0).integers(0, 1000, (books, frames))
    steps = slow_steps(name, kept, frames)
    assert [tuple(step) for step in order.coordinates_S2(frames)] == steps
    assert order.num_steps(frames) == len(steps)
    assert order.codebook_S(frames).tolist() == [k for k, _ in steps]
    assert order.apply(codes).tolist() == [codes[k, t] for k, t in steps]
    assert (order.invert(order.apply(codes)) == codes[:kept]).all()


def test_the_docstring_pictures_are_true() -> None:
    import anygen.codebooks as module

    codes = np.array([[10 * k + t for t in range(4)] for k in range(3)])
    found = set()
    for line in (module.__doc__ or "").splitlines():
        name, _, rest = line.strip().partition(" ")
        if name in ("flat", "sequential", "delay", "coarse"):
            found.add(name)
            kept = 1 if name == "coarse" else 3
            shown = [int(word) for word in rest.split() if word.isdigit()]
            assert CodebookOrder(name, 3, kept).apply(codes).tolist() == shown  # type: ignore[arg-type]
    assert found == {"flat", "sequential", "delay", "coarse"}


def test_impossible_orders_and_half_frames_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown codebook order"):
        CodebookOrder("zigzag", 2)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot keep 1 of 2"):
        CodebookOrder("flat", 2, 1)
    with pytest.raises(ConfigError):
        CodebookOrder("coarse", 2, 3)
    with pytest.raises(DataError, match="whole frames"):
        CodebookOrder("flat", 2).invert(np.arange(3))
