"""The decoders of pictures in the API: same seed same picture, in any batch, streamed or not; typed errors without."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin

from anygen.api import AnyGen
from anygen.drawing import noise_seed
from anygen.errors import InputError
from anygen.inspection import inspect_path
from anygen.request import Request
from anygen.results import Finished, SegmentFinished, SegmentStarted

ASKS: list[dict[str, Any]] = [
    {"text": "a red apple", "output": "image", "seed": 1},
    {"text": "a cat", "output": ("image", "text", "image"), "seed": 2, "max_new_tokens": 60},
    {"text": "two", "output": "image", "seed": 3, "guidance_scale": 3.0, "num_inference_steps": 2},
]


@pytest.fixture(scope="module")
def drawing(drawing_folder: Path) -> AnyGen:
    return AnyGen.from_pretrained(drawing_folder, device="cpu")


def pixels_of(pictures: list[Image.Image]) -> list[bytes]:
    return [picture.tobytes() for picture in pictures]


@pytest.mark.parametrize("decoder", ["diffusion", "voken"])
def test_a_picture_is_the_same_alone_in_any_batch_and_streamed(drawing: AnyGen, decoder: Any) -> None:
    requests = [Request(decoder=decoder, **ask) for ask in ASKS]
    together = drawing.generate_batch([*requests, Request(text="two", output="text", seed=5, max_new_tokens=20)])[:3]
    assert [len(output.images) for output in together] == [1, 2, 1]
    assert all(picture.size == (16, 16) and picture.mode == "RGB" for o in together for picture in o.images)
    for request, ask, output in zip(requests, ASKS, together, strict=True):
        assert pixels_of(drawing.generate_batch([request])[0].images) == pixels_of(output.images)
        events = list(drawing.stream(decoder=decoder, **ask))
        finished = [e.segment for e in events if isinstance(e, SegmentFinished) and e.segment.modality == "image"]
        assert pixels_of([segment.content for segment in finished]) == pixels_of(output.images)
        assert isinstance(events[-1], Finished) and pixels_of(events[-1].output.images) == pixels_of(output.images)
        assert [e.modality for e in events if isinstance(e, SegmentStarted)].count("image") == len(output.images)
    two = pixels_of(together[1].images)
    assert two[0] != two[1], "pictures of one answer have their own noise"


def test_steps_and_seed_matter_and_ids_do_not_depend_on_the_decoder(drawing: AnyGen) -> None:
    def make(**more: Any) -> Any:
        return drawing.generate(text="a red apple", output="image", size=16, **more).samples[0]

    plain, drawn = make(), make(decoder="diffusion")
    assert plain.ids == drawn.ids and plain.segments != drawn.segments
    assert make(decoder="diffusion", num_inference_steps=1).segments != drawn.segments
    assert make(decoder="diffusion", seed=1).segments != drawn.segments
    vokens = make(decoder="voken")
    r = drawing.bundle.vocabulary.range("voken")
    assert [id for id in vokens.ids if r.start <= id < r.stop] == list(range(r.start, r.stop))


def test_samples_of_a_call_are_those_of_its_seeds(drawing: AnyGen) -> None:
    several = drawing.generate(text="a cat", output="image", num_samples=3, seed=4, decoder="voken").images
    alone = [drawing.generate(text="a cat", output="image", seed=4 + i, decoder="voken").image for i in range(3)]
    assert pixels_of(several) == pixels_of(alone) and len(set(pixels_of(several))) == 3


def test_vokens_have_no_codes_to_be_ranked_by(drawing: AnyGen) -> None:
    with pytest.raises(InputError, match="best_of compares codes"):
        drawing.generate(text="a cat", output="image", decoder="voken", best_of=2)
    kept = drawing.generate(text="a cat", output="image", decoder="diffusion", best_of=3, temperature=3.0).samples[0]
    again = drawing.generate(text="a cat", output="image", decoder="diffusion", seed=kept.seed, temperature=3.0)
    assert pixels_of(again.images) == pixels_of(kept.of("image")), "its noise is that of its own seed"


def test_a_generator_draws_the_noise_without_being_spent_on_it() -> None:
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    seeds = [noise_seed(generator, None, place) for place in (0, 1, 0)]
    assert torch.equal(generator.get_state(), state)
    assert seeds[0] == seeds[2] != seeds[1], "samples that share a generator have their own noise"
    torch.rand(1, generator=generator)
    assert noise_seed(generator, None, 0) != seeds[0], "a generator that went on draws other noise"
    assert noise_seed(generator, 12, 3) == 12


def test_one_generator_for_several_samples(drawing: AnyGen) -> None:
    def pictures() -> list[bytes]:
        generator = torch.Generator().manual_seed(3)
        out = drawing.generate(text="a cat", output="image", num_samples=2, generator=generator, decoder="voken")
        return pixels_of(out.images)

    assert pictures() == pictures() and len(set(pictures())) == 2


def test_any_may_be_a_picture_of_vokens(drawing: AnyGen) -> None:
    outputs = drawing.generate(text="a cat", output="any", num_samples=8, decoder="voken", max_new_tokens=40)
    kinds = [segment.modality for sample in outputs.samples for segment in sample.segments]
    assert "image" in kinds, "a batch of eight holds one"
    begins = {drawing.bundle.vocabulary.control("image")}
    assert not any(begins & set(sample.ids) for sample in outputs.samples), "pictures are written as vokens"


def test_provenance_names_the_decoder(drawing: AnyGen, tmp_path: Path) -> None:
    out = drawing.generate(text="a cat", output="image", decoder="voken", num_inference_steps=3)
    path = out.save(tmp_path)[0]
    request = json.loads(PngImagePlugin.PngImageFile(path).text["anygen"])["request"]  # type: ignore[attr-defined]
    assert (request["decoder"], request["num_inference_steps"]) == ("voken", 3)
    assert "decoder" not in drawing.generate(text="a cat", output="image").samples[0].provenance["request"]
    assert inspect_path(path)["provenance"]["request"]["decoder"] == "voken"


def test_inspect_lists_the_decoders(drawing_folder: Path) -> None:
    assert inspect_path(drawing_folder)["diffusion decoders"] == {"image": ["codes", "vokens"]}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"decoder": "diffusion", "size": 32}, "draws 16 x 16 px only; leave size out"),
        ({"decoder": "voken", "size": 32}, "draws 16 x 16 px only; leave size out"),
        ({"decoder": "voken", "num_inference_steps": 0}, "num_inference_steps must be an integer from 1 to 100"),
        ({"decoder": "voken", "num_inference_steps": 1.5}, "num_inference_steps must be an integer"),
        ({"decoder": "codes", "num_inference_steps": 4}, "decoder='codes' draws in one step"),
    ],
)
def test_what_a_decoder_cannot_do_is_said(drawing: AnyGen, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        drawing.generate(text="a cat", output="image", **arguments)
    if arguments.get("size"):
        assert drawing.generate(text="a cat", output="image", **(arguments | {"size": 16})).image.size == (16, 16)


def test_a_bundle_without_the_driver_says_what_it_has(drawing: AnyGen, model: AnyGen, codes_only_folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"no diffusion decoder that draws pictures from codes; it has decoder 'codes'$"
    ):
        model.generate(text="a", output="image", decoder="diffusion")
    codes_only = AnyGen.from_pretrained(codes_only_folder, device="cpu")
    assert codes_only.generate(text="a", output="image", decoder="diffusion").image.size == (16, 16)
    with pytest.raises(InputError, match=r"from vokens; it has decoder 'codes', 'diffusion'$"):
        codes_only.generate(text="a", output="image", decoder="voken")


def test_without_diffusers_everything_else_works(drawing_folder: Path) -> None:
    code = f"""
        import sys
        sys.modules["diffusers"] = None
        from anygen.api import AnyGen
        from anygen.errors import MissingDependency
        model = AnyGen.from_pretrained({str(drawing_folder)!r}, device="cpu")
        assert model.bundle.renderers == {{"image": ("codes", "vokens")}}
        assert model.generate(text="a cat", output="image", size=16).image.size == (16, 16)
        for decoder in ("diffusion", "voken"):
            try:
                model.generate(text="a cat", output="image", decoder=decoder)
            except MissingDependency as error:
                assert "anygen[diffusion]" in str(error), error
            else:
                raise AssertionError("drew without diffusers")
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_opening_a_bundle_does_not_import_diffusers(drawing_folder: Path) -> None:
    code = (
        "import sys; from anygen.api import AnyGen; "
        f"AnyGen.from_pretrained({str(drawing_folder)!r}, device='cpu').generate(text='a', output='image'); "
        "assert 'diffusers' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
