"""Pretrained pipelines in miniature: random weights, the published layout, no tokenizer, no text encoder, no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SMALL = {"attention_head_dim": 4, "num_attention_heads": 2, "num_layers": 1, "sample_size": 8}


def _vae(**changed: Any) -> Any:
    from diffusers import AutoencoderKL

    facts: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    return AutoencoderKL(**(facts | changed))


def _unet(**changed: Any) -> Any:
    from diffusers import UNet2DConditionModel

    facts: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(facts | changed))


def _tokenizer() -> Any:
    import tokenizers as library
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "cat", "dog"]
    made = library.Tokenizer(models.WordLevel({word: id for id, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=77, **names)


def _clip_text(*, width: int = 12, projection: int | None = None) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=8, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, bos_token_id=1, eos_token_id=1, pad_token_id=0, projection_dim=projection or 12,
    )  # fmt: skip
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=8, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2))


def stable_diffusion(prediction_type: str = "epsilon", text: bool = False) -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1, prediction_type=prediction_type
    )
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip_text() if text else None,
        tokenizer=_tokenizer() if text else None,
        unet=_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(text: bool = False) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 6 * 4 + 10,
        "transformer_layers_per_block": (1, 1),
    }
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=_clip_text(width=4) if text else None,
        text_encoder_2=_clip_text(width=8, projection=10) if text else None,
        tokenizer=_tokenizer() if text else None,
        tokenizer_2=_tokenizer() if text else None,
        unet=_unet(**added),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    )


def stable_diffusion_3(text: bool = False) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    sizes = SMALL | {"joint_attention_dim": 12, "caption_projection_dim": 8, "pooled_projection_dim": 10}
    transformer = SD3Transformer2DModel(patch_size=1, in_channels=4, out_channels=4, **sizes)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(shift_factor=0.06),
        text_encoder=_clip_text(width=4, projection=4) if text else None,
        text_encoder_2=_clip_text(width=8, projection=6) if text else None,
        text_encoder_3=_t5() if text else None,
        tokenizer=_tokenizer() if text else None,
        tokenizer_2=_tokenizer() if text else None,
        tokenizer_3=_tokenizer() if text else None,
    )


def pixart_sigma(text: bool = False) -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    sizes = SMALL | {"caption_channels": 12, "cross_attention_dim": 8}
    transformer = PixArtTransformer2DModel(
        in_channels=4, out_channels=8, patch_size=2, use_additional_conditions=False, **sizes
    )
    return PixArtSigmaPipeline(
        tokenizer=_tokenizer() if text else None,
        text_encoder=_t5() if text else None,
        vae=_vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def sana() -> Any:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=12, sample_size=16,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, num_train_timesteps=1000
    )
    return SanaPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)


def audioldm2() -> Any:
    from diffusers import AudioLDM2Pipeline, AudioLDM2UNet2DConditionModel, DDIMScheduler
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    unet = AudioLDM2UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=[[None, 10, None, 12]] * 2,
    )  # fmt: skip
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=8, sampling_rate=16_000, upsample_initial_channel=8, upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1]], normalize_before=False,
        )
    )  # fmt: skip
    nothing = (
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "language_model",
        "projection_model",
        "feature_extractor",
    )
    return AudioLDM2Pipeline(
        vae=_vae(in_channels=1, out_channels=1),
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        vocoder=vocoder,
        **dict.fromkeys(nothing),
    )


KINDS: dict[str, Callable[[], Any]] = {
    "sd": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "pixart": pixart_sigma,
    "sana": sana,
    "audioldm2": audioldm2,
}


def save(kind: str, folder: Path, **options: Any) -> Path:
    """A pipeline of this kind in the published layout; its weights depend on nothing but the kind."""
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, kind)))
        pipeline = KINDS[kind](**options)
        for name in {"transformer", "vocoder"} & set(pipeline.components):
            for parameter in pipeline.components[name].parameters():  # some outputs begin at zero, or next to it
                parameter.data.add_(torch.randn_like(parameter) * (0.3 if name == "vocoder" else 0.1))
    pipeline.save_pretrained(folder)
    return folder
