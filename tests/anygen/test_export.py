"""`anygen export`: a directory that transformers opens alone, with equal logits and ids, and a page that says it all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anygen.api import AnyGen
from anygen.bundle import save_bundle
from anygen.cli import main
from anygen.documents import Document, Segment
from anygen.errors import CheckpointError, InputError
from anygen.export import export_model
from anygen.files import is_published, publishing, read_json, write_json
from anygen.layout import Layout
from anygen.model.causal import ModelConfig, create_model
from anygen.stages.pretrain import load_pretrained
from anygen.vocabulary import Vocabulary
from tokenizers_mm.llm_text import LLMTextTokenizer, SomeTextTokenizer
from tokenizers_mm.text import TextTokenizer

ROOT = Path(__file__).parents[2]


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary, layout: Layout) -> tuple[Path, Any]:
    """What stage pretrain leaves in `model/`, untied and fp32, and the model itself."""
    config = ModelConfig(size="smoke", width=32, head_width=16, mlp_width=48, max_positions=512, tie_embeddings=False)
    model = create_model(config, vocabulary, seed=1)
    folder = tmp_path_factory.mktemp("run") / "pretrain" / "model"
    with publishing(folder) as temporary:
        model.save_pretrained(temporary)
        write_json(temporary / "vocabulary.json", vocabulary.manifest())
        write_json(temporary / "layout.json", layout.to_json())
    return folder, model.eval()


def text_bundle(folder: Path, text: SomeTextTokenizer) -> Path:
    """A bundle of text alone, whose weights are so large that answers vary."""
    vocabulary = Vocabulary.of({"text": text})
    config = ModelConfig(size="smoke", width=32, head_width=16, mlp_width=48, tie_embeddings=False)
    model = create_model(config, vocabulary, seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    parts = {"vocabulary": vocabulary, "layout": Layout(), "tokenizers": {"text": text}, "card": "# text\n"}
    save_bundle(folder, model=model, defaults={}, provenance={"name": "text"}, **parts)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="module")
def own_bundle(tmp_path_factory: pytest.TempPathFactory, text_tokenizer: TextTokenizer) -> Path:
    return text_bundle(tmp_path_factory.mktemp("bundles") / "own", text_tokenizer)


@pytest.fixture(scope="module")
def llm_bundle(tmp_path_factory: pytest.TempPathFactory, llm_json: bytes) -> Path:
    return text_bundle(tmp_path_factory.mktemp("bundles") / "llm", LLMTextTokenizer(llm_json))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_transformers_alone_gives_equal_logits(
    pretrained: tuple[Path, Any], tmp_path: Path, dtype: Any, vocabulary: Vocabulary
) -> None:
    source, model = pretrained
    out = export_model(source, tmp_path / "out", dtype=dtype)
    assert is_published(out)
    kinds = {"manifest.json", "config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert {path.name for path in out.iterdir()} == {*kinds, "vocabulary.json", "layout.json"}
    facts = read_json(out / "config.json")
    assert facts["model_type"] == "qwen3" and facts["architectures"] == ["Qwen3ForCausalLM"]
    assert facts["dtype"] == {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    assert "anygen" not in (out / "config.json").read_text() and "auto_map" not in facts
    ids = torch.randint(0, vocabulary.used, (2, 17), generator=torch.Generator().manual_seed(0))
    expected = plain(source)
    if dtype == "bf16":
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter.copy_(parameter.bfloat16())
    with torch.no_grad():
        assert torch.equal(plain(out)(ids).logits, expected(ids).logits)
    assert Vocabulary.from_manifest(read_json(out / "vocabulary.json")) == vocabulary
    assert load_pretrained(out)[2] == load_pretrained(source)[2]
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.slow
def test_another_process_without_anygen_opens_it(bundle_folder: Path, tmp_path: Path) -> None:
    out = export_model(bundle_folder, tmp_path / "out")
    code = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__name__ == "Qwen3ForCausalLM" and str(model.dtype) == "torch.bfloat16"
assert not any(name.split(".")[0] in ("anygen", "tokenizers_mm") for name in sys.modules)
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("kind", ["own", "of a language model"])
def test_greedy_text_is_what_our_sampler_gives(kind: str, own_bundle: Path, llm_bundle: Path, tmp_path: Path) -> None:
    bundle = own_bundle if kind == "own" else llm_bundle
    ours = AnyGen.from_pretrained(bundle, device="cpu")
    vocabulary, control = ours.bundle.vocabulary, ours.bundle.vocabulary.control
    answer = ours.generate(text="a red apple", output="text", max_new_tokens=24, temperature=0)
    document = Document((Segment("text", "a red apple"),), task="continue").encode(ours.bundle.tokenizers)
    prompt = [*ours.sequencer.prompt(document).tolist(), control("text")]
    legal = [id for start, stop in vocabulary.text_ids for id in range(start, stop)]
    end = control("/text")

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        return legal if len(ids) == len(prompt) else [*legal, end]

    ids = plain(export_model(bundle, tmp_path / "out", dtype="fp32")).generate(
        torch.tensor([prompt]), max_new_tokens=21, do_sample=False, eos_token_id=end, prefix_allowed_tokens_fn=allowed
    )
    theirs = [id for id in ids[0, len(prompt) :].tolist() if id != end]
    generated = list(answer.samples[0].ids)
    mine = generated[1 : generated.index(end)]
    assert len(mine) > 3 and theirs == mine
    assert len(set(mine)) > 5, "a model that repeats one id would prove little"


def test_a_bundle_with_a_language_models_tokenizer_generates_and_streams(llm_bundle: Path) -> None:
    model = AnyGen.from_pretrained(llm_bundle, device="cpu")
    assert (llm_bundle / "tokenizers" / "text" / "tokenizer.json").is_file()
    unused = {id for start, stop in model.bundle.vocabulary.unused_text for id in range(start, stop)}
    assert unused
    texts = []
    for seed in range(6):
        arguments = {"text": "hi <|im_end|>", "output": "text", "max_new_tokens": 40, "seed": seed, "temperature": 9.0}
        sample = model.generate(**arguments).samples[0]
        assert not unused & set(sample.ids)
        deltas = [event.text for event in model.stream(**arguments) if hasattr(event, "text")]
        assert "".join(deltas) == sample.segments[0].content
        texts.append(sample.segments[0].content)
    assert len(set(texts)) == 6
    assert any(
        0 in model.generate(text="a", output="text", seed=seed, temperature=90.0).samples[0].ids for seed in range(9)
    ), "id 0 is text here, and can be said"


def test_the_page_says_what_every_id_means(bundle_folder: Path, tmp_path: Path, vocabulary: Vocabulary) -> None:
    page = (export_model(bundle_folder, tmp_path / "out") / "README.md").read_text()
    for r in vocabulary.ranges:
        assert f"| {r.name} | {r.start} to {r.stop - 1} | {r.size} | {r.start} + c |" in page
    for modality, fingerprint in vocabulary.fingerprints.items():
        assert f"| {modality} | `{fingerprint}` |" in page
    for name in vocabulary.control_names:
        assert f"`{name}`" in page
    assert "--skip-tokenizer-init" in page and "allowed_token_ids" in page and "Not run here" in page
    picture = vocabulary.range("image.0")
    assert f"list(range({picture.start}, {picture.stop}))" in page
    assert str(tmp_path) not in page and str(bundle_folder) not in page
    assert max(map(len, page.splitlines())) < 400


@pytest.mark.parametrize("kind", ["own", "of a language model"])
def test_the_snippets_of_the_page_run(kind: str, bundle_folder: Path, llm_bundle: Path, tmp_path: Path) -> None:
    out = export_model(bundle_folder if kind == "own" else llm_bundle, tmp_path / "out")
    page = (out / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet.replace("this folder", str(out)), names)
    vocabulary = Vocabulary.from_manifest(read_json(out / "vocabulary.json"))
    (ids,) = names["ids"].tolist()
    legal = {*names["legal"]}
    assert ids[: len(names["prompt"])] == names["prompt"] and legal.issuperset(ids[len(names["prompt"]) :])
    assert vocabulary.control("/text") in legal and not legal & {vocabulary.control("eos")}
    if kind != "own":
        assert "image" not in re.findall(r"\| (\w+)\.0", page) and "curl" not in page
        return
    (script,) = re.findall(r"<<'END' \|.*?\n(.*?)END", page, re.DOTALL)
    request = json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)
    bundle = AnyGen.from_pretrained(bundle_folder, device="cpu")
    codes = request["sampling_params"]["allowed_token_ids"][: request["sampling_params"]["max_tokens"]]
    parsed = bundle.sequencer.parse(
        np.array([*request["token_ids"], *codes, *map(vocabulary.control, ("/image", "eos"))])
    )
    assert parsed.complete and [s.modality for s in parsed.document.segments] == ["text", "image"]
    assert bundle.decode(parsed.document.segments[1].codes).size == (16, 16)


def test_nothing_is_written_over(pretrained: tuple[Path, Any], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(InputError, match="is not an empty folder"):
            export_model(pretrained[0], tmp_path / name)
    assert (tmp_path / "full" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert is_published(export_model(pretrained[0], tmp_path / "empty"))


def test_what_cannot_be_exported_is_told(pretrained: tuple[Path, Any], tmp_path: Path) -> None:
    import shutil

    with pytest.raises(InputError, match="there is no model at"):
        export_model(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match="neither a bundle"):
        export_model(tmp_path / "other", tmp_path / "out")
    with pytest.raises(InputError, match="dtype must be bf16 or fp32"):
        export_model(pretrained[0], tmp_path / "out", dtype="int4")  # type: ignore[arg-type]
    damaged = tmp_path / "damaged"
    shutil.copytree(pretrained[0], damaged)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-100] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="was changed or damaged"):
        export_model(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp-*"))


def test_a_failed_write_leaves_nothing(
    pretrained: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import anygen.export

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(anygen.export, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        export_model(pretrained[0], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command(pretrained: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as leaving:
            main(["export", *arguments])
        return int(leaving.value.code or 0)

    out = tmp_path / "out"
    assert run(str(pretrained[0]), "--out", str(out), "--dtype", "fp32") == 0
    assert str(out) in capsys.readouterr().out and (out / "model.safetensors").is_file()
    assert run(str(pretrained[0]), "--out", str(out)) == InputError.exit_code
    assert "is not an empty folder" in capsys.readouterr().err
