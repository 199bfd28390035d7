"""Code noise: some codes of a picture or sound are read as another one, and the right next one is learned all the same.

A transformer that reads only true pasts learns pictures by heart, code after code, and is lost where its own sampled
past differs from them. VQGAN replaced codes at random for that (`pkeep`, arXiv 2012.09841).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from anygen.sequence import Sequence
from anygen.vocabulary import Vocabulary


def with_noise(sequence: Sequence, vocabulary: Vocabulary, share: float, generator: np.random.Generator) -> Sequence:
    """The sequence with `share` of its picture and sound codes read as any code of the same codebook.

    What is to be predicted (`ids_S`) stays as it is; only what is read (`read_S`) changes.
    """
    read_S = sequence.ids_S.copy()
    for codebook in vocabulary.ranges:
        if codebook.group in ("image", "audio"):
            (places,) = np.nonzero((read_S >= codebook.start) & (read_S < codebook.stop))
            chosen = places[generator.random(len(places)) < share]
            read_S[chosen] = generator.integers(codebook.start, codebook.stop, len(chosen))
    return replace(sequence, read_S=read_S)
