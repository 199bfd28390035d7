"""`Codes`, what every tokenizer makes of its media, and the `Tokenizer` Protocol.

Dimension key: K codebooks, T steps (text pieces, picture patches in row order, sound frames, region coordinates).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from tokenizers_mm.errors import DataError

Modality = Literal["text", "image", "audio", "region"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Codes:
    """Discrete codes of one text, picture, sound or region.

    >>> Codes(np.array([[3, 1, 2, 0]]), "image", grid_hw=(2, 2)).num_steps
    4

    Raises:
        DataError: not a K x T integer array, a negative code, a grid that does not have T cells, samples of a picture.
    """

    codes_KT: IntArray
    modality: Modality
    grid_hw: tuple[int, int] | None = None
    """Rows and columns of patches; pictures only."""
    num_samples: int | None = None
    """Samples of the sound that was encoded: the last frame may reach beyond them."""
    scales: tuple[float, ...] | None = None
    """Loudness of each chunk of the sound, where a codec takes it out. Neither this nor the number of samples is coded:
    codes are equal without them."""

    def __post_init__(self) -> None:
        codes = np.asarray(self.codes_KT)
        if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
            raise DataError(f"codes are a K x T array of integers; got {codes.dtype} of shape {codes.shape}")
        if codes.size and int(codes.min()) < 0:
            raise DataError(f"codes are 0 or more; got {int(codes.min())}")
        if (self.grid_hw is not None) != (self.modality == "image"):
            raise DataError(f"a grid belongs to pictures only; got modality {self.modality!r}, grid {self.grid_hw}")
        if self.grid_hw is not None and self.grid_hw[0] * self.grid_hw[1] != codes.shape[1]:
            raise DataError(f"a {self.grid_hw[0]} x {self.grid_hw[1]} grid does not have {codes.shape[1]} patches")
        if (self.num_samples is not None or self.scales is not None) and self.modality != "audio":
            raise DataError(f"samples and scales belong to sounds only; got modality {self.modality!r}")
        codes = codes.astype(np.int64)  # a copy: freezing it must not freeze the caller's array
        codes.flags.writeable = False
        object.__setattr__(self, "codes_KT", codes)

    @property
    def num_codebooks(self) -> int:
        """K."""
        return int(self.codes_KT.shape[0])

    @property
    def num_steps(self) -> int:
        """T."""
        return int(self.codes_KT.shape[1])

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Codes)
            and (self.modality, self.grid_hw) == (other.modality, other.grid_hw)
            and np.array_equal(self.codes_KT, other.codes_KT)
        )

    def __hash__(self) -> int:
        return hash((self.modality, self.grid_hw, self.codes_KT.tobytes()))


Media = TypeVar("Media")


class Tokenizer(Protocol[Media]):
    """Media to codes and back. A tokenizer knows no ids, prompts or transformer."""

    @property
    def modality(self) -> Modality:
        """The kind of media it takes."""
        ...

    @property
    def codebook_size(self) -> int:
        """Entries of each codebook; codes are in [0, codebook_size)."""
        ...

    @property
    def num_codebooks(self) -> int:
        """K."""
        ...

    @property
    def rate_hz(self) -> float | None:
        """Code steps per second of sound; None for other media."""
        ...

    @property
    def grid_hw(self) -> tuple[int, int] | None:
        """Rows and columns of patches of a picture at native size; None for other media."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same media would give other codes."""
        ...

    def encode(self, media: Media) -> Codes:
        """Media to codes."""
        ...

    def decode(self, codes: Codes) -> Media:
        """Codes to media."""
        ...


def fingerprint_of(facts: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]] | None = None) -> str:
    """sha256 over JSON-able facts and named arrays, independent of their order.

    >>> fingerprint_of({"a": 1, "b": 2}) == fingerprint_of({"b": 2, "a": 1})
    True
    """
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode())
    for name, array in sorted((arrays or {}).items()):
        digest.update(f"|{name}|{array.dtype}|{array.shape}|".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def check_codes(codes: Codes, modality: Modality, codebook_size: int, num_codebooks: int) -> None:
    """Refuse codes that a decoder could not look up (on a GPU an index out of range kills the process).

    Fewer codebooks than `num_codebooks` are welcome: a residual quantiser decodes any leading part of its books.

    Raises:
        DataError: another modality, no or too many codebooks, or a code outside [0, codebook_size).
    """
    if codes.modality != modality:
        raise DataError(f"expected codes of modality {modality!r}, got {codes.modality!r}")
    if not 1 <= codes.num_codebooks <= num_codebooks:
        raise DataError(f"expected 1 to {num_codebooks} codebooks, got {codes.num_codebooks}")
    if codes.codes_KT.size and int(codes.codes_KT.max()) >= codebook_size:
        raise DataError(f"codes must be below {codebook_size}, got {int(codes.codes_KT.max())}")
