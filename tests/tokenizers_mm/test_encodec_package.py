"""Checkpoints of the `encodec` package: the converted folder gives the package's own codes and waveforms."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tokenizers_mm.audio import AudioTokenizer
from tokenizers_mm.encodec_package import convert, renamed
from tokenizers_mm.errors import CheckpointError

ROOT = Path(__file__).parents[2]


def package_state(*, is_48khz: bool) -> dict[str, torch.Tensor]:
    """A narrow model's tensors under the package's names, made from transformers' by the inverse of the renaming."""
    from transformers import EncodecConfig, EncodecModel

    from tokenizers_mm.encodec_package import _LAYOUTS

    torch.manual_seed(0)
    model = EncodecModel(EncodecConfig(**_LAYOUTS[is_48khz], num_filters=4, hidden_size=8))
    state = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[0]
        old = name.replace(".parametrizations.weight.original0", ".weight_g")
        old = old.replace(".parametrizations.weight.original1", ".weight_v")
        if part == "quantizer":
            old = old.replace("quantizer.layers.", "quantizer.vq.layers.").replace(".codebook.", "._codebook.")
        else:
            old = old.replace(f"{part}.layers.", f"{part}.model.")
            is_up = part == "decoder" and tensor.ndim and _is_transposed(model, name)
            kind = "convtr" if is_up else "conv"
            old = old.replace(".conv.", f".{kind}.{kind}.").replace(".norm.", f".{kind}.norm.")
        state[old] = torch.randn(tensor.shape) if tensor.is_floating_point() else tensor
    return state


def _is_transposed(model: Any, name: str) -> bool:
    index = int(name.split(".")[2])
    return type(model.decoder.layers[index]).__name__ == "EncodecConvTranspose1d"


@pytest.mark.parametrize("is_48khz", [False, True])
def test_every_tensor_finds_its_place(tmp_path: Path, is_48khz: bool) -> None:
    from transformers import EncodecModel

    state = package_state(is_48khz=is_48khz)
    torch.save(state, tmp_path / "x.th")
    convert(tmp_path / "x.th", tmp_path / "out")
    found = EncodecModel.from_pretrained(tmp_path / "out").state_dict()
    assert len(found) == len(state)
    for name, tensor in state.items():
        assert torch.equal(found[renamed(name)], tensor), name
    tokenizer = AudioTokenizer.load(tmp_path / "out")
    assert (tokenizer.num_codebooks, tokenizer.sample_rate_hz) == ((16, 48_000) if is_48khz else (32, 24_000))


@pytest.fixture
def encodec(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package; torchaudio, of which it needs one name here, is put in its place while it is imported."""
    if importlib.util.find_spec("encodec") is None:
        pytest.skip("the package encodec is not installed: pip install --no-deps encodec")
    try:
        import encodec
    except (ImportError, OSError):
        fake, transforms = types.ModuleType("torchaudio"), types.ModuleType("torchaudio.transforms")
        fake.transforms, transforms.Spectrogram = transforms, object  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchaudio", fake)
        monkeypatch.setitem(sys.modules, "torchaudio.transforms", transforms)
        import encodec
    return encodec


@pytest.mark.parametrize("name", ["encodec_model_24khz", "encodec_model_48khz"])
def test_codes_and_waveforms_are_the_packages(encodec: Any, tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    theirs = getattr(encodec.EncodecModel, name)(pretrained=False).eval()
    with torch.no_grad():
        for layer in theirs.quantizer.vq.layers:
            layer._codebook.embed.copy_(0.1 * torch.randn(layer._codebook.embed.shape))
    torch.save(theirs.state_dict(), tmp_path / "x.th")
    convert(tmp_path / "x.th", tmp_path / "out")
    ours = AudioTokenizer.load(tmp_path / "out", num_codebooks=4)
    theirs.set_target_bandwidth(3.0 if name.endswith("24khz") else 6.0)
    length = 2 * theirs.sample_rate + 777
    sound = (0.1 * np.random.default_rng(0).normal(size=length)).astype(np.float32)
    wave = torch.from_numpy(sound).expand(1, theirs.channels, -1)
    with torch.no_grad():
        frames = theirs.encode(wave)
        back = theirs.decode(frames)[0].mean(0)[:length]
    codes = ours.encode((sound, theirs.sample_rate))
    assert np.array_equal(codes.codes_KT, torch.cat([codes for codes, _ in frames], dim=-1)[0].numpy())
    np.testing.assert_allclose(ours.decode(codes).samples_T, back.clamp(-1, 1).numpy(), atol=1e-4)


def test_what_is_not_such_a_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.th").write_text("no")
    torch.save([1, 2], tmp_path / "list.th")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.th")
    half = package_state(is_48khz=False)
    half.pop("encoder.model.0.conv.conv.bias")
    torch.save(half, tmp_path / "half.th")
    for name, match in (
        ("missing.th", "cannot read a state dict.*No such file"),
        ("text.th", "cannot read a state dict.*not a file of tensors alone$"),
        ("list.th", "holds no state dict"),
        ("other.th", "is not a model of the encodec package"),
        ("half.th", r"not a whole model .*encoder\.layers\.0\.conv\.bias"),
    ):
        with pytest.raises(CheckpointError, match=match):
            convert(tmp_path / name, tmp_path / "out")
    program = [sys.executable, "-m", "tokenizers_mm.encodec_package", str(tmp_path / "text.th"), str(tmp_path / "out")]
    result = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (
        result.returncode == 1 and result.stderr.startswith("error: cannot read") and "Traceback" not in result.stderr
    )
    assert not (tmp_path / "out").exists()
