"""The documents are true: their Python runs, their commands parse, their links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from anygen.bundle import default_bundle
from anygen.errors import CheckpointError

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks(README, "bash")).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("anygen ")]


def has_bundle() -> bool:
    try:
        default_bundle()
    except CheckpointError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not has_bundle(), reason="this checkout holds no embedded bundle")
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks(README, "python")
    assert found
    names: dict[str, object] = {}
    for block in found:
        exec(compile(block, str(README), "exec"), names)  # one after another, as a reader would type them


@pytest.mark.slow
@pytest.mark.skipif(not has_bundle(), reason="this checkout holds no embedded bundle")
def test_the_generate_commands_of_the_readme_run(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = 0
    for command in commands():
        words = shlex.split(command)
        if words[1] not in ("generate", "tokenize", "inspect", "recipes") or "runs/mine" in command:
            continue  # the others train, or need what was trained
        code = "from anygen.cli import main; main()"
        result = subprocess.run(
            [sys.executable, "-c", code, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, (command, result.stderr)
        ran += 1
    assert ran >= 3


def test_every_command_of_the_readme_exists_with_its_options() -> None:
    from typer.main import get_command

    from anygen.cli import app

    group = get_command(app)
    for command in commands():
        words = shlex.split(command)[1:]
        node = group
        while words and hasattr(node, "commands") and words[0] in node.commands:
            node = node.commands[words.pop(0)]
        known = {option for parameter in node.params for option in parameter.opts}
        for word in words:
            if word.startswith("--"):
                assert word in known, f"{command}: no option {word}"
        assert not hasattr(node, "commands"), f"{command}: not a command"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(blocks(README, "bash")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
