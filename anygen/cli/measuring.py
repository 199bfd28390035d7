"""Commands that look: `evaluate`, `plot`, `inspect`, `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from anygen.cli.options import JsonOption, print_facts, print_json


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[PATH]", help="Bundle or tokenizer; the embedded bundle by default."),
    ] = None,
    suite: Annotated[Literal["emoji"], typer.Option(help="Bundles: the world they are measured on.")] = "emoji",
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many of each group or kind; 120 for bundles.")
    ] = None,
    direction: Annotated[list[str] | None, typer.Option(help="Bundles: text>image and so on; repeatable.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Bundles: seed of the samples.")] = 0,
    best_of: Annotated[
        int | None, typer.Option(min=1, help="Bundles: answers drawn for one that is kept; by default its own number.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Tokenizers: folder of shards; RUN/data by default.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Pictures: folder of the teacher; its own by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report and its page.")] = Path("out/evaluation"),
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="A B", help="Two reports of bundles: what changed from A to B.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a bundle in every direction, or a tokenizer on held-out pictures or sounds; or compare two reports."""
    from anygen.errors import InputError

    if compare is not None:
        from anygen.evaluation.suite.compare import compare_reports, lines_of_comparison

        if model is not None:
            raise InputError("--compare takes two reports and no model")
        rows = compare_reports(*compare)
        print_json({"differences": rows}) if as_json else print(*lines_of_comparison(rows), sep="\n")
        return
    from anygen.evaluation.tokenizers import evaluate_tokenizer, kind_of

    if model is not None and (kind := kind_of(Path(model))):
        if direction or best_of is not None:
            raise InputError(f"--direction and --best-of are for bundles; this is a {kind} tokenizer")
        report, lines = evaluate_tokenizer(Path(model), data=data, teacher=teacher, out=out, limit=limit)
    else:
        if data or teacher:
            raise InputError(f"--data and --teacher are for tokenizers; {model or 'the embedded bundle'} is none")
        from anygen.evaluation.suite.evaluate import open_and_evaluate

        assert suite == "emoji", suite  # the one there is
        report, lines = open_and_evaluate(
            model, out, limit=limit, directions=direction or (), seed=seed, best_of=best_of
        )
    print_json(report) if as_json else print(*lines, out / "index.html", sep="\n")


def plot(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run, the folder of a stage, or a metrics.jsonl.")],
    out: Annotated[Path, typer.Option(help="Picture: .png, .svg or .pdf; one for each stage.")] = Path(
        "out/curves.png"
    ),
    compare: Annotated[Path | None, typer.Option(metavar="RUN2", help="Another run, drawn dashed.")] = None,
) -> None:
    """Draw the curves of a run: losses, norms, learning rate, speed, use of codes."""
    from anygen.plotting.run import plot_run

    print(*plot_run(run, out, compare=compare), sep="\n")


def inspect(path: Path, as_json: JsonOption = False) -> None:
    """Say what a bundle, run, checkpoint, shard, recipe or generated file holds."""
    from anygen.inspection import inspect_path

    facts = inspect_path(path)
    if as_json:
        print_json(facts)
        return
    print_facts(facts)


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
        print_json({"findings": [dataclasses.asdict(finding) for finding in findings]})
    if any(finding.status == "broken" for finding in findings):
        raise typer.Exit(1)
