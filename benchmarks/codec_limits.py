"""What keeps a sound tokenizer from the original: its codes, its magnitudes or its phases.

    python benchmarks/codec_limits.py TOKENIZER DATA [--limit 20]

Each held-out sound is decoded from all codes and from the encoder's output without codes; then magnitudes and phases
of original and decoded sound are exchanged (STFT of 512 samples). What is exchanged and still bad is not the reason.
It prints means of ESTOI and PESQ.
"""

from __future__ import annotations

import argparse
import math
import random
import warnings
from pathlib import Path

import numpy as np
import torch
from pesq import PesqError, pesq
from pystoi import stoi
from torch import Tensor

from anygen.data.records import RecordStore
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.media import Audio

WINDOW, HOP, RATE_HZ = 512, 128, 16_000


def spectrum(sound_N: Tensor) -> Tensor:
    """Complex spectrum, F x T."""
    return torch.stft(sound_N, WINDOW, HOP, window=torch.hann_window(WINDOW), return_complex=True)


def exchanged(magnitudes_from_N: Tensor, phases_from_N: Tensor) -> Tensor:
    """A sound with the magnitudes of one and the phases of another."""
    phases = torch.angle(spectrum(phases_from_N))
    mixed_FT = torch.polar(spectrum(magnitudes_from_N).abs(), phases)
    return torch.istft(mixed_FT, WINDOW, HOP, window=torch.hann_window(WINDOW), length=len(phases_from_N))


@torch.inference_mode()
def versions(tokenizer: AudioTokenizer, samples_N: Tensor) -> dict[str, Tensor]:
    """Name -> a version of the sound, as long as it is."""
    decoded_N = torch.from_numpy(tokenizer.decode(tokenizer.encode(Audio(samples_N.numpy(), RATE_HZ))).samples_T)
    latents_1LT = tokenizer.model.encoder(samples_N[None, None])
    free_1N = tokenizer.istft(latents_1LT) if tokenizer.istft else tokenizer.model.decoder(latents_1LT)[0]
    return {
        "from all codes": decoded_N,
        "without codes": free_1N[0, : len(samples_N)],
        "phases decoded, magnitudes right": exchanged(samples_N, decoded_N),
        "magnitudes decoded, phases right": exchanged(decoded_N, samples_N),
    }


def measured(original_N: Tensor, other_N: Tensor) -> tuple[float, float]:
    """(ESTOI, PESQ); NaN where a sound is too short for it."""
    original, other = original_N.numpy(), other_N.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # pystoi returns 1e-5 where too little is not silent
        try:
            return float(stoi(original, other, RATE_HZ, extended=True)), float(pesq(RATE_HZ, original, other, "wb"))
        except (PesqError, RuntimeWarning):
            return math.nan, math.nan


def main() -> None:
    """Measure every version on sounds of the validation split and of each unheard voice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--limit", type=int, default=20)
    options = parser.parse_args()
    tokenizer = AudioTokenizer.load(options.tokenizer)
    if tokenizer.sample_rate_hz != RATE_HZ:
        raise SystemExit(f"PESQ needs a codec at {RATE_HZ} Hz, this one has {tokenizer.sample_rate_hz}")
    for split in ("validation", "unheard"):
        store = RecordStore(options.data.glob(f"{split}-*.tar"))
        places = [(i, turn) for i in range(len(store)) for turn in range(store.num_sounds(i))]
        figures: dict[str, list[tuple[float, float]]] = {}
        for index, turn in random.Random(0).sample(places, min(options.limit, len(places))):
            samples_N = torch.from_numpy(store[index].utterances[turn].audio(RATE_HZ).samples_T.copy())
            for name, version_N in versions(tokenizer, samples_N).items():
                figures.setdefault(name, []).append(measured(samples_N, version_N))
        for name, pairs in figures.items():
            kept = np.array([pair for pair in pairs if not math.isnan(pair[0])])
            print(f"{split}, {name}: ESTOI {kept[:, 0].mean():.3f}, PESQ {kept[:, 1].mean():.2f}, n={len(kept)}")


if __name__ == "__main__":
    main()
