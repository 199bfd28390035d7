"""Teachers: every family in its published layout gives what plain transformers gives, on any grid, or a typed refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from tokenizers_mm.errors import CheckpointError, ConfigError
from tokenizers_mm.teacher import TeacherConfig, VisionTeacher

WIDTH, LAYERS, PATCH = 24, 3, 14
TINY = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
VIT = {**TINY, "intermediate_size": 48, "image_size": 2 * PATCH, "patch_size": PATCH}
DINO = {**TINY, "mlp_ratio": 2, "image_size": 2 * PATCH, "patch_size": PATCH}
BIASED = {**VIT, "use_relative_position_bias": True}
TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPENAI = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5] * 3, [0.5] * 3)


@dataclass(frozen=True)
class Family:
    make: Callable[[], Any]
    extra: int
    """Tokens before the patches."""
    norm: tuple[list[float], list[float]] = HALF
    interpolates: bool = True
    """Takes interpolate_pos_encoding."""
    fixed: bool = False
    published: type[Any] | None = None
    """Where the tower is part of what is published: opened with its own class as the reference."""
    more: dict[str, Any] = field(default_factory=dict)


def clip_like(model: Any, config: Any) -> Callable[[], Any]:
    return lambda: model(config(text_config=TEXT, vision_config=VIT, projection_dim=8))


FAMILIES: dict[str, Family] = {
    "clip": Family(clip_like(hf.CLIPModel, hf.CLIPConfig), 1, OPENAI),
    "clip-vision": Family(lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**VIT)), 1, OPENAI),
    "clip-vision-projection": Family(
        lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**VIT, projection_dim=8)), 1, OPENAI
    ),
    "metaclip2": Family(clip_like(hf.MetaClip2Model, hf.MetaClip2Config), 1, OPENAI),
    "altclip": Family(clip_like(hf.AltCLIPModel, hf.AltCLIPConfig), 1, OPENAI),
    "chinese-clip": Family(clip_like(hf.ChineseCLIPModel, hf.ChineseCLIPConfig), 1, OPENAI),
    "siglip": Family(lambda: hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config=VIT)), 0),
    "siglip-vision": Family(lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VIT)), 0),
    "siglip2-naflex": Family(
        lambda: hf.Siglip2Model(
            hf.Siglip2Config(
                text_config=TEXT,
                vision_config={**TINY, "intermediate_size": 48, "patch_size": PATCH, "num_patches": 4},
            )
        ),
        0,
        interpolates=False,
    ),
    "dinov2": Family(lambda: hf.Dinov2Model(hf.Dinov2Config(**DINO)), 1, IMAGENET, interpolates=False),
    "dinov2-registers": Family(
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=4)),
        5,
        IMAGENET,
        interpolates=False,
    ),
    "dinov3": Family(
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**VIT, num_register_tokens=4)), 5, IMAGENET, interpolates=False
    ),
    "mlcd": Family(
        lambda: hf.MLCDVisionModel(hf.MLCDVisionConfig(**VIT, num_key_value_groups=1)), 1, OPENAI, interpolates=False
    ),
    "aimv2": Family(clip_like(hf.Aimv2Model, hf.Aimv2Config), 0, OPENAI, interpolates=False, fixed=True),
    "aimv2-native": Family(
        lambda: hf.Aimv2VisionModel(hf.Aimv2VisionConfig(**VIT, is_native=True)), 0, OPENAI, interpolates=False
    ),
    "vit": Family(lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)), 1, published=hf.ViTModel),
    "dino": Family(lambda: hf.ViTModel(hf.ViTConfig(**VIT), add_pooling_layer=False), 1, IMAGENET),
    "vit-msn": Family(lambda: hf.ViTMSNModel(hf.ViTMSNConfig(**VIT)), 1, IMAGENET),
    "vit-mae": Family(
        lambda: hf.ViTMAEForPreTraining(
            hf.ViTMAEConfig(**VIT, decoder_hidden_size=24, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
        ),
        1,
        IMAGENET,
        published=hf.ViTMAEModel,
    ),
    "deit": Family(lambda: hf.DeiTModel(hf.DeiTConfig(**VIT)), 2, IMAGENET),
    "beit": Family(lambda: hf.BeitForImageClassification(hf.BeitConfig(**BIASED)), 1, published=hf.BeitModel),
    "data2vec": Family(lambda: hf.Data2VecVisionModel(hf.Data2VecVisionConfig(**BIASED)), 1),
    "ijepa": Family(lambda: hf.IJepaModel(hf.IJepaConfig(**VIT)), 0, IMAGENET),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


def fill(model: torch.nn.Module) -> None:
    """Random numbers where a fresh model has zeros: class tokens, positions and biases must count."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def save(model: Any, folder: Path, norm: tuple[list[float], list[float]] = HALF) -> Path:
    model.save_pretrained(folder)
    facts = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    facts |= {"image_mean": norm[0], "image_std": norm[1], "size": {"height": 28, "width": 28}}
    (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = FAMILIES[name].make()
            fill(model)
            made[name] = save(model, tmp_path_factory.mktemp(name), FAMILIES[name].norm)
        return made[name]

    return folder_of


def pictures(height: int, width: int) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def reference(name: str, folder: Path, pixels: Tensor) -> tuple[Any, list[Tensor]]:
    """The published model and its patch tokens of every layer, by a plain call."""
    family = FAMILIES[name]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in family.norm)
    if family.published is None:
        model = family.make().from_pretrained(folder)
    else:
        model = family.published.from_pretrained(folder)
    tower = getattr(model.eval(), "vision_model", model)
    values, more = (pixels - mean) / std, dict[str, Any]()
    grid = (pixels.shape[2] // PATCH, pixels.shape[3] // PATCH)
    if name == "vit-mae":
        tower.config.mask_ratio = 0.0
        more["noise"] = torch.linspace(0, 1, grid[0] * grid[1]).expand(len(pixels), -1)
    if name == "siglip2-naflex":
        values = torch.stack([torch.from_numpy(convert_image_to_patches(v.numpy(), PATCH)) for v in values])
        more = {"spatial_shapes": torch.tensor([grid] * 2), "pixel_attention_mask": torch.ones(values.shape[:2])}
        more["pixel_attention_mask"] = more["pixel_attention_mask"].long()
    if family.interpolates:
        more["interpolate_pos_encoding"] = grid != (2, 2)
    with torch.no_grad():
        states = tower(values, output_hidden_states=True, **more).hidden_states
    assert states[0].shape[1] == grid[0] * grid[1] + family.extra
    return model, [state[:, family.extra :] for state in states]


def close(found: Tensor, states: Tensor) -> bool:
    """Equal to these states after the normalisation, which is not LayerNorm's own here."""
    expected = (states - states.mean(-1, keepdim=True)) / (states.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return found.shape == expected.shape and bool((found - expected).abs().max() < 1e-4)


# -- what every family does


@every_family
def test_features_are_those_of_the_plain_model(name: str, folders: Callable[[str], Path]) -> None:
    teacher = VisionTeacher.open(TeacherConfig(path=folders(name)))
    pixels = pictures(28, 28)
    _, states = reference(name, folders(name), pixels)
    features = teacher(pixels)
    assert features.deep_BND.shape == features.shallow_BND.shape == (2, 4, WIDTH)
    assert close(features.shallow_BND, states[1]) and close(features.deep_BND, states[-1])
    assert not close(features.shallow_BND, states[2]), "layers differ"
    assert (teacher.num_layers, teacher.patch_px, teacher.width) == (LAYERS, PATCH, WIDTH)
    other = VisionTeacher.open(TeacherConfig(path=folders(name), deep_layer=2, shallow_layer=-4))(pixels)
    assert close(other.deep_BND, states[2]) and close(other.shallow_BND, states[0])


@every_family
@pytest.mark.parametrize("grid_hw", [(3, 3), (2, 4)])
def test_pixels_are_resized_to_the_students_grid(
    name: str, grid_hw: tuple[int, int], folders: Callable[[str], Path]
) -> None:
    teacher = VisionTeacher.open(TeacherConfig(path=folders(name)))
    pixels = pictures(grid_hw[0] * 8, grid_hw[1] * 8)
    if FAMILIES[name].fixed:
        with pytest.raises(ConfigError, match=r"reads pictures of \(28, 28\) px only, got .*: set resize=features"):
            teacher(pixels, grid_hw)
        return
    size = (grid_hw[0] * PATCH, grid_hw[1] * PATCH)
    resized = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
    _, states = reference(name, folders(name), resized)
    features = teacher(pixels, grid_hw)
    assert close(features.deep_BND, states[-1]) and close(features.shallow_BND, states[1])


@every_family
@pytest.mark.parametrize("grid_hw", [(3, 3), (2, 4), (1, 1)])
def test_features_are_resized_to_the_students_grid(
    name: str, grid_hw: tuple[int, int], folders: Callable[[str], Path]
) -> None:
    teacher = VisionTeacher.open(TeacherConfig(path=folders(name), resize="features"))
    pixels = pictures(24, 32)
    _, states = reference(
        name, folders(name), F.interpolate(pixels, (28, 28), mode="bicubic", antialias=True).clamp(0, 1)
    )
    map_BDHW = states[1].transpose(1, 2).reshape(2, WIDTH, 2, 2)
    map_BDHW = F.interpolate(map_BDHW, grid_hw, mode="bilinear", antialias=True)
    features = teacher(pixels, grid_hw)
    assert close(features.shallow_BND, map_BDHW.flatten(2).transpose(1, 2))
    assert features.deep_BND.shape == (2, grid_hw[0] * grid_hw[1], WIDTH)


@every_family
@pytest.mark.parametrize("resize", ["pixels", "features"])
def test_perceptual_features_have_gradients_to_the_pixels_alone(
    name: str, resize: Any, folders: Callable[[str], Path]
) -> None:
    teacher = VisionTeacher.open(TeacherConfig(path=folders(name), resize=resize))
    grid_hw = (2, 2) if FAMILIES[name].fixed else (3, 2)
    pixels = pictures(24, 16).requires_grad_(True)
    features = teacher.differentiable(pixels, grid_hw)
    assert torch.equal(features, teacher(pixels, grid_hw).shallow_BND)
    assert not teacher(pixels, grid_hw).shallow_BND.requires_grad
    features[0, :, 0].sum().backward()
    assert pixels.grad is not None and pixels.grad[0].abs().sum() > 0 and pixels.grad[1].abs().sum() == 0
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@every_family
def test_neither_opening_nor_looking_touches_the_global_randomness(name: str, folders: Callable[[str], Path]) -> None:
    folder = folders(name)
    state = torch.get_rng_state()
    teacher = VisionTeacher.open(TeacherConfig(path=folder))
    pixels = pictures(28, 28)
    first = teacher(pixels)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(teacher(pixels).deep_BND, first.deep_BND)
    assert (teacher(pixels[1:]).deep_BND - first.deep_BND[1:]).abs().max() < 1e-5, "alone as in a batch"


# -- CLIP's projection


@pytest.mark.parametrize("name", ["clip", "clip-vision-projection", "metaclip2", "altclip", "chinese-clip"])
def test_projected_is_the_final_norm_and_the_projection_of_every_patch(
    name: str, folders: Callable[[str], Path]
) -> None:
    teacher = VisionTeacher.open(TeacherConfig(path=folders(name), projected=True))
    pixels = pictures(28, 28)
    model, states = reference(name, folders(name), pixels)
    features = teacher(pixels)
    with torch.no_grad():
        projected = model.visual_projection(model.vision_model.post_layernorm(states[-1]))
    assert close(features.deep_BND, projected) and close(features.shallow_BND, states[1])
    assert (teacher.deep_width, teacher.shallow_width, teacher.width) == (8, WIDTH, 8)


@pytest.mark.parametrize("name", ["clip-vision", "siglip", "dinov2", "aimv2", "vit"])
def test_projected_without_a_projection_is_refused(name: str, folders: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"post_layernorm and visual_projection; \w+ in .* set projected=false"):
        VisionTeacher.open(TeacherConfig(path=folders(name), projected=True))


# -- sizes, normalisation, precision, layouts


def test_grid_and_size_defaults(folders: Callable[[str], Path]) -> None:
    teacher = VisionTeacher.from_pretrained(folders("clip"), shallow_layer=1)
    assert teacher(pictures(28, 28)).deep_BND.shape[1] == 4
    assert teacher(pictures(28, 56)).deep_BND.shape[1] == 8
    assert teacher(pictures(30, 55)).deep_BND.shape[1] == 2 * 3
    with pytest.raises(ConfigError, match="hold no patch of 14 px: say grid_hw"):
        teacher(pictures(8, 8))
    assert teacher.description.startswith("CLIPModel in ")


def test_the_native_side_can_be_set(folders: Callable[[str], Path]) -> None:
    config = TeacherConfig(path=folders("dinov2"), resize="features", native_side_px=42)
    pixels = pictures(42, 42)
    _, states = reference("dinov2", folders("dinov2"), pixels)
    assert close(VisionTeacher.open(config)(pixels, (3, 3)).deep_BND, states[-1])


def test_a_picture_that_does_not_fill_its_patches_is_read_as_published(tmp_path: Path) -> None:
    """SigLIP so400m: 384 px and patches of 14 are 27 x 27, the last 6 px unseen."""
    model = hf.SiglipVisionModel(hf.SiglipVisionConfig(**{**VIT, "image_size": 30}))
    fill(model)
    teacher = VisionTeacher.open(TeacherConfig(path=save(model, tmp_path), resize="features"))
    pixels = pictures(30, 30)
    with torch.no_grad():
        states = model.eval()((pixels - 0.5) / 0.5, output_hidden_states=True).hidden_states
    assert close(teacher(pixels, (2, 2)).deep_BND, states[-1])


def test_normalisation_is_the_checkpoints_own(folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders("clip"), tmp_path / "raw")
    facts = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**facts, "do_normalize": False}))
    raw = VisionTeacher.open(TeacherConfig(path=folder))
    own = VisionTeacher.open(TeacherConfig(path=folders("clip")))
    pixels = pictures(28, 28)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in OPENAI)
    assert (raw((pixels - mean) / std).deep_BND - own(pixels).deep_BND).abs().max() < 1e-5
    assert (raw(pixels).deep_BND - own(pixels).deep_BND).abs().max() > 1e-2


@pytest.mark.parametrize("resize", ["pixels", "features"])
def test_features_are_fp32_under_autocast(resize: Any, folders: Callable[[str], Path]) -> None:
    teacher = VisionTeacher.open(TeacherConfig(path=folders("clip"), projected=True, resize=resize))
    exact = teacher(pictures(42, 42), (3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        features = teacher(pictures(42, 42), (3, 3))
        perceptual = teacher.differentiable(pictures(42, 42), (3, 3))
    assert features.deep_BND.dtype == features.shallow_BND.dtype == perceptual.dtype == torch.float32
    assert (features.deep_BND - exact.deep_BND).abs().mean() < 0.1


def test_a_vision_model_saved_with_a_prefix_opens_as_without(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """As transformers 4 wrote CLIPVisionModel, and as most published folders still are."""
    folder = shutil.copytree(folders("clip-vision"), tmp_path / "old")
    tensors = load_file(folder / "model.safetensors")
    assert not any(key.startswith("vision_model.") for key in tensors)
    save_file(
        {f"vision_model.{key}": tensor for key, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    pixels = pictures(28, 28)
    old = VisionTeacher.open(TeacherConfig(path=folder))(pixels)
    new = VisionTeacher.open(TeacherConfig(path=folders("clip-vision")))(pixels)
    assert torch.equal(old.deep_BND, new.deep_BND)


# -- refusals


@pytest.mark.parametrize("field", ["shallow_layer", "deep_layer"])
@pytest.mark.parametrize("layer", [LAYERS + 1, -LAYERS - 2])
def test_layers_out_of_range(field: str, layer: int, folders: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=rf"{field}={layer}: .* hidden states 0 to 3, or -1 \(the last\) to -4"):
        VisionTeacher.open(TeacherConfig.model_validate({"path": folders("clip"), field: layer}))


def test_sizes_that_cannot_be(folders: Callable[[str], Path]) -> None:
    def open_as(name: str, **more: Any) -> None:
        VisionTeacher.open(TeacherConfig(path=folders(name), **more))

    with pytest.raises(ConfigError, match="no effect with resize=pixels"):
        open_as("clip", native_side_px=28)
    with pytest.raises(ConfigError, match=r"reads pictures of \(28, 28\) px only"):
        open_as("aimv2", native_side_px=42, resize="features")
    with pytest.raises(ConfigError, match="less than one patch of 14 px"):
        open_as("clip", native_side_px=13, resize="features")
    with pytest.raises(ConfigError, match="no path"):
        VisionTeacher.open(TeacherConfig())


def others() -> dict[str, tuple[Callable[[], Any], str]]:
    small = {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
    bert = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8}
    return {
        "yolos": (
            lambda: hf.YolosModel(hf.YolosConfig(**{**VIT, "image_size": [28, 28]}, num_detection_tokens=3)),
            "are tokens .*behind all extra tokens",
        ),
        "swin": (
            lambda: hf.SwinModel(hf.SwinConfig(image_size=32, window_size=2, **small)),
            "SwinModel in .* hierarchical",
        ),
        "convnext": (
            lambda: hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=[8] * 4, depths=[1] * 4, image_size=32)),
            "hierarchical",
        ),
        "mobilevit": (
            lambda: hf.MobileViTModel(
                hf.MobileViTConfig(
                    image_size=32, hidden_sizes=[8] * 3, neck_hidden_sizes=[8] * 7, num_attention_heads=2
                )
            ),
            "hierarchical or convolutional",
        ),
        "resnet": (
            lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])),
            "ResNetModel, which has no patches",
        ),
        "bert": (
            lambda: hf.BertModel(hf.BertConfig(**bert, num_hidden_layers=1, num_attention_heads=2)),
            "BertModel, which has no patches",
        ),
        "spectrogram": (
            lambda: hf.ASTModel(hf.ASTConfig(**TINY, intermediate_size=8, max_length=32)),
            "cannot read a picture",
        ),
    }


@pytest.mark.parametrize("name", others())
def test_other_models_are_refused(name: str, tmp_path: Path) -> None:
    make, message = others()[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save(make(), tmp_path)
    with pytest.raises(CheckpointError, match=message):
        VisionTeacher.open(TeacherConfig(path=tmp_path))


@pytest.mark.parametrize(
    "fault", ["absent", "empty", "no-weights", "junk", "no-processor", "std", "code", "tensor", "pickle"]
)
def test_broken_folders(fault: str, folders: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders("dinov2"), tmp_path / "broken")
    config, weights, processor = (folder / n for n in ("config.json", "model.safetensors", "preprocessor_config.json"))
    message = "no usable vision model"
    if fault == "absent":
        shutil.rmtree(folder)
        message = "there is no folder"
    elif fault == "empty":
        for file in folder.iterdir():
            file.unlink()
    elif fault == "no-weights":
        weights.unlink()
    elif fault == "pickle":
        weights.rename(folder / "pytorch_model.bin")
    elif fault == "junk":
        weights.write_bytes(b"junk")
    elif fault == "no-processor":
        processor.unlink()
    elif fault == "std":
        processor.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5, 0.0, 0.5]}))
    elif fault == "code":  # as EVA-CLIP is published: a model type that transformers lacks, and code of its own
        facts = json.loads(config.read_text())
        config.write_text(json.dumps({**facts, "model_type": "eva", "auto_map": {"AutoConfig": "eva.Config"}}))
        (folder / "eva.py").write_text("raise SystemExit('this code ran')")
    else:
        tensors = load_file(weights)
        tensors.pop("encoder.layer.1.norm1.weight")
        save_file(tensors, weights, metadata={"format": "pt"})
        message = "lacks 1 tensors of a Dinov2Model, encoder.layer.1.norm1.weight the first"
    with pytest.raises(ConfigError if fault == "absent" else CheckpointError, match=message):
        VisionTeacher.open(TeacherConfig(path=folder))


def test_a_token_too_few_is_an_error(folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = VisionTeacher.open(TeacherConfig(path=folders("vit-mae")))
    monkeypatch.setattr(teacher.tower.tower.config, "mask_ratio", 0.5)
    with pytest.raises(CheckpointError, match="has 3 tokens, expected 5 for 28 x 28 px"):
        teacher(pictures(28, 28))
