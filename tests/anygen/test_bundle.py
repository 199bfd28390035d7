"""Bundles: open as plain Qwen3 anywhere with our logits, and refuse every kind of damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anygen.api import AnyGen
from anygen.bundle import default_bundle, load_bundle
from anygen.errors import AnyGenError, CheckpointError, InputError
from anygen.files import MANIFEST, sha256_of
from anygen.recipes_index import find_recipe, list_recipes
from anygen.request import Request
from anygen.stages.run import load_recipe


def test_transformers_opens_it_with_our_logits_and_greedy_ids(bundle_folder: Path, model: AnyGen) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(bundle_folder, dtype=torch.float32)
    assert type(plain).__name__ == "Qwen3ForCausalLM"
    prompt = model._states(Request(text="a red apple", output="image"))[0].prompt
    theirs = plain(torch.from_numpy(prompt)[None]).logits[0, -1]
    cache = model.engine.new_cache(1, 100)
    hidden = model.engine.prefill([prompt], cache)
    size = model.bundle.vocabulary.size
    assert (model.engine.logits(hidden, ((0, size),))[0] - theirs).abs().max() < 1e-5
    expected = plain.generate(torch.from_numpy(prompt)[None], do_sample=False, max_new_tokens=30, eos_token_id=None)
    ids = []
    for _ in range(30):
        ids.append(int(model.engine.logits(hidden, ((0, size),)).argmax()))
        hidden = model.engine.step(torch.tensor(ids[-1:]), cache)
    assert ids == expected[0, len(prompt) :].tolist()


def test_constrained_greedy_equals_transformers_with_our_grammar_as_a_processor(
    bundle_folder: Path, model: AnyGen
) -> None:
    from transformers import AutoModelForCausalLM, LogitsProcessor

    class Grammar(LogitsProcessor):
        def __init__(self, walk: Any, start: int) -> None:
            self.walk, self.start, self.done = walk, start, 0

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            new = input_ids[0, self.start :].tolist()
            for id in new[self.done :]:
                self.walk.push(id)
            self.done = len(new)
            masked = torch.full_like(scores, -torch.inf)
            for start, stop in self.walk.allowed:
                masked[:, start:stop] = scores[:, start:stop]
            return masked

    request = Request(text="a cat", output=("image", "audio"), temperature=0.0, guidance_scale=1.0, max_new_tokens=60)
    ours = model.generate_batch([request])[0].samples[0].ids
    state = model._states(request)[0]
    plain = AutoModelForCausalLM.from_pretrained(bundle_folder, dtype=torch.float32)
    theirs = plain.generate(
        torch.from_numpy(state.prompt)[None],
        do_sample=False,
        max_new_tokens=60,
        logits_processor=[Grammar(state.walk, len(state.prompt))],
    )
    assert list(ours) == theirs[0, len(state.prompt) :].tolist()


def test_everything_comes_back(bundle_folder: Path, model: AnyGen) -> None:
    bundle = load_bundle(bundle_folder)
    assert bundle.vocabulary == model.bundle.vocabulary and bundle.layout == model.bundle.layout
    assert bundle.defaults["image"].guidance_scale == 2.0
    assert bundle.provenance["name"] == "tiny" and bundle.renderers == {}
    assert all(p.suffix in (".safetensors", ".json", ".md", ".model") for p in bundle_folder.rglob("*") if p.is_file())


def test_saving_twice_gives_equal_bytes(bundle_folder: Path, tmp_path: Path, model: AnyGen, tiny_model: Any) -> None:
    import copy

    from anygen.bundle import save_bundle

    b = model.bundle
    save_bundle(
        tmp_path / "again",
        model=copy.deepcopy(tiny_model),
        vocabulary=b.vocabulary,
        layout=b.layout,
        tokenizers=b.tokenizers,
        defaults=b.defaults,
        provenance=b.provenance,
        card="# tiny\n",
    )
    for path in bundle_folder.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(bundle_folder)).read_bytes(), path.name


def resealed(folder: Path) -> Path:
    """Make the manifest agree with the files again: faults must be found without its help."""
    manifest = {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_of(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_every_changed_bit_is_found(bundle_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    shutil.copytree(bundle_folder, folder)
    random = np.random.default_rng(0)
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, "README.md")):
        whole = path.read_bytes()
        data = bytearray(whole)
        data[int(random.integers(len(data)))] ^= 4
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=path.name):
            load_bundle(folder)
        path.write_bytes(whole)
    (folder / "README.md").write_text("A card may be edited.")
    load_bundle(folder)
    shutil.copy(folder / "model.safetensors", folder / "added.safetensors")
    with pytest.raises(CheckpointError, match=r"added\.safetensors is not in manifest\.json"):
        load_bundle(folder)
    (folder / MANIFEST).write_text("{}")
    with pytest.raises(CheckpointError, match="lists no files"):
        load_bundle(folder)


def edit(path: Path, change: Any) -> None:
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "fault",
    [
        lambda f: edit(f / "anygen.json", lambda j: j.update(format=9)),
        lambda f: edit(f / "anygen.json", lambda j: j.pop("layout")),
        lambda f: edit(f / "anygen.json", lambda j: j["defaults"]["image"].update(temperature=-5)),
        lambda f: edit(f / "anygen.json", lambda j: j["vocabulary"]["ranges"][0].update(size=5)),
        lambda f: edit(f / "anygen.json", lambda j: j["vocabulary"]["fingerprints"].update(text="0" * 64)),
        lambda f: edit(f / "config.json", lambda j: j.update(model_type="llama")),
        lambda f: edit(f / "config.json", lambda j: j.update(auto_map={"AutoModel": "evil.Model"})),
        lambda f: edit(f / "config.json", lambda j: j.update(vocab_size=128)),
        lambda f: edit(f / "config.json", lambda j: j.update(hidden_size=48)),
        lambda f: edit(f / "config.json", lambda j: j.update(num_hidden_layers=9)),
        lambda f: edit(f / "config.json", lambda j: j.update(num_attention_heads=0)),
        lambda f: edit(f / "config.json", lambda j: j.update(max_position_embeddings=-3)),
        lambda f: (f / "config.json").write_text("[]"),
        lambda f: (f / "anygen.json").write_text("{"),
        lambda f: (f / "anygen.json").unlink(),
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 100),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: shutil.rmtree(f / "tokenizers" / "audio"),
        lambda f: (f / "tokenizers" / "text" / "text.model").write_bytes(b"x"),
        lambda f: (f / MANIFEST).unlink(),
    ],
)
def test_broken_bundles_are_typed_errors(bundle_folder: Path, tmp_path: Path, fault: Any) -> None:
    folder = tmp_path / "b"
    shutil.copytree(bundle_folder, folder)
    fault(folder)
    if (folder / MANIFEST).exists():
        resealed(folder)
    with pytest.raises(CheckpointError):
        AnyGen.from_pretrained(folder)


def test_mutated_bundles_never_escape_as_other_errors(bundle_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    shutil.copytree(bundle_folder, folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (MANIFEST, "README.md"))
    random = np.random.default_rng(0)
    for number in range(150):
        path = files[number % len(files)]
        whole = path.read_bytes()
        data = bytearray(whole)
        for _ in range(int(random.integers(1, 4))):
            data[int(random.integers(min(len(data), 3000)))] = int(random.integers(256))
        path.write_bytes(data)
        resealed(folder)
        try:
            AnyGen.from_pretrained(folder)
        except AnyGenError:
            pass
        path.write_bytes(whole)


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no bundle at"):
        AnyGen.from_pretrained(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is not a bundle"):
        AnyGen.from_pretrained(tmp_path)


@pytest.mark.parametrize("device", ["gpu", 0, None, "cuda:99"])
def test_devices_that_are_not_there(bundle_folder: Path, device: Any) -> None:
    with pytest.raises(InputError, match="cannot be used here: expected 'auto'"):
        AnyGen.from_pretrained(bundle_folder, device=device)


def test_the_embedded_bundle_is_small_and_of_its_recipe() -> None:
    folder = default_bundle()
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert sum(sizes) <= 40e6 and max(sizes) <= 15e6
    provenance = json.loads((folder / "anygen.json").read_text())["provenance"]
    made_by, changed = provenance["recipes"], provenance["changed"]
    assert {"data", "image_tokenizer", "audio_tokenizer", "pretrain", "decoder"} <= set(made_by)
    last_first = ("spoken", "things", "rhvoice", "speakers", "more_scenes", "more_voices", "longer")
    families = (*(f"nano/{name}" for name in last_first), "nano")
    recorded_by = {
        next(n for family in families if (n := f"{family}/{stage}.yaml") in list_recipes()): config
        for stage, config in (made_by | changed["instead_of"]).items()
    }
    recorded_by |= {f"nano/clear/{stage}.yaml": config for stage, config in changed["recipes"].items()}
    assert changed["recipes"].keys() == {"data", "audio_tokenizer"} and len(recorded_by) == len(made_by) + 2
    assert made_by["audio_tokenizer"] == changed["recipes"]["audio_tokenizer"]
    for name, config in recorded_by.items():
        recipe = load_recipe(find_recipe(name), root=Path("unused"))
        recorded = type(recipe).model_validate({**config, "root": "unused"})  # later fields: as if at their defaults
        assert recorded == recipe, f"recipes/{name} changed since"
