"""What the flow decoder of a bundle gives over the tokenizer's own pixel head, on held-out emoji.

    python benchmarks/picture_decoders.py OUT.json [--bundle FOLDER] [--limit N] [--sheet SHEET.png]

True codes: every held-out emoji is encoded and drawn again. Own codes: the model draws held-out names, once, and both
decoders draw the same codes. Code agreement is the share of patches whose code is read again in the drawing.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from anygen.api import AnyGen
from anygen.data.emoji_names import captions
from anygen.evaluation.emoji import RealEmoji
from anygen.evaluation.fidelity import psnr, ssim
from anygen.evaluation.voken_gap import Interval
from anygen.files import write_json
from anygen.request import Request
from tokenizers_mm.image import to_pixels

STEPS = (1, 4, 8)
BATCH = 32


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bundle", type=Path, default=None, help="a folder; the embedded bundle by default")
    parser.add_argument("--limit", type=int, default=None, help="held-out emoji; all by default")
    parser.add_argument("--sheet", type=Path, default=None, help="write originals, head and decoder beside each other")
    arguments = parser.parse_args()
    model = AnyGen.from_pretrained(arguments.bundle, device="cpu")
    real = RealEmoji(model.bundle.tokenizers["image"].config.side_px)  # type: ignore[attr-defined]
    held_out = np.random.default_rng(0).permutation(real.held_out())[: arguments.limit].tolist()
    pixels = torch.stack([to_pixels(real.pictures[index]) for index in held_out])
    tokenizer: Any = model.bundle.tokenizers["image"]
    codes = torch.cat([tokenizer.encode_pixels(part) for part in pixels.split(BATCH)])
    rows = {"true codes": true_codes(model, codes, pixels), "own codes": own_codes(model, real, held_out)}
    write_json(arguments.out, {"held_out_emoji": len(held_out), **rows, "seconds a picture": speed(model, codes)})
    print(arguments.out.read_text(encoding="utf-8"))
    if arguments.sheet:
        sheet(model, codes[:12], pixels[:12]).save(arguments.sheet)


def head(model: AnyGen, codes: Tensor) -> Tensor:
    """Drawn by the tokenizer's own pixel head, in [0, 1]."""
    tokenizer: Any = model.bundle.tokenizers["image"]
    return torch.cat([tokenizer.decode_codes(part, tokenizer.grid_hw) for part in codes.split(BATCH)])


def flow(model: AnyGen, codes: Tensor, steps: int) -> Tensor:
    """Drawn by the flow decoder, in [0, 1]; the noise of a picture is that of its place."""
    renderer, drawn = model.bundle.renderer("image"), []
    for start in range(0, len(codes), BATCH):
        part = codes[start : start + BATCH]
        generators = [torch.Generator().manual_seed(start + place) for place in range(len(part))]
        drawn.append((renderer(codes=part, steps=steps, generator=generators).data_BCHW.clamp(-1, 1) + 1) / 2)
    return torch.cat(drawn)


def true_codes(model: AnyGen, codes: Tensor, pixels: Tensor) -> dict[str, Any]:
    """Agreement, PSNR and SSIM of each way of drawing."""
    drawings = {"pixel head": head(model, codes)}
    drawings |= {f"flow decoder, {n} steps": flow(model, codes, n) for n in STEPS}
    real, found = as_bytes(pixels), {}
    for name, drawn in drawings.items():
        values = {
            "agreement": agreement(model, drawn, codes),
            "psnr": psnr(real, as_bytes(drawn)),
            "ssim": ssim(real, as_bytes(drawn)),
        }
        first = found.setdefault("pixel head", values)
        found[name] = values | {f"{key} over pixel head": values[key] - first[key] for key in values}  # by picture
    return {name: {key: figures(v) for key, v in values.items()} for name, values in found.items()}


def own_codes(model: AnyGen, real: RealEmoji, held_out: list[int]) -> dict[str, Any]:
    """The model's codes of held-out names: agreement, and whether the nearest real emoji is the one asked for."""
    codes = []
    for start in range(0, len(held_out), BATCH):
        names = [captions(real.emoji[index].parts)[0] for index in held_out[start : start + BATCH]]
        requests = [
            Request(text=name, output="image", size=real.side_px, seed=start + i) for i, name in enumerate(names)
        ]
        for output in model.generate_batch(requests):
            ids = torch.tensor(output.samples[0].ids)
            span = model.bundle.vocabulary.range("image.0")
            codes.append(ids[(ids >= span.start) & (ids < span.stop)] - span.start)
    codes_NP = torch.stack(codes)
    found = {}
    for name, drawn in {"pixel head": head(model, codes_NP), "flow decoder, 4 steps": flow(model, codes_NP, 4)}.items():
        nearest = [real.nearest(Image.fromarray(picture)) for picture in as_bytes(drawn)]
        right = np.array([float(a == int(real.classes[b])) for a, b in zip(nearest, held_out, strict=True)])
        found[name] = {"agreement": figures(agreement(model, drawn, codes_NP)), "nearest is right": figures(right)}
    return found


def agreement(model: AnyGen, drawn: Tensor, codes: Tensor) -> Any:
    """Share of patches of each drawing whose code is read again."""
    tokenizer: Any = model.bundle.tokenizers["image"]
    # as a user would have them: 8 bits a colour
    read = torch.cat([tokenizer.encode_pixels(part) for part in ((drawn * 255).round() / 255).split(BATCH)])
    return (read == codes).double().mean(1).numpy()


def speed(model: AnyGen, codes: Tensor) -> dict[str, float]:
    """Median seconds of one picture in four steps, by threads."""
    renderer, found = model.bundle.renderer("image"), {}
    usual = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        times = []
        for place in range(20):
            start = time.perf_counter()
            renderer(codes=codes[place : place + 1], steps=4, generator=torch.Generator().manual_seed(0))
            times.append(time.perf_counter() - start)
        found[f"{threads} threads"] = float(np.median(times))
    torch.set_num_threads(usual)
    return found


def sheet(model: AnyGen, codes: Tensor, pixels: Tensor) -> Image.Image:
    """Three rows: originals, pixel head, flow decoder in four steps; twice their size."""
    rows = [as_bytes(row) for row in (pixels, head(model, codes), flow(model, codes, 4))]
    whole = Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0))
    return whole.resize((whole.width * 2, whole.height * 2), Image.Resampling.NEAREST)


def as_bytes(pixels: Tensor) -> Any:
    """N x H x W x C."""
    return (pixels * 255).round().byte().permute(0, 2, 3, 1).numpy()


def figures(values_N: Any) -> dict[str, float]:
    """Mean and 95 % interval."""
    return {name: round(value, 4) for name, value in asdict(Interval.of(np.asarray(values_N, np.float64))).items()}


if __name__ == "__main__":
    main()
