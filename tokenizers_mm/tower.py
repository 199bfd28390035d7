"""Any `transformers` vision model with patch tokens, opened from disk: pictures to the tokens of every layer.

Which of a model's tokens are its patches is measured when it is opened, not assumed: a white patch is moved through a
black picture, and the patch embedding must answer at the place of that patch, row by row behind all extra tokens.

Families opened in the published layout by the tests (extra tokens before the patches; what other sizes need):

| model | extra tokens | other sizes |
|---|---|---|
| CLIP (with and without text tower or projection), MetaCLIP 2, AltCLIP, Chinese CLIP | class | interpolated positions |
| SigLIP, and SigLIP 2 of fixed resolution | none | interpolated positions |
| SigLIP 2 NaFlex | none | interpolated by the model; it is given patches |
| DINOv2; with registers | class; class, 4 registers | interpolated by the model |
| DINOv3 (also an EVA-like ViT: rotary positions) | class, 4 registers | rotary |
| MLCD | class | rotary |
| AIMv2 native; with learned positions | none | sines; native size only |
| ViT and DINO, ViT-MSN, ViT-MAE (unmasked), BEiT, data2vec | class | interpolated positions and biases |
| DeiT; I-JEPA | class, distillation; none | interpolated positions |

`transformers` has no class for EVA or EVA-02: their checkpoints bring code of their own and are refused. EVA-CLIP
converted to CLIP's layout opens as CLIP. Hierarchical models (Swin, ConvNeXt, Hiera) and those whose extra tokens come
last (YOLOS) are refused.

In every family above the last hidden state is the residual stream *before* the final norm, and the first one what
enters layer 1: patch embedding with positions, in CLIP's family already behind `pre_layrnorm`.

Dimension key: B pictures, C colours, H x W pixels, N patches in row order, L tokens with the extra ones, D width, P
width of the projection.
"""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizers_mm import compat  # noqa: F401  before transformers
from tokenizers_mm.errors import CheckpointError, ConfigError
from tokenizers_mm.vit import to_patches
from tokenizers_mm.weights import UNREADABLE

# What a checkpoint may lack, as published ones do: parts that no hidden state passes through.
_UNUSED = ("pooler", "head.", "text_", "mask_token", "logit_")


class VisionTower(nn.Module):
    """A frozen vision model behind its own pixel normalisation.

    Attributes:
        width: of every hidden state.
        num_layers: there are this many hidden states and one, index 0, before them.
        patch_px: side of a patch.
        native_hw_px: size of the pictures it was trained on; None where the checkpoint does not say.
        any_size: False where it reads pictures of its native size only.
        projected_width: of `project`, None without one.
        description: class and folder.

    Raises:
        CheckpointError: the model returns no hidden states of patch tokens, extra tokens first.
    """

    def __init__(self, model: Any, *, mean: list[float], std: list[float], folder: Path) -> None:
        super().__init__()
        self.description = f"{type(model).__name__} in {folder}"
        tower = getattr(model, "vision_model", model)
        config: Any = tower.config
        if not hasattr(config, "patch_size"):
            raise CheckpointError(f"{folder} holds a {type(model).__name__}, which has no patches to predict")
        if hasattr(config, "depths"):  # asked before any trial: Swin keeps the window size of the first picture it sees
            raise CheckpointError(f"{self.description} is hierarchical: a teacher has a token a patch in every layer")
        if hasattr(config, "mask_ratio"):
            config.mask_ratio = 0.0
        self.tower = tower.eval().requires_grad_(False)
        self.projection = _projection(model, tower)
        self.projected_width = None if self.projection is None else int(model.visual_projection.out_features)
        self.patch_px = _pair(config.patch_size)[0]
        self.native_hw_px = _native_hw(config, self.patch_px)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self._parameters_taken = frozenset(inspect.signature(tower.forward).parameters)
        states_BLD, grid_hw = self._trial()
        self._num_extra = _count_extra(states_BLD, grid_hw, self.description)
        self.width, self.num_layers = int(states_BLD[0].shape[2]), len(states_BLD) - 1

    @classmethod
    def open(cls, folder: Path, *, with_projection: bool = False) -> VisionTower:
        """Open a checkpoint folder in transformers' layout: config.json, safetensors, preprocessor_config.json.

        Args:
            folder: of the checkpoint.
            with_projection: load CLIP's projection too, and refuse a checkpoint without one.

        Raises:
            CheckpointError: nothing readable there, or a model without a vision tower.
            ConfigError: a projection is asked for and the checkpoint has none.
        """
        if not folder.is_dir():  # transformers would look for it on a hub
            raise ConfigError(f"there is no folder {folder}: name a vision model in transformers' layout")
        try:
            model, missing = _load(folder, with_projection)
            mean, std = _normalisation(folder)
        except UNREADABLE as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"no usable vision model in {folder}: {reason}") from error
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} tensors of a {type(model).__name__}, {missing[0]} the first: "
                "they would be random"
            )
        tower = cls(model, mean=mean, std=std, folder=folder)
        if with_projection and tower.projection is None:
            raise ConfigError(
                f"projected=true needs a CLIP with post_layernorm and visual_projection; {tower.description} has "
                "no such pair: set projected=false"
            )
        return tower

    def forward(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Pixels in [0, 1] to B x N x D of every layer, the patch embedding first; gradients pass to the pixels.

        Raises:
            CheckpointError: the number of tokens is not that of the patches.
            ConfigError: the model cannot read pictures of this size.
        """
        hw_px = (pixels_BCHW.shape[2], pixels_BCHW.shape[3])
        if not self.any_size and hw_px != self.native_hw_px:
            raise ConfigError(
                f"{self.description} reads pictures of {self.native_hw_px} px only, got {hw_px}: set resize=features"
            )
        states_BLD = self._states(pixels_BCHW)
        expected = self._num_extra + math.prod(self.grid_of(hw_px))
        for layer, state_BLD in enumerate(states_BLD):
            if state_BLD.shape[1] != expected:
                raise CheckpointError(
                    f"{self.description}: hidden state {layer} has {state_BLD.shape[1]} tokens, expected {expected} "
                    f"for {hw_px[0]} x {hw_px[1]} px: it has no token a patch"
                )
        return [state_BLD[:, self._num_extra :] for state_BLD in states_BLD]

    def project(self, state_BND: Tensor) -> Tensor:
        """Patch tokens through the final norm and CLIP's projection, B x N x P, as BEiT v2 takes them."""
        assert self.projection is not None, "no projection was opened"
        return self.projection(state_BND)

    def grid_of(self, hw_px: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in a picture; what does not fill a patch is not seen."""
        return hw_px[0] // self.patch_px, hw_px[1] // self.patch_px

    def _states(self, pixels_BCHW: Tensor) -> list[Tensor]:
        pixels_BCHW = (pixels_BCHW - self.mean) / self.std
        num_pictures, _, *hw_px = pixels_BCHW.shape
        grid_hw = self.grid_of((hw_px[0], hw_px[1]))
        device, values = pixels_BCHW.device, pixels_BCHW
        more: dict[str, Any] = {}
        if "interpolate_pos_encoding" in self._parameters_taken and tuple(hw_px) != self.native_hw_px:
            more["interpolate_pos_encoding"] = True
        if "noise" in self._parameters_taken:  # ViT-MAE sorts its patches by noise, random where none is given
            more["noise"] = torch.arange(math.prod(grid_hw), device=device).expand(num_pictures, -1)
        if "spatial_shapes" in self._parameters_taken:
            values = _colours_last(to_patches(pixels_BCHW, self.patch_px))
            more["spatial_shapes"] = torch.tensor([grid_hw], device=device).expand(num_pictures, -1)
            more["pixel_attention_mask"] = torch.ones(values.shape[:2], dtype=torch.long, device=device)
        states = self.tower(values, output_hidden_states=True, **more).hidden_states
        if states is None:
            raise CheckpointError(f"{self.description} returns no hidden states")
        return list(states)

    @torch.no_grad()
    def _trial(self) -> tuple[list[Tensor], tuple[int, int]]:
        """Hidden states of the trial pictures, on a grid that is not square where the model takes one."""
        self.any_size = True
        try:
            return self._states(_trial_pictures((2, 3), self.patch_px)), (2, 3)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            self.any_size = False
            if isinstance(error, CheckpointError):
                raise
            if self.native_hw_px is None:
                raise CheckpointError(f"{self.description} cannot read a picture: {error}") from error
        grid_hw = self.grid_of(self.native_hw_px)
        pixels_BCHW = _trial_pictures(grid_hw, self.patch_px)
        padding = (0, self.native_hw_px[1] - pixels_BCHW.shape[3], 0, self.native_hw_px[0] - pixels_BCHW.shape[2])
        try:
            return self._states(nn.functional.pad(pixels_BCHW, padding)), grid_hw
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise CheckpointError(f"{self.description} cannot read a picture: {error}") from error


def _trial_pictures(grid_hw: tuple[int, int], patch_px: int) -> Tensor:
    """A black picture, one with its second patch white, one with its last."""
    patches_BNX = torch.zeros(3, math.prod(grid_hw), 3 * patch_px**2)
    patches_BNX[1, min(1, grid_hw[1] - 1)] = patches_BNX[2, -1] = 1.0
    return nn.functional.pixel_shuffle(patches_BNX.transpose(1, 2).unflatten(2, grid_hw), patch_px)


def _count_extra(states_BLD: list[Tensor], grid_hw: tuple[int, int], description: str) -> int:
    """How many tokens come before the patches, checked on the hidden states of the trial pictures."""
    shapes = {tuple(state.shape) for state in states_BLD}
    if len(shapes) > 1 or states_BLD[0].ndim != 3:
        raise CheckpointError(
            f"{description} is hierarchical or convolutional: its hidden states have the shapes {sorted(shapes)}, "
            "expected one, with a token a patch in every layer"
        )
    num_tokens, num_patches = states_BLD[0].shape[1], math.prod(grid_hw)
    first_BLD = states_BLD[0].float()
    found = (first_BLD[1:] - first_BLD[0]).norm(dim=-1).argmax(dim=1).tolist()
    num_extra = num_tokens - num_patches
    expected = [num_extra + min(1, grid_hw[1] - 1), num_tokens - 1]
    if num_extra < 0 or found != expected:
        raise CheckpointError(
            f"{description}: of {num_tokens} tokens for {num_patches} patches, patches 2 and {num_patches} are tokens "
            f"{found}, expected {expected}: patches in rows behind all extra tokens"
        )
    return num_extra


def _load(folder: Path, with_projection: bool) -> tuple[Any, list[str]]:
    """The model, and the names of the tensors that it needs and the checkpoint lacks."""
    import transformers

    here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    name = (transformers.AutoConfig.from_pretrained(folder, **here).architectures or [""])[0]
    # AutoModel opens this class without its projection
    alone = with_projection and name.endswith("VisionModelWithProjection")
    loader = getattr(transformers, name) if alone else transformers.AutoModel
    with torch.random.fork_rng(devices=[]):  # parts that the checkpoint lacks are drawn at random
        model, info = loader.from_pretrained(
            folder, **here, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    return model, sorted(key for key in info["missing_keys"] if not any(part in key for part in _UNUSED))


def _normalisation(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the model's pixels in [0, 1].

    Read directly: transformers' image processors want torchvision, only to normalise.
    """
    path = folder / "preprocessor_config.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts.get("do_normalize", True) is False:
            return [0.0] * 3, [1.0] * 3
        mean, std = ([float(value) for value in facts[key]] for key in ("image_mean", "image_std"))
        if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
            raise ValueError(f"they are {mean} and {std}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path.name} must hold image_mean and image_std, three numbers each: {type(error).__name__}: {error}"
        ) from error
    return mean, std


def _projection(model: Any, tower: Any) -> nn.Sequential | None:
    if not (hasattr(model, "visual_projection") and hasattr(tower, "post_layernorm")):
        return None
    return nn.Sequential(tower.post_layernorm, model.visual_projection).requires_grad_(False)


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _native_hw(config: Any, patch_px: int) -> tuple[int, int] | None:
    if hasattr(config, "image_size"):
        return _pair(config.image_size)
    if hasattr(config, "num_patches"):  # NaFlex: the grid of its position table
        return _pair(math.isqrt(config.num_patches) * patch_px)
    return None


def _colours_last(patches_BNX: Tensor) -> Tensor:
    """Patches of (C P P) numbers as the (P P C) that NaFlex was trained on."""
    return patches_BNX.unflatten(2, (3, -1)).transpose(2, 3).flatten(2)
