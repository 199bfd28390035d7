"""How the blocks of a model are written: codebook orders, native shapes and limits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from anygen.codebooks import CodebookOrder, OrderName
from anygen.errors import CheckpointError
from anygen.vocabulary import NUM_NUMBERS


@dataclass(frozen=True)
class Layout:
    """Settings of one model; they travel in its bundle."""

    image_codebooks: int = 1
    audio_codebooks: int = 1
    image_order: OrderName = "flat"
    audio_order: OrderName = "flat"
    audio_kept: int = 0
    """Books of the sound codec in the sequence; 0 means all."""
    native_grid_hw: tuple[int, int] = (8, 8)
    """What a picture is given where nobody asks for a shape and the budget allows."""
    max_side: int = 64
    """Largest number of patch rows or columns."""
    native_frames: int = 100
    max_frames: int = 3000
    """Longest sound, in code frames."""

    @property
    def orders(self) -> dict[str, CodebookOrder]:
        """The codebook order of each modality that has one."""
        return {
            "image": CodebookOrder(self.image_order, self.image_codebooks),
            "audio": CodebookOrder(self.audio_order, self.audio_codebooks, self.audio_kept),
        }

    def to_json(self) -> dict[str, Any]:
        """JSON-able fields; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Layout:
        """Read and check.

        Raises:
            CheckpointError: missing, unknown or impossible fields.
        """
        try:
            layout = cls(**{**fields, "native_grid_hw": tuple(fields["native_grid_hw"])})
            layout.orders  # noqa: B018  checks the orders
            numbers = (layout.max_side, layout.native_frames, layout.max_frames, *layout.native_grid_hw)
            if any(not isinstance(n, int) or n < 1 for n in numbers):
                raise CheckpointError(f"broken layout: sides and frames must be 1 or more, got {numbers}")
            if layout.max_side >= NUM_NUMBERS or layout.max_frames >= NUM_NUMBERS**2:
                raise CheckpointError(f"broken layout: sides end at {NUM_NUMBERS - 1}, frames at {NUM_NUMBERS**2 - 1}")
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"broken layout in the bundle: {error}") from error
        return layout
