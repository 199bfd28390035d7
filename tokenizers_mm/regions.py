"""Location bins: boxes and points as codes (OFA, arXiv 2202.03052; Unified-IO, arXiv 2206.08916).

A coordinate v in [0, 1] becomes bin round(v * (num_bins - 1)) and comes back as bin / (num_bins - 1). Order: x0, y0,
x1, y1.
"""

from __future__ import annotations

import numpy as np

from tokenizers_mm.codes import Codes, Modality, check_codes, fingerprint_of
from tokenizers_mm.errors import DataError
from tokenizers_mm.media import Region


class RegionTokenizer:
    """Boxes (4 codes) and points (2 codes) on a grid of `codebook_size` bins.

    >>> tokenizer = RegionTokenizer(num_bins=101)
    >>> tokenizer.encode(Region((0.0, 0.254, 0.5, 1.0))).codes_KT.tolist()
    [[0, 25, 50, 100]]
    >>> tokenizer.decode(tokenizer.encode(Region((0.25, 1.0)))).values
    (0.25, 1.0)
    """

    modality: Modality = "region"
    num_codebooks = 1
    rate_hz = None
    grid_hw = None

    def __init__(self, num_bins: int = 1000) -> None:
        self.codebook_size = num_bins
        self.fingerprint = fingerprint_of({"kind": "location bins", "num_bins": num_bins, "rounding": "nearest"})

    def encode(self, media: Region) -> Codes:
        """Box or point to 1 x 4 or 1 x 2 codes."""
        bins = np.rint(np.array([media.values]) * (self.codebook_size - 1)).astype(np.int64)
        return Codes(bins, "region")

    def decode(self, codes: Codes) -> Region:
        """Codes to the centre of each bin.

        Raises:
            DataError: not 2 or 4 codes, or a code out of range.
        """
        check_codes(codes, "region", self.codebook_size, 1)
        if codes.num_steps not in (2, 4):
            raise DataError(f"a region has 2 or 4 coordinates; got {codes.num_steps}")
        return Region(tuple(float(b) / (self.codebook_size - 1) for b in codes.codes_KT[0]))
