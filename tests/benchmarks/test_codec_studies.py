"""The studies of sound tokenizers: every variant is a recipe, the table says what was measured, exchanges are exact."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # as where the scripts run
import codec_options

from anygen.data.emoji_pictures import FONT_PATHS


@pytest.mark.parametrize("variant", codec_options.VARIANTS)
def test_every_variant_is_one_change(variant: str, tmp_path: Path) -> None:
    plain, config = (codec_options.recipe_of(name, tmp_path, 200).model_dump() for name in ("as it is", variant))
    flat: list[dict[str, Any]] = []
    for dump in (plain, config):
        flat.append({f"{k}.{n}": v for k, part in dump.items() if isinstance(part, dict) for n, v in part.items()})
        flat[-1] |= {k: v for k, v in dump.items() if not isinstance(v, dict)}
    changed = {name for name in flat[0] if flat[0][name] != flat[1][name]}
    asked = set(codec_options.VARIANTS[variant])
    assert {name.split(".")[0] for name in changed} == {name.split(".")[0] for name in asked}


def test_the_table_says_what_was_measured() -> None:
    def figures(group: str, estoi: float) -> list[dict[str, Any]]:
        names = [(f"{group}, first {n} of 4", estoi - 0.1 / n) for n in (1, 2)] + [(group, estoi)]
        books = [{"name": "codes used", "group": f"{group}, codebook {k}", "value": k / 10} for k in (3, 1, 2, 4)]
        return [{"name": "ESTOI", "group": g, "value": v} for g, v in names] + books

    results = {"x": {"seconds_per_step": 0.251, "figures": figures("held out", 0.5) + figures("unheard: v", 0.4)}}
    row = codec_options.table(results, 7).splitlines()[-1]
    assert row.startswith("| x | 0.25 s | held out: ESTOI 0.40 0.45 0.50, PESQ nan nan nan, codes used 10% |")
    assert "unheard: v: ESTOI 0.30 0.35 0.40" in row


def test_a_sound_with_its_own_magnitudes_and_phases_is_itself() -> None:
    pytest.importorskip("pesq", reason="needs a C compiler to install")
    import codec_limits

    sound = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(0))
    other = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(codec_limits.exchanged(sound, sound), sound, atol=1e-5)
    assert torch.allclose(codec_limits.exchanged(0.5 * sound, sound), 0.5 * sound, atol=1e-5)
    assert (codec_limits.exchanged(other, sound) - sound).norm() > 0.3 * sound.norm()


def test_leading_codebooks_are_decoded_and_the_other_names_are_others() -> None:
    pytest.importorskip("pystoi", reason="the extra [eval] is not installed")
    if not any(path.is_file() for path in FONT_PATHS):
        pytest.skip("needs the Debian package fonts-noto-color-emoji")
    import leading_codebooks

    from anygen.bundle import default_bundle
    from anygen.evaluation.emoji import RealEmoji
    from tokenizers_mm.audio import AudioTokenizer
    from tokenizers_mm.media import Audio

    codec = AudioTokenizer.load(default_bundle() / "tokenizers" / "audio")
    sound = Audio(0.1 * torch.randn(5000, generator=torch.Generator().manual_seed(0)).numpy(), 16_000)
    both, one = (leading_codebooks.decoded(codec, sound, books).samples_T for books in (2, 1))
    assert both.shape == one.shape == (5000,) and (both == codec.decode(codec.encode(sound)).samples_T).all()
    assert not (both == one).all()
    groups = leading_codebooks.names_of(RealEmoji(64), 50)
    assert [len(set(items)) for items in groups.values()] == [50] * 4
    for name in ("training names", "held-out names"):
        assert not set(groups[name]) & set(groups[f"other {name}"])
