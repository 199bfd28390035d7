"""`recipes/encodec24k` at its full size: EnCodec's own layout, two real steps, opened by transformers alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from anygen.data.records import Record, Utterance, write_shard
from anygen.data.source import flac_of
from anygen.recipes_index import find_recipe
from anygen.stages.run import load_recipe, run_stage
from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.media import Audio

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_encodecs_own_configuration_takes_two_real_steps(tmp_path: Path) -> None:
    from transformers import EncodecConfig, EncodecModel

    (tmp_path / "data").mkdir()
    random = np.random.default_rng(0)
    for split in ("train", "validation"):
        sound = flac_of(Audio((0.1 * random.normal(size=12_000)).astype(np.float32), 16_000))
        records = [Record(f"r{i}", captions=("x",), utterances=(Utterance("x", "v", sound),)) for i in range(2)]
        write_shard(tmp_path / "data" / f"{split}-00000.tar", records)
    (tmp_path / "data" / "stage.json").write_text(json.dumps({"identity": "data"}))
    overrides = ["batch_size=2", "crop_s=0.5", "steps_without_quantiser=1", "min_spread=0"]
    overrides += [f"loop.{field}" for field in ("steps=2", "log_every=1", "device=cpu")]
    result = run_stage(load_recipe(find_recipe("encodec24k/audio_tokenizer.yaml"), overrides, root=tmp_path))
    rows = [json.loads(row) for row in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["discriminator"] > 0 for row in rows)

    model, published = EncodecModel.from_pretrained(result.outputs[0]), EncodecConfig()
    assert list(model.config.upsampling_ratios) == list(published.upsampling_ratios)
    for field in ("num_filters", "hidden_size", "num_lstm_layers", "use_causal_conv", "norm_type"):
        assert getattr(model.config, field) == getattr(published, field), field
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in EncodecModel(published).parameters())
    tokenizer = AudioTokenizer.load(result.outputs[0])
    sound = (0.1 * random.normal(size=7000)).astype(np.float32)
    codes = tokenizer.encode((sound, 24_000))
    assert codes.codes_KT.shape == (8, 22)
    plain = model.encode(torch.from_numpy(sound)[None, None], bandwidth=max(model.config.target_bandwidths))
    assert np.array_equal(codes.codes_KT, plain.audio_codes[0, 0].numpy())
    wave = model.decode(plain.audio_codes, plain.audio_scales).audio_values[0, 0, :7000].detach().numpy()
    assert np.allclose(tokenizer.decode(codes).samples_T, wave.clip(-1, 1), atol=1e-6)
