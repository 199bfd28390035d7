"""The command line. It imports nothing heavy before a command needs it, so that `--help` answers at once.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 and 143 interrupted after a clean save.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from anygen._version import __version__
from tokenizers_mm.errors import AnyGenError

app = typer.Typer(
    name="anygen",
    help="One causal transformer in which text, pictures and sound are all tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="Recipes that come with anygen.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")

ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="Bundle folder; the embedded one by default.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
RootOption = Annotated[Path | None, typer.Option("--root", help="Folder of the run; runs/NAME by default.")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; every expected fault is one sentence on stderr."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("anygen").setLevel(logging.INFO)
    try:
        app(args=arguments, standalone_mode=True)
    except (AnyGenError, OSError) as error:
        _leave(error)
    except SystemExit as leaving:
        if leaving.code == 130:  # typer turned Ctrl-C into it
            print("Interrupted.", file=sys.stderr)
        raise


def _leave(error: AnyGenError | OSError) -> None:
    if isinstance(error, OSError) and not isinstance(error, AnyGenError):  # a full disk, a folder without permission
        name = f": {error.filename}" if error.filename else ""
        print(f"Error: {error.strerror or error}{name}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"Error: {error}", file=sys.stderr)
    raise SystemExit(error.exit_code if isinstance(error, AnyGenError) else 1) from None


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def generate(
    text: Annotated[str | None, typer.Option(help="Text input.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture input (PNG, JPEG, WEBP).")] = None,
    audio: Annotated[Path | None, typer.Option(help="Sound input (WAV, FLAC, OGG).")] = None,
    output: Annotated[
        list[str] | None, typer.Option(help="text, image, audio, region or any; repeat for several.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="depict, caption, speak, transcribe, answer, locate or continue.")
    ] = None,
    num_samples: Annotated[int, typer.Option(help="Answers to generate.")] = 1,
    seed: Annotated[int, typer.Option(help="Sample i is drawn from seed + i.")] = 0,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely id.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k most likely ids.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the most likely ids of this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop ids below this share of the likeliest.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is off.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Budget of ids.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of generated pictures in pixels.")] = None,
    duration_s: Annotated[float | None, typer.Option(help="Length of generated sounds.")] = None,
    model: ModelOption = None,
    out: Annotated[Path, typer.Option(help="Folder for what is generated.")] = Path("out"),
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
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        guidance_scale=guidance_scale,
        max_new_tokens=max_new_tokens,
        size=size,
        duration_s=duration_s,
    )
    request.inputs  # noqa: B018  a bad file is told before the model is loaded
    result = AnyGen.from_pretrained(model).generate_batch([request])[0]
    files = result.save(out)
    if as_json:
        samples = [
            {"seed": sample.seed, "finish_reason": sample.finish_reason, "texts": sample.of("text")}
            for sample in result.samples
        ]
        _print_json({"files": [str(file) for file in files], "samples": samples})
        return
    for written in result.texts:
        print(written)
    for file in files:
        if file.suffix != ".txt":
            print(file)


@app.command()
def train(
    recipe: Path,
    overrides: OverridesArgument = None,
    root: RootOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would do and cost.")] = False,
) -> None:
    """Run one stage: anygen train RECIPE.yaml key.sub=value ..."""
    from anygen.stages.run import load_recipe, run_stage

    config = load_recipe(recipe, overrides or (), root=root, default_root=Path("runs") / recipe.resolve().parent.name)
    if dry_run:
        from anygen.stages.dry_run import weigh

        _print_facts(weigh(config))
        return
    _print_result(run_stage(config))


@app.command()
def run(folder: Path, overrides: OverridesArgument = None, root: RootOption = None) -> None:
    """Run a family's stages in order, skipping what is done: anygen run recipes/nano [stage.key=value ...]"""
    from anygen.stages.run import run_folder

    for result in run_folder(folder, overrides or (), root=root):
        _print_result(result)


def _print_result(result: Any) -> None:
    figures = " ".join(f"{name}={value:.4g}" for name, value in sorted(result.metrics.items()))
    print(f"{result.folder}: {figures}")


def _print_facts(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        print(f"{name}: {value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)}")


def _print_json(content: Any) -> None:
    print(json.dumps(content, ensure_ascii=False))


@app.command()
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


@app.command()
def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[PATH]", help="Bundle or tokenizer; the embedded bundle by default."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many of each group or kind.")] = None,
    direction: Annotated[list[str] | None, typer.Option(help="Bundles: text>image and so on; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Bundles: seed of the samples.")] = 0,
    data: Annotated[Path | None, typer.Option(help="Tokenizers: folder of shards; RUN/data by default.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Pictures: folder of the teacher; its own by default.")] = None,
    out: Annotated[Path, typer.Option(help="Tokenizers: folder of the page.")] = Path("out/evaluation"),
    as_json: JsonOption = False,
) -> None:
    """Measure a bundle on the emoji world in every direction, or a tokenizer on held-out pictures or sounds."""
    import dataclasses

    from anygen.api import AnyGen
    from anygen.errors import InputError
    from anygen.evaluation.emoji import DIRECTIONS, FIGURES, evaluate_emoji
    from anygen.evaluation.tokenizers import evaluate_tokenizer, kind_of

    if model is not None and (kind := kind_of(Path(model))):
        if direction:
            raise InputError(f"--direction is for bundles; this is a {kind} tokenizer")
        report, lines = evaluate_tokenizer(Path(model), data=data, teacher=teacher, out=out, limit=limit)
        _print_json(report) if as_json else print(*lines, out / "index.html", sep="\n")
        return
    if data or teacher:
        raise InputError(f"--data and --teacher are for tokenizers; {model or 'the embedded bundle'} is none")
    unknown = set(direction or ()) - set(DIRECTIONS)
    if unknown:
        raise InputError(f"unknown direction {sorted(unknown)[0]!r}; expected {', '.join(DIRECTIONS)}")
    scores = evaluate_emoji(AnyGen.from_pretrained(model), limit=limit, directions=direction or DIRECTIONS, seed=seed)
    if as_json:
        _print_json({d: {g: dataclasses.asdict(s) for g, s in groups.items()} for d, groups in scores.items()})
        return
    for name, groups in scores.items():
        for group, score in groups.items():
            interval = f"[{100 * score.low:5.1f}, {100 * score.high:5.1f}]"
            print(f"{name:12} {group:14} {FIGURES[name]:15} {100 * score.value:5.1f} %  {interval}  n={score.count}")


@app.command()
def tokenize(
    text: Annotated[str | None, typer.Option(help="Text input.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture input.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Sound input.")] = None,
    model: ModelOption = None,
) -> None:
    """Print the codes of media, and their ids in the model's vocabulary, as JSON."""
    from anygen.api import AnyGen
    from anygen.errors import InputError
    from anygen.request import Request

    request = Request(text=text, image=image, audio=audio, output="any")
    if not request.inputs:
        raise InputError("nothing to tokenize: give --text, --image or --audio")
    _print_json(AnyGen.from_pretrained(model).tokenize(request))


@app.command()
def inspect(path: Path, as_json: JsonOption = False) -> None:
    """Say what a bundle, run, checkpoint, shard, recipe or generated file holds."""
    from anygen.inspection import inspect_path

    facts = inspect_path(path)
    if as_json:
        _print_json(facts)
        return
    _print_facts(facts)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check the installation, and generate once."""
    import dataclasses

    from anygen.doctor import examine

    findings = []
    for finding in examine():
        findings.append(finding)
        if not as_json:
            print(f"{finding.status:7} {finding.name:24} {finding.detail}", flush=True)
    if as_json:
        _print_json({"findings": [dataclasses.asdict(finding) for finding in findings]})
    if any(finding.status == "broken" for finding in findings):
        raise typer.Exit(1)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the recipes that come with anygen."""
    from anygen.recipes_index import list_recipes

    for name in list_recipes():
        print(name)


@recipes_app.command("show")
def recipes_show(name: str) -> None:
    """Print a recipe, e.g. nano/pretrain.yaml."""
    from anygen.recipes_index import find_recipe

    print(find_recipe(name).read_text(encoding="utf-8"), end="")


@recipes_app.command("cp")
def recipes_cp(name: str, to: Path) -> None:
    """Copy a recipe or a family (nano, nano/pretrain.yaml) to a new place."""
    from anygen.recipes_index import copy_recipe

    print(copy_recipe(name, to))
