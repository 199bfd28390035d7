"""Where the rows of picture and sound codes start: not anywhere, but as near to each other as their codes are.

A codebook has a geometry: codes of nearby vectors look or sound alike. Rows that start with it share what is learned of
one code with those like it, and a code that is seldom seen has a row that means something from the first step.

Dimension key: K codebooks, V codes, X code dimension, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anygen.vocabulary import Vocabulary

SHARE = 0.75
"""Of a row's variance that its code's vector gives; the rest tells apart codes that are next to each other."""


@torch.no_grad()
def start_code_rows(model: Any, vocabulary: Vocabulary, vectors: Mapping[str, Tensor], *, seed: int) -> None:
    """Mix the vectors of the codes into the model's rows for them, which keep their size.

    Args:
        model: whose rows for codes are untrained; its input rows, and those of the output where it has its own.
        vocabulary: what the rows are.
        vectors: `image` and `audio` to the codebooks' vectors, K x V x X; books beyond the vocabulary's are not used.
        seed: of the random directions in which the vectors' dimensions lie.
    """
    tables = {id(table.weight): table.weight for table in (model.get_input_embeddings(), model.get_output_embeddings())}
    for codes in vocabulary.ranges:
        group, _, book = codes.name.partition(".")
        if group not in vectors:
            continue
        vectors_VX = vectors[group][int(book)].float().cpu()
        centred_VX = vectors_VX - vectors_VX.mean(0)
        generator = torch.Generator().manual_seed(seed + codes.start)
        for table in tables.values():
            directions_XD = torch.randn(vectors_VX.shape[1], table.shape[1], generator=generator)
            placed_VD = centred_VX @ directions_XD
            rows_VD = table[codes.start : codes.stop]
            mean_D = rows_VD.mean(0)
            own_VD = rows_VD - mean_D
            placed_VD *= own_VD.std().cpu() / placed_VD.std().clamp_min(1e-8)
            rows_VD.copy_(mean_D + (1 - SHARE) ** 0.5 * own_VD + SHARE**0.5 * placed_VD.to(own_VD))
