"""A dry run of a transformer's recipe: counts equal those of the real thing, and it works with nothing on disk."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from anygen.bundle import default_bundle
from anygen.errors import CheckpointError, ConfigError
from anygen.model.causal import ModelConfig, create_model, num_parameters, qwen3_config
from anygen.model.recompute import Recompute, recompute_activations
from anygen.recipes_index import find_recipe, list_recipes
from anygen.stages.dry_run import weigh
from anygen.stages.dry_run_pretrain import saved_bytes
from anygen.stages.run import load_recipe
from anygen.stages.weighing import counting_saved
from anygen.vocabulary import Vocabulary

PRETRAIN = [name for name in list_recipes() if name.endswith("pretrain.yaml")]


def weighed(name: str, tmp_path: Path, *overrides: str) -> dict[str, Any]:
    recipe = find_recipe(name)
    return weigh(load_recipe(recipe, overrides, root=tmp_path / "run"), recipe)


def numbers(facts: dict[str, Any]) -> list[float]:
    found = []
    for value in facts.values():
        found += numbers(value) if isinstance(value, dict) else [value] if isinstance(value, int | float) else []
    return found


@pytest.mark.parametrize("name", PRETRAIN)
def test_every_recipe_is_weighed_from_the_recipes_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no runs/ lies
    recipe = load_recipe(find_recipe(name))
    start = recipe.earlier_run
    for made in {start, recipe.init_from}:  # but for bundles that an earlier family made
        if made is not None and "bundle" in made.parts:
            made.parent.mkdir(parents=True)
            made.symlink_to(default_bundle())
    goes_on = start is not None and "bundle" in start.parts
    facts = weighed(name, tmp_path)
    assert not (tmp_path / "run").exists(), "a dry run leaves nothing"
    assert [source.split(":")[0] for source in facts["tokenizers"]] == ["text", "image", "audio"]
    known = [goes_on or str(start) == "nano" or " of nano, " in source for source in facts["tokenizers"]]
    assert ["assumed" not in source for source in facts["tokenizers"]] == known
    assert name != "own/pretrain.yaml" or known == [False, False, True], "its codec is the embedded one"
    del facts["config"]
    assert all(number > 0 for number in numbers(facts))
    assert facts["ids in all"] == facts["steps"] * facts["ids per step"]
    one, eight = facts["GB, 1 process"], facts["GB each of 8 processes, FSDP"]
    assert one["weights and optimizer"] == pytest.approx(8 * eight["weights and optimizer"], rel=1e-3)
    assert facts["parameters"]["embeddings"] < facts["parameters"]["all"]


@pytest.mark.parametrize(
    ("name", "billions", "memory_gb"), [("small/", 0.11, 80), ("", 0.35, 80), ("large/", 1.04, 80)]
)
def test_the_base_family_has_the_sizes_that_its_headers_say(
    name: str, billions: float, memory_gb: float, tmp_path: Path
) -> None:
    facts = weighed(f"base/{name}pretrain.yaml", tmp_path)
    assert facts["parameters"]["in matrix products"] / 1e9 == pytest.approx(billions, abs=0.005)
    header = " ".join(find_recipe(f"base/{name}pretrain.yaml").read_text().split("stage:")[0].split())
    assert f"{facts['parameters']['all'] / 1e9:.2f} B parameters" in header
    hours = facts["GPU hours (H100 or H200 at 40% MFU)"]
    assert f"{hours:.3g} GPU hours" in header or f"{hours:.2g} GPU hours" in header
    assert facts["GB each of 8 processes, FSDP"]["all"] < memory_gb
    assert facts["vocabulary"]["image.0"] == 8192 and facts["vocabulary"]["audio.3"] == 1024
    assert 20 <= facts["ids in all"] / facts["parameters"]["all"] <= 30, "about 20 ids a parameter (Chinchilla)"


def test_documents_of_every_kind_of_direction_have_a_length(tmp_path: Path) -> None:
    mixture = "{text>image: 1, text>voken: 1, ask: 1, ask_aloud: 1, locate: 1, name: 1, quiz: 1, quiz_listed: 1, story>image: 1, 'story,image>text': 1}"
    lengths = weighed("nano/pretrain.yaml", tmp_path, f"mixture={mixture}")["ids of a document"]
    assert len(lengths) == 10 and lengths["story>image"] > 4 * lengths["text>image"] > 4 * lengths["text>voken"]
    assert lengths["quiz"] > lengths["ask"] + 20, "one picture, four turns"
    assert lengths["quiz_listed"] > lengths["quiz"] + 2 * 19, "one turn less, three listings more"
    assert lengths["ask_aloud"] > lengths["ask"] > lengths["locate"] == lengths["name"] > lengths["text>voken"]


@pytest.mark.parametrize("name", ["smoke/pretrain.yaml", "nano/pretrain.yaml"])
@pytest.mark.parametrize("tied", ["true", "false"])
def test_parameters_are_those_of_the_real_model(name: str, tied: str, tmp_path: Path) -> None:
    overrides = (f"model.tie_embeddings={tied}",)
    facts = weighed(name, tmp_path, *overrides)
    sizes = facts["vocabulary"]
    vocabulary = Vocabulary.create(
        text=sizes["text"],
        image=(1, sizes["image.0"]),
        audio=(1, sizes["audio.0"]),
        region=sizes["region"],
        voken=sizes["voken"],
    )
    assert vocabulary.size == sizes["all, padded"]
    config = load_recipe(find_recipe(name), overrides).model  # type: ignore[attr-defined]
    model = create_model(config, vocabulary, seed=0)
    assert facts["parameters"]["all"] == num_parameters(model)
    embeddings = [model.model.embed_tokens.weight] + ([model.lm_head.weight] if tied == "false" else [])
    assert facts["parameters"]["embeddings"] == sum(matrix.numel() for matrix in embeddings)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_is_kept_for_the_backward_is_what_a_real_pass_keeps(recompute: Recompute, bf16: bool) -> None:
    config = ModelConfig(width=48, num_layers=5, num_heads=3, num_kv_heads=1, head_width=16, mlp_width=80)
    vocabulary, num_ids = Vocabulary.create(text=61), 250
    model = create_model(config, vocabulary, seed=0)
    model.set_attn_implementation("sdpa")
    model.train()
    recompute_activations(model, recompute)
    gc.collect()
    before = {id(found) for found in gc.get_objects() if type(found) is torch.Tensor}
    with counting_saved([model]) as saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model.model(input_ids=torch.zeros(1, num_ids, dtype=torch.long), use_cache=False)
    alive = [o for o in gc.get_objects() if type(o) is torch.Tensor and id(o) not in before]  # what checkpoints hold
    held = saved.storages | {o.untyped_storage()._cdata: o.untyped_storage().nbytes() for o in alive}
    expected, _ = saved_bytes(qwen3_config(config, vocabulary), num_ids, bf16=bf16, recompute=recompute)
    given = output.last_hidden_state.untyped_storage().nbytes()
    assert expected == pytest.approx(sum(held.values()) - given, rel=0.08)
    longer, _ = saved_bytes(qwen3_config(config, vocabulary), 2 * num_ids, bf16=bf16, recompute=recompute)
    assert longer < 2.01 * expected, "no square of scores is kept"


def test_recomputation_takes_memory_off(tmp_path: Path) -> None:
    found = [weighed("nano/pretrain.yaml", tmp_path, f"recompute={what}") for what in ("none", "selective", "full")]
    activations = [facts["GB, 1 process"]["activations"] for facts in found]
    assert activations[0] > 1.5 * activations[1] > 1.5 * activations[2]
    assert len({facts["GFLOP per id"] for facts in found}) == 1, "work done twice is no use of the device"


def test_accumulation_multiplies_ids_and_not_memory(tmp_path: Path) -> None:
    plain, four = (weighed("smoke/pretrain.yaml", tmp_path, f"loop.accumulate={count}") for count in (1, 4))
    assert four["ids per step"] == 4 * plain["ids per step"]
    assert four["TFLOP per step"] == pytest.approx(4 * plain["TFLOP per step"], rel=1e-3)
    assert four["GB, 1 process"] == plain["GB, 1 process"]


def test_what_a_run_has_made_is_taken_before_what_recipes_say(tmp_path: Path) -> None:
    from tokenizers_mm.text import train_text_tokenizer

    tokenizer = train_text_tokenizer(["a red cat", "a blue dog"] * 20, vocabulary_size=290)
    folder = tmp_path / "run" / "text_tokenizer"
    folder.mkdir(parents=True)
    tokenizer.save(folder)
    (folder / "stage.json").write_text("{}")
    facts = weighed("smoke/pretrain.yaml", tmp_path)
    assert facts["vocabulary"]["text"] == tokenizer.codebook_size
    assert facts["tokenizers"][0] == "text: the run's"


def test_a_run_without_sound_is_weighed_without_it_and_one_without_text_not_at_all(tmp_path: Path) -> None:
    for name in ("pretrain", "text_tokenizer"):
        shutil.copy(find_recipe(f"smoke/{name}.yaml"), tmp_path)
    recipe = tmp_path / "pretrain.yaml"
    config = load_recipe(recipe, ["mixture={text>image: 1}"], root=tmp_path / "run")
    facts = weigh(config, recipe)
    assert set(facts["vocabulary"]) == {"text", "control", "region", "voken", "all, padded"}
    assert facts["tokenizers"][1:] == ["image: none", "audio: none"]
    (tmp_path / "text_tokenizer.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no text_tokenizer\.yaml beside the recipe"):
        weigh(config, recipe)


def test_a_checkpoint_to_start_from_gives_the_architecture(tmp_path: Path) -> None:
    model = create_model(load_recipe(find_recipe("smoke/pretrain.yaml")).model, Vocabulary.create(text=61), seed=0)  # type: ignore[attr-defined]
    model.save_pretrained(tmp_path / "llm")
    recipe = tmp_path / "pretrain.yaml"
    lines = find_recipe("smoke/pretrain.yaml").read_text().splitlines()
    recipe.write_text("\n".join(line for line in lines if not line.startswith("model:")) + "\ninit_from: llm\n")
    shutil.copy(find_recipe("smoke/text_tokenizer.yaml"), tmp_path)
    config = load_recipe(recipe, [f"init_from={tmp_path / 'llm'}"], root=tmp_path / "run")
    facts = weigh(config, recipe)
    layers = num_parameters(model.model.layers) + num_parameters(model.model.norm)
    assert facts["parameters"]["all"] == layers + facts["vocabulary"]["all, padded"] * model.config.hidden_size
    with pytest.raises(CheckpointError):
        weigh(load_recipe(recipe, [f"init_from={tmp_path / 'nothing'}"], root=tmp_path / "run"), recipe)
