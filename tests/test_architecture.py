"""The house rules that a machine can check: who imports whom, what importing costs, and what may be absent or broken."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("tokenizers_mm", "decoders", "anygen")
MAY_IMPORT = {"tokenizers_mm": set(), "decoders": {"tokenizers_mm"}, "anygen": {"tokenizers_mm", "decoders"}}

# The rooms of anygen in the order in which data flow; a room imports only from rooms before it.
ROOMS = [
    "_version", "errors", "config", "seeding", "files", "recipes_index", "documents", "vocabulary", "codebooks", "layout", "sequence",
    "plan", "judging", "grammar", "packing", "model", "sampling", "bundle", "drawing", "inputs", "request", "planning", "ranking", "editing", "starting", "results", "finishing", "chains", "streaming", "api", "training", "plotting", "data", "evaluation",
    "gallery", "stages", "export", "bench", "inspection", "doctor", "cli", "__main__",
]  # fmt: skip
FRAGILE = ("xformers", "torchvision", "torchaudio", "torchcodec", "encodec", "diffusers")
MAX_LINES = 300
# Their classes derive from diffusers': they are imported by none of the other files of decoders/, but inside functions.
DIFFUSERS_FILES = ("decoders/denoiser.py", "decoders/drivers.py", "decoders/decoder.py", "decoders/sound.py")
# Files of anygen that meet decoders: where a bundle is assembled, and the stages that train them.
MEET_DECODERS = (
    "anygen/bundle.py",
    *(
        f"anygen/stages/{name}.py"
        for name in ("decoder", "finishing", "vokens", "voken_losses", "prompt_vokens", "prompt_losses", "retrieval")
    ),
)


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports_of(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the map"
            module = node.module or ""
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_and_rooms_import_one_way(path: Path) -> None:
    relative = path.relative_to(ROOT)
    package = relative.parts[0]
    for module in imports_of(path):
        target = module.split(".")[0]
        if target in PACKAGES and target != package:
            assert target in MAY_IMPORT[package], f"{relative} imports {module}"
        if target == "decoders" and package == "anygen":
            assert relative.as_posix() in MEET_DECODERS, (
                "decoders are met only where a bundle is assembled, or in training"
            )
        if package == target == "anygen" and module.count(".") >= 1 and relative.name != "__init__.py":
            here = relative.with_suffix("").parts[1]
            there = room_of(module)
            if there in ROOMS:
                assert ROOMS.index(there) <= ROOMS.index(here), f"{relative} ({here}) imports {module} ({there})"


def test_every_room_is_on_the_map() -> None:
    rooms = {p.relative_to(ROOT / "anygen").with_suffix("").parts[0] for p in (ROOT / "anygen").rglob("*.py")}
    assert rooms - {"__init__"} == set(ROOMS)


def test_there_are_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {}
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sources() if p.name != "__init__.py"}
    for name, path in names.items():
        graph[name] = {m for m in imports_of(path, top_level_only=True) if m in names and m != name}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_documented_and_free_of_banned_imports(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES, "one idea per file"
    if path.name != "__init__.py" or text.strip():
        assert ast.get_docstring(ast.parse(text)), "a file opens by saying what it is"
    for module in imports_of(path, top_level_only=True):
        lazy = module.split(".")[0] == "diffusers" and path.relative_to(ROOT).as_posix() in DIFFUSERS_FILES
        assert lazy or module.split(".")[0] not in FRAGILE, (
            f"{module} may be absent or broken: import it where it is used"
        )
        assert module.split(".")[0] != "pickle"
    if any(m.split(".")[0] in ("xformers", "mslk") for m in imports_of(path)) or "xformers." in text or "mslk." in text:
        assert path.name == "attention_kernels.py", "only one file knows xformers and mslk"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_transformers_is_never_imported_before_the_guard(path: Path) -> None:
    heavy = {"transformers", "accelerate", "diffusers"}
    if any(module.split(".")[0] in heavy for module in imports_of(path)):
        assert "tokenizers_mm.compat" in imports_of(path), "import tokenizers_mm.compat first"


def run_python(code: str, *, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*([path] if path else []), ROOT]))}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment
    )


def test_importing_anygen_and_its_command_line_loads_nothing_heavy() -> None:
    result = run_python("""
        import sys, anygen, anygen.cli
        heavy = {"torch", "transformers", "numpy", "PIL", "accelerate"} & set(sys.modules)
        assert not heavy, heavy
    """)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("state", ["absent", "broken"])
def test_anygen_works_with_fragile_packages_absent_or_broken(tmp_path: Path, state: str) -> None:
    for name in FRAGILE:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise OSError('libc10_cuda.so: cannot open shared object file')")
    block = (
        ""
        if state == "broken"
        else f"""
        import sys
        for name in {FRAGILE!r}:
            sys.modules[name] = None
    """
    )
    result = run_python(
        textwrap.dedent(block)
        + textwrap.dedent("""
        import anygen
        from anygen.api import AnyGen
        from transformers import CLIPModel, EncodecModel, Qwen3ForCausalLM
        import anygen.stages.pretrain, anygen.stages.audio_tokenizer, anygen.gallery.build
        import torch
        from anygen.model.attention_kernels import candidates, choose
        openers = {"xformers": candidates()["xformers"]}
        assert list(choose(openers, torch.device("cpu")).refused) == ["xformers"]
        """),
        path=tmp_path if state == "broken" else None,
    )
    assert result.returncode == 0, result.stderr


def test_no_path_of_a_machine_and_no_unfinished_work_is_in_the_tree() -> None:
    machine = (str(ROOT), f"{Path.home()}/")
    for path in [*sources(), *ROOT.glob("*.md"), *(ROOT / "recipes").rglob("*.yaml")]:
        text = path.read_text(encoding="utf-8")
        for mark in ("TODO", "FIXME", "XXX", "NotImplementedError", *machine):
            assert mark not in text, f"{path.relative_to(ROOT)} holds {mark}"
