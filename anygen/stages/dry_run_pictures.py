"""What a picture tokenizer's recipe would cost, without data, weights or a step: parameters, FLOPs, memory.

All runs on torch's `meta` device, which has shapes and no values: a recipe for a cluster is weighed on a laptop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from anygen.stages.image_tokenizer import ImageTokenizerConfig
from anygen.stages.weighing import BYTES_PER_PARAMETER, counting_saved, figure, num_parameters
from anygen.training.loop import LoopConfig
from tokenizers_mm.features import FeatureDecoder, FeatureDecoderConfig
from tokenizers_mm.patchgan import PatchDiscriminator
from tokenizers_mm.pixels import PixelHead
from tokenizers_mm.teacher import VisionTeacher
from tokenizers_mm.vqkd import PictureEncoder


def weigh_image_tokenizer(config: ImageTokenizerConfig, teacher: VisionTeacher | None) -> dict[str, Any]:
    """Parameters, FLOPs and memory of both phases.

    Args:
        config: the recipe.
        teacher: its teacher where there is one at hand; its work is left out otherwise.

    Returns:
        JSON-able facts. FLOPs are of matrix products and convolutions; memory is of weights, optimizer and saved
        activations at one process, without the allocator's reserve.
    """
    encoder_config = config.encoder
    rows = encoder_config.side_px // encoder_config.patch_px
    grid_hw = (rows, rows)
    eyes = copy.deepcopy(teacher).to("meta") if teacher else None
    with torch.device("meta"):
        encoder = PictureEncoder(encoder_config)
        features = FeatureDecoder(
            FeatureDecoderConfig(
                code_dim=encoder_config.code_dim,
                width=encoder_config.width,
                depth=encoder_config.decoder_depth,
                num_heads=encoder_config.num_heads,
                deep_width=teacher.deep_width if teacher else encoder_config.width,
                shallow_width=teacher.shallow_width if teacher else encoder_config.width,
            )
        )
        head = PixelHead(config.head, code_dim=encoder_config.code_dim, patch_px=encoder_config.patch_px)
        gan = PatchDiscriminator(config.adversarial) if config.adversarial.weight else None
        pixels = torch.empty(config.batch_size, 3, encoder_config.side_px, encoder_config.side_px)
        vectors = torch.empty(config.batch_size, rows * rows, encoder_config.code_dim)

        def distil() -> Tensor:
            if eyes is not None and (config.deep_weight or config.shallow_weight):
                eyes(pixels, grid_hw)
            z_BNX = encoder.to_code(encoder.encoder(pixels))
            found = features(z_BNX, grid_hw)
            loss = found.deep_BND.sum() + found.shallow_BND.sum()
            return loss + head(z_BNX, grid_hw).sum() if config.pixel_weight else loss

        def draw() -> Tensor:
            drawn = head(vectors, grid_hw)
            loss = drawn.sum() if gan is None else drawn.sum() + gan(drawn).sum() + gan(pixels).sum()
            if eyes is not None and config.perceptual_weight:
                eyes(pixels, grid_hw)
                loss = loss + eyes.differentiable(drawn, grid_hw).sum()
            return loss

        parts: dict[str, nn.Module] = {"encoder": encoder, "features": features, "pixel head": head}
        parts |= {"discriminator": gan} if gan is not None else {}
        first = [encoder, features, *([head] if config.pixel_weight else [])]
        phases = {
            "vqkd": _phase(distil, first, eyes, config.vqkd_loop, config.batch_size),
            "pixels": _phase(draw, [head, *([gan] if gan else [])], eyes, config.head_loop, config.batch_size),
        }
    # the search of the nearest code is one more product, which the meta run leaves out
    tokens = config.batch_size * rows * rows * encoder_config.quantizer.num_codebooks
    search = 2e-9 * tokens * encoder_config.codebook_size * encoder_config.code_dim
    phases["vqkd"]["GFLOP per step"] = figure(phases["vqkd"]["GFLOP per step"] + search)
    # similarities in fp32 and one-hot codes in int64, as vector_quantize_pytorch holds them at once
    phases["vqkd"]["GB quantiser"] = figure(12e-9 * tokens * encoder_config.codebook_size)
    return {
        "codes per picture": rows * rows * encoder_config.quantizer.num_codebooks,
        "parameters": {name: num_parameters(part) for name, part in parts.items()},
        "teacher": f"{teacher.description}, {num_parameters(teacher):,} parameters" if teacher else "not weighed",
        **phases,
    }


def _phase(
    forward: Callable[[], Tensor],
    modules: list[nn.Module],
    eyes: VisionTeacher | None,
    loop: LoopConfig,
    batch_size: int,
) -> dict[str, Any]:
    with FlopCounterMode(display=False) as counter:
        with counting_saved([*modules, *([eyes] if eyes else [])]) as saved:
            loss = forward()
        loss.backward()
    trained = sum(num_parameters(module) for module in modules)
    scale = 0.5 if loop.precision == "bf16" else 1.0  # most of what autocast saves is bf16
    return {
        "steps": loop.steps,
        "pictures seen": loop.steps * batch_size,
        "trained parameters": trained,
        "GFLOP per step": figure(counter.get_total_flops() / 1e9),
        "GB weights and optimizer": figure(BYTES_PER_PARAMETER * trained / 1e9),
        "GB activations": figure(scale * saved.num_bytes / 1e9),
    }
