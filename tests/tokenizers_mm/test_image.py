"""VQ-KD: real distillation, exact codes, batches that do not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tokenizers_mm.codes import Codes
from tokenizers_mm.errors import CheckpointError, DataError, InputError
from tokenizers_mm.image import ImageTokenizer, square, to_picture, to_pixels
from tokenizers_mm.pixels import PixelHead, PixelHeadConfig, neighbour_loss
from tokenizers_mm.teacher import TeacherFeatures, VisionTeacher
from tokenizers_mm.vit import Transformer, from_patches, positions, to_patches, windows
from tokenizers_mm.vqkd import VQKD, PictureEncoder, VQKDConfig

CONFIG = VQKDConfig(side_px=16, patch_px=8, width=32, depth=1, num_heads=2, codebook_size=16, code_dim=8)


def test_patches_and_positions() -> None:
    pixels = torch.rand(2, 3, 24, 16)
    patches = to_patches(pixels, 8)
    assert patches.shape == (2, 6, 192)
    assert torch.equal(from_patches(patches, (3, 2), 8), pixels)
    first = patches[0, 3].view(3, 8, 8)  # row 1, column 1
    assert torch.equal(first, pixels[0, :, 8:16, 8:16])
    table = positions((3, 4), 16, torch.device("cpu"))
    assert table.shape == (12, 16) and len({tuple(row.tolist()) for row in table}) == 12
    assert torch.equal(positions((5, 4), 16, torch.device("cpu"))[:12], table), "rows keep their place in larger grids"


def test_training_and_inference_attention_agree() -> None:
    torch.manual_seed(0)
    transformer = Transformer(16, 2, 2)
    x = torch.randn(2, 6, 16)
    trained = transformer(x, (2, 3))
    with torch.inference_mode():
        inferred = transformer(x, (2, 3))
    assert (trained - inferred).abs().max() < 1e-5


@pytest.mark.parametrize("margin_px", [0, 3, None])
def test_a_code_sees_as_far_as_its_margin(margin_px: int | None) -> None:
    torch.manual_seed(0)
    encoder = PictureEncoder(VQKDConfig(**{**CONFIG.model_dump(), "side_px": 32, "margin_px": margin_px})).double()
    pixels = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    before_ND = encoder.encoder(pixels)[0]
    for row in range(32):  # the patch in the middle: rows and columns 8 to 15
        changed = pixels.clone()
        changed[..., row, 12] += 1
        seen = not torch.equal(encoder.encoder(changed)[0, 5], before_ND[5])
        assert seen == (margin_px is None or 8 - margin_px <= row < 16 + margin_px), f"row {row}"


def test_local_codes_mean_the_same_wherever_they_stand() -> None:
    torch.manual_seed(0)
    config = VQKDConfig(**{**CONFIG.model_dump(), "margin_px": 2, "quantizer": {"kmeans_start": False}})
    encoder = PictureEncoder(config).eval()
    tile = torch.rand(1, 3, 8, 8)
    codes_BN = encoder(tile.tile(1, 1, 5, 5))[1]
    inner = codes_BN.view(5, 5)[1:4, 1:4]  # at the edges the margin repeats the last pixels
    assert (inner == inner[0, 0]).all()
    assert torch.equal(windows(tile.tile(1, 1, 3, 3), 8, 2)[0, 4].view(3, 12, 12)[:, 2:10, 2:10], tile[0])
    assert "margin_px" not in CONFIG.model_dump(), "tokenizers saved before there were local codes keep their files"


def test_a_picture_is_scaled_before_it_is_padded() -> None:
    tall = square(Image.new("RGB", (1, 16_384), "black"), 8)
    assert tall.size == (8, 8)
    pixels = np.asarray(tall)[..., 0]
    assert (pixels == 0).sum() == 8 and (pixels == 255).sum() == 56, "one black column on white"
    half = np.asarray(square(Image.new("RGB", (10, 20), "black"), 8))[..., 0]
    assert half[:, 2:6].max() == 0 and half[:, :2].min() == 255 and half[:, 6:].min() == 255


def train_vqkd(teacher: VisionTeacher, *, steps: int, dead_code_share: float) -> tuple[VQKD, list[float]]:
    torch.manual_seed(0)
    config = VQKDConfig(**{**CONFIG.model_dump(), "dead_code_share": dead_code_share})
    vqkd = VQKD(config, deep_width=teacher.deep_width, shallow_width=teacher.shallow_width, tokens_per_batch=32 * 4)
    optimizer = torch.optim.AdamW(vqkd.parameters(), 3e-3)
    losses = []
    for _ in range(steps):
        pixels = torch.rand(32, 3, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)  # one colour a patch
        out = vqkd(pixels, teacher(pixels))
        loss = out.deep + out.shallow + out.commitment
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(out.deep.detach()))
    return vqkd.eval(), losses


@pytest.mark.slow
def test_vqkd_learns_the_teacher_and_uses_its_codebook(clip_folder: Path) -> None:
    teacher = VisionTeacher.from_pretrained(clip_folder, shallow_layer=1)
    vqkd, losses = train_vqkd(teacher, steps=150, dead_code_share=0.25)
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10]), "the loss to the teacher falls"
    pixels = torch.rand(64, 3, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    codes = vqkd.encoder(pixels)[1]
    assert len(codes.unique()) >= 10, f"{len(codes.unique())} of 16 codes are used"
    norms = vqkd.encoder.codebooks_KVX[0].norm(dim=-1)
    assert (norms - 1).abs().max() < 1e-4, "codes lie on the unit sphere"


def test_gradients_reach_the_encoder_through_the_codes(clip_folder: Path) -> None:
    teacher = VisionTeacher.from_pretrained(clip_folder, shallow_layer=1)
    torch.manual_seed(0)
    vqkd = VQKD(CONFIG, deep_width=24, shallow_width=24, tokens_per_batch=128)
    pixels = torch.rand(32, 3, 16, 16)
    vqkd(pixels, teacher(pixels))  # starts the codebook
    vqkd(pixels, teacher(pixels)).deep.backward()
    gradient = vqkd.encoder.encoder.embed.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


def test_the_quantiser_stays_in_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    encoder = PictureEncoder(CONFIG)
    encoder.train()
    encoder(torch.rand(64, 3, 16, 16))
    encoder.eval()
    seen = {}
    handle = encoder.quantizer.register_forward_pre_hook(lambda m, a: seen.update(dtype=a[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        quantised, _, _ = encoder(torch.rand(2, 3, 16, 16))
    handle.remove()
    assert seen["dtype"] == torch.float32 and quantised.dtype == torch.float32


# -- the tokenizer


def test_codes_survive_saving_and_do_not_depend_on_the_batch(image_tokenizer: ImageTokenizer, tmp_path: Path) -> None:
    pixels = torch.rand(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    together = image_tokenizer.encode_pixels(pixels)
    alone = torch.cat([image_tokenizer.encode_pixels(p[None]) for p in pixels])
    assert torch.equal(together, alone)
    image_tokenizer.save(tmp_path)
    loaded = ImageTokenizer.load(tmp_path)
    assert torch.equal(loaded.encode_pixels(pixels), together)
    assert loaded.fingerprint == image_tokenizer.fingerprint
    drawn = image_tokenizer.decode_codes(together, (2, 2))
    assert torch.equal(loaded.decode_codes(together, (2, 2)), drawn)


def test_the_fingerprint_sees_encoder_and_codebook_but_not_the_pixel_head(image_tokenizer: ImageTokenizer) -> None:
    head = PixelHead(image_tokenizer.head_config, code_dim=4, patch_px=8)
    other = ImageTokenizer(image_tokenizer.config, image_tokenizer.encoder, image_tokenizer.head_config, head)
    assert other.fingerprint == image_tokenizer.fingerprint
    import copy

    encoder = copy.deepcopy(image_tokenizer.encoder)
    encoder.quantizer._codebook.embed[0, 0, 0] += 0.5
    changed = ImageTokenizer(image_tokenizer.config, encoder, image_tokenizer.head_config, head)
    assert changed.fingerprint != image_tokenizer.fingerprint


def test_any_grid_and_any_picture(image_tokenizer: ImageTokenizer) -> None:
    codes = image_tokenizer.encode_pixels(torch.rand(1, 3, 24, 40))
    picture = image_tokenizer.decode(Codes(codes.numpy(), "image", (3, 5)))
    assert picture.size == (40, 24)
    wide = Image.new("RGB", (50, 10), "red")
    assert image_tokenizer.encode(wide).grid_hw == (2, 2)
    squared = square(wide, 16)
    assert squared.size == (16, 16) and squared.getpixel((8, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("size", "grid_hw"), [((50, 10), (1, 4)), ((10, 50), (4, 1)), ((9, 9), (2, 2)), ((900, 1), (1, 8))]
)
def test_a_picture_may_keep_its_shape(
    image_tokenizer: ImageTokenizer, size: tuple[int, int], grid_hw: tuple[int, int]
) -> None:
    codes = image_tokenizer.encode(Image.new("RGB", size, "red"), keep_aspect=True)
    assert codes.grid_hw == grid_hw
    assert image_tokenizer.decode(codes).size == (8 * grid_hw[1], 8 * grid_hw[0])


def test_several_codebooks_go_through_the_whole_tokenizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = VQKDConfig(**{**CONFIG.model_dump(), "quantizer": {"num_codebooks": 2}})
    encoder = PictureEncoder(config)
    encoder.train()
    encoder(torch.rand(64, 3, 16, 16))
    head_config = PixelHeadConfig(width=16, depth=1, num_heads=2, refine_channels=0)
    tokenizer = ImageTokenizer(config, encoder, head_config, PixelHead(head_config, code_dim=8, patch_px=8))
    pixels = torch.rand(5, 3, 16, 24)
    codes = tokenizer.encode_pixels(pixels)
    assert codes.shape == (5, 2, 6) and tokenizer.num_codebooks == 2
    assert torch.equal(codes, torch.cat([tokenizer.encode_pixels(p[None]) for p in pixels]))
    tokenizer.save(tmp_path)
    loaded = ImageTokenizer.load(tmp_path)
    assert torch.equal(loaded.encode_pixels(pixels), codes) and loaded.fingerprint == tokenizer.fingerprint
    one = tokenizer.encode(to_picture(pixels[0]))
    assert one.codes_KT.shape == (2, 4)
    coarse = Codes(one.codes_KT[:1], "image", one.grid_hw)
    assert tokenizer.decode(one).tobytes() != tokenizer.decode(coarse).tobytes(), "the second book refines the first"


def test_pixels_and_pictures_are_inverse() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8))
    assert to_picture(to_pixels(picture)).tobytes() == picture.tobytes()


def test_bad_input(image_tokenizer: ImageTokenizer) -> None:
    with pytest.raises(InputError, match="multiples of 8 px"):
        image_tokenizer.encode_pixels(torch.rand(1, 3, 15, 16))
    with pytest.raises(InputError, match="NaN"):
        image_tokenizer.encode_pixels(torch.full((1, 3, 16, 16), float("nan")))
    with pytest.raises(DataError, match="below 32"):
        image_tokenizer.decode(Codes(np.full((1, 4), 32), "image", (2, 2)))


def test_an_untrained_codebook_is_refused() -> None:
    head_config = PixelHeadConfig(width=16, depth=1, num_heads=2)
    head = PixelHead(head_config, code_dim=8, patch_px=8)
    with pytest.raises(CheckpointError, match="no codebook yet"):
        ImageTokenizer(CONFIG, PictureEncoder(CONFIG), head_config, head)


@pytest.mark.parametrize("fault", ["missing", "kind", "shape", "junk", "field", "tensor"])
def test_broken_folders(image_tokenizer: ImageTokenizer, tmp_path: Path, fault: str) -> None:
    import json

    image_tokenizer.save(tmp_path)
    config = tmp_path / "config.json"
    facts: Any = json.loads(config.read_text())
    if fault == "missing":
        config.unlink()
    elif fault == "kind":
        config.write_text(json.dumps({**facts, "kind": "vqgan"}))
    elif fault == "shape":
        facts["vqkd"]["codebook_size"] = 64
        config.write_text(json.dumps(facts))
    elif fault == "field":
        facts["vqkd"]["colour"] = 1
        config.write_text(json.dumps(facts))
    elif fault == "junk":
        (tmp_path / "model.safetensors").write_bytes(b"junk")
    else:
        from safetensors.torch import load_file, save_file

        tensors = load_file(tmp_path / "model.safetensors")
        tensors.pop("encoder.to_code.0.weight")
        save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError):
        ImageTokenizer.load(tmp_path)


def test_vqkd_losses_are_cosine(clip_folder: Path) -> None:
    from tokenizers_mm.features import cosine_loss

    target = TeacherFeatures(torch.randn(1, 4, 24), torch.randn(1, 4, 24)).deep_BND
    assert float(cosine_loss(target * 3, target)) == pytest.approx(0.0, abs=1e-6)
    assert float(cosine_loss(-target, target)) == pytest.approx(2.0, abs=1e-6)


def test_neighbour_loss_is_the_share_of_the_way_to_another_picture() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(2, 3, 16, 16, generator=generator)
    other = picture.clone()
    other[:, :, 4:8, 8:12] += 0.5  # one area of 4 x 4 tells the two apart
    for share in (0.0, 0.25, 0.5, 1.0):
        drawn = picture + share * (other - picture)
        assert float(neighbour_loss(drawn, picture, other)) == pytest.approx(share**2, abs=0.04)
    elsewhere = picture.clone()
    elsewhere[:, :, 12:] = 0  # a large error in what they have in common
    assert float(neighbour_loss(elsewhere, picture, other)) == 0 < float(F.mse_loss(elsewhere, picture))
    assert float(neighbour_loss(other, picture, picture)) == 0, "pictures that are equal cannot be told apart"
