"""Commands that sample: `generate`, `gallery`, and `tokenize`, what the model would see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anygen.cli.options import JsonOption, ModelOption, print_json
from tokenizers_mm.errors import InputError

if TYPE_CHECKING:
    from anygen.request import Request
    from anygen.results import Output


def generate(
    text: Annotated[str | None, typer.Option(help="Text input.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture input (PNG, JPEG, WEBP).")] = None,
    audio: Annotated[Path | None, typer.Option(help="Sound input (WAV, FLAC, OGG).")] = None,
    output: Annotated[
        list[str] | None, typer.Option(help="text, image, audio, region or any; repeat for several.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="depict, caption, speak, transcribe, answer, locate, continue or infill.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Answers to generate.")] = 1,
    best_of: Annotated[
        int | None, typer.Option(help="Draw so many for each answer, keep the one that the model judges best.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Sample i is drawn from seed + i; as the best of n, from n seeds at seed + n i.")
    ] = 0,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely id.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely ids.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the most likely ids of this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop ids below this share of the likeliest.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Of text: above 1 repeats less.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is off.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Budget of ids.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of generated pictures in pixels.")] = None,
    duration_s: Annotated[float | None, typer.Option(help="Length of generated sounds.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Edits --image: what is white here is drawn anew.")] = None,
    span: Annotated[
        str | None, typer.Option(help="Edits --audio: START:END in seconds is made anew.", metavar="START:END")
    ] = None,
    keep_original: Annotated[
        bool, typer.Option("--keep-original", help="Pixels or samples outside what is edited stay as given.")
    ] = False,
    decoder: Annotated[str, typer.Option(help="What draws pictures: codes, diffusion or voken.")] = "codes",
    num_inference_steps: Annotated[int | None, typer.Option(help="Steps of a diffusion decoder.")] = None,
    via: Annotated[
        str | None,
        typer.Option(
            help="text: first write what is heard or seen; text_only: answer that alone; in_writing: first write what "
            "a spoken question says; one_by_one: several outputs, each by itself; nothing: none of these."
        ),
    ] = None,
    speculative_window: Annotated[
        int | None, typer.Option(help="Codes that one pass may add; 1 is plain. The answers are the same.")
    ] = None,
    model: ModelOption = None,
    out: Annotated[Path, typer.Option(help="Folder for what is generated.")] = Path("out"),
    profile: Annotated[bool, typer.Option("--profile", help="Print where the time went, to stderr.")] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Report progress as it generates; with --json one object a line.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Generate text, pictures and sound from text, pictures and sound."""
    from anygen.api import AnyGen
    from anygen.request import Request

    request = Request(
        text=text,
        image=image,
        audio=audio,
        output=tuple(output) if output else None,  # type: ignore[arg-type]
        task=task,
        num_samples=num_samples,
        best_of=best_of,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        guidance_scale=guidance_scale,
        max_new_tokens=max_new_tokens,
        size=size,
        duration_s=duration_s,
        mask=mask,
        span=None if span is None else _span_of(span),
        keep_original=keep_original,
        decoder=decoder,  # type: ignore[arg-type]
        num_inference_steps=num_inference_steps,
        speculative_window=speculative_window,
        via=via,  # type: ignore[arg-type]
    )
    request.inputs, request.mask_picture  # noqa: B018  a bad file is told before the model is loaded
    if profile and stream:
        raise InputError("--profile times one call as a whole: leave --stream out")
    if profile:
        result = _profiled(model, request)
    elif stream:
        from anygen.cli.streams import print_stream  # loads what prints media

        result = print_stream(AnyGen.from_pretrained(model).stream_request(request), as_json=as_json)
    else:
        result = AnyGen.from_pretrained(model).generate_batch([request])[0]
    files = result.save(out)
    if as_json:
        samples = [
            {
                "seed": sample.seed,
                "finish_reason": sample.finish_reason,
                "texts": sample.of("text"),
                "regions": [region.values for region in sample.of("region")],
            }
            for sample in result.samples
        ]
        print_json({**({"event": "finished"} if stream else {}), "files": [str(f) for f in files], "samples": samples})
        return
    for written in result.texts:
        print(written)
    for region in result.regions:
        print(*(f"{value:.3f}" for value in region.values))
    for file in files:
        if file.suffix != ".txt":
            print(file)


def _profiled(model: str | None, request: Request) -> Output:
    """The answer; where the time went is printed to stderr."""
    import sys
    import time

    from anygen.api import AnyGen
    from anygen.bench.profile import profiled

    start = time.perf_counter()
    opened = AnyGen.from_pretrained(model)
    print(f"{'load':32}{1e3 * (time.perf_counter() - start):9.1f} ms", file=sys.stderr)
    with profiled() as profile:
        result = opened.generate_batch([request])[0]
    print(*profile.lines(), sep="\n", file=sys.stderr)
    return result


def _span_of(text: str) -> tuple[float, float]:
    """Two numbers parted by a colon; what they may be is for the request to check."""
    start, _, end = text.partition(":")
    try:
        return float(start), float(end)
    except ValueError as error:
        raise InputError(f"--span is START:END in seconds, such as 0.2:0.6; got {text!r}") from error


def gallery(
    model: Annotated[str | None, typer.Argument(help="Bundle folder; the embedded one by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the page.")] = Path("out/gallery"),
    prompts: Annotated[Path | None, typer.Option(help="YAML list of prompts; the embedded ones by default.")] = None,
) -> None:
    """Generate every direction and write one static page."""
    from anygen.api import AnyGen
    from anygen.gallery.build import build_gallery
    from anygen.gallery.exhibits import load_exhibits

    exhibits = load_exhibits(prompts)
    print(build_gallery(AnyGen.from_pretrained(model), out, exhibits))


def tokenize(
    text: Annotated[str | None, typer.Option(help="Text input.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture input.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Sound input.")] = None,
    model: ModelOption = None,
) -> None:
    """Print the codes of media, and their ids in the model's vocabulary, as JSON."""
    from anygen.api import AnyGen
    from anygen.request import Request

    request = Request(text=text, image=image, audio=audio, output="any")
    if not request.inputs:
        raise InputError("nothing to tokenize: give --text, --image or --audio")
    print_json(AnyGen.from_pretrained(model).tokenize(request))
