"""Recipes are strict, and say what is wrong."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anygen.config import Config, build, override, read_yaml
from anygen.data.sources import EmojiSource
from anygen.errors import ConfigError, InputError
from anygen.recipes_index import copy_recipe, find_recipe, list_recipes, recipes_folder
from anygen.stages.catalogue import STAGES
from anygen.stages.run import load_recipe


class Inner(Config):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)


class Outer(Config):
    steps: int
    inner: Inner = Inner()


def test_values_come_from_defaults_yaml_and_overrides_in_that_order() -> None:
    values = override({"steps": 5, "inner": {"lr": "1e-4"}}, ["inner.lr=1e-2"])
    config = build(Outer, values, source="x")
    assert (config.steps, config.inner.lr, config.inner.betas) == (5, 0.01, (0.9, 0.99))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"steps": 1, "stepz": 2}, r"r\.yaml: unknown key 'stepz'; did you mean 'steps'\?"),
        ({"steps": 1, "inner": {"learning": 2}}, r"unknown key 'inner\.learning'; valid keys: betas, lr"),
        ({"steps": 1, "inner": {"lrr": 2}}, r"unknown key 'inner\.lrr'; did you mean 'lr'\?"),
        ({}, "key 'steps' is missing"),
        ({"steps": "many"}, "key 'steps': .* got 'many'"),
        ({"steps": 1, "inner": {"betas": [1]}}, r"inner\.betas"),
        ({"stepz": 1, "inner": 3}, "steps.*inner"),
    ],
)
def test_faults_are_named(values: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        build(Outer, values, source="r.yaml")


@pytest.mark.parametrize("text", ["steps", "=1", "a..b=1", "a=[1", "a.=2"])
def test_malformed_overrides(text: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        override({}, [text])


def test_an_override_inside_a_number() -> None:
    with pytest.raises(ConfigError, match="'a' holds 1, which has no keys"):
        override({}, ["a=1", "a.b=2"])


def test_an_override_leaves_the_values_as_they_were() -> None:
    values = {"a": {"b": 1}}
    assert override(values, ["a.b=2"]) == {"a": {"b": 2}} and values == {"a": {"b": 1}}


def test_the_override_of_the_readme_replaces_the_mixture() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"`pretrain\.(mixture=\{.*?\})`", readme)
    config = load_recipe(find_recipe("smoke/pretrain.yaml"), [text], root=Path("unused"))
    assert config.mixture == {"text>image": 1, "image>text": 1}  # type: ignore[attr-defined]


@pytest.mark.parametrize("content", ["", "- 1", "a: [", "5", "\x00", "1: 2"])
def test_files_that_are_no_recipes(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError):
        read_yaml(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_yaml(tmp_path / "absent.yaml")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=6), c, max_size=3)))  # fmt: skip
def test_any_values_are_a_config_or_a_config_error(values: object) -> None:
    if not isinstance(values, dict):
        values = {"steps": values}
    try:
        build(Outer, values, source="x")
    except ConfigError:
        pass


def test_unions_of_sources_name_the_key() -> None:
    from anygen.stages.data import DataConfig

    with pytest.raises(ConfigError, match=r"unknown key 'sources\.0\.emoji\.voicez'; did you mean 'voices'"):
        build(DataConfig, {"sources": [{"kind": "emoji", "voicez": []}]}, source="x")
    with pytest.raises(ConfigError, match="held out"):
        EmojiSource(voices=("rms",)).open()


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_loads_and_its_header_gives_its_command(name: str) -> None:
    path = find_recipe(name)
    config = load_recipe(path)
    assert config.stage in STAGES
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert header[0] == f"# anygen train recipes/{name}"
    assert any("CPU" in line or "GPU" in line for line in header[1:]), "hardware and time stand in the header"


def test_every_family_is_complete_and_in_order() -> None:
    without = {"smoke": set(), "nano": {"teacher"}, "own": {"teacher", "decoder", "vokens", "evaluate", "gallery"}}
    for family, left_out in without.items():
        stages = {load_recipe(p).stage for p in (recipes_folder() / family).glob("*.yaml")}
        assert stages == set(STAGES) - left_out


def test_recipes_are_copied_but_never_over_something(tmp_path: Path) -> None:
    copied = copy_recipe("smoke/pretrain.yaml", tmp_path)
    assert load_recipe(copied).stage == "pretrain"
    with pytest.raises(InputError, match="exists already"):
        copy_recipe("smoke/pretrain.yaml", tmp_path)
    family = copy_recipe("smoke", tmp_path / "mine")
    assert len(list(family.glob("*.yaml"))) == len(STAGES)

    within = copy_recipe("own/from_nano", tmp_path / "within")
    assert {path.name for path in within.iterdir()} == {"data.yaml", "tokenize.yaml", "pretrain.yaml", "bundle.yaml"}
    for name in ("smoke/nothing.yaml", "own/nothing"):
        with pytest.raises(InputError, match="there is no recipe"):
            copy_recipe(name, tmp_path)


@pytest.mark.parametrize(
    ("stage", "override", "says"),
    [
        ("image_tokenizer", "encoder.codebok_size=64", "did you mean 'codebook_size'"),
        ("image_tokenizer", "encoder.width=65", "width=65 must be a multiple of num_heads"),
        ("image_tokenizer", "encoder.patch_px=7", "side_px=64 must be a multiple of patch_px=7"),
        ("image_tokenizer", "head.num_heads=0", "greater than or equal to 1"),
        ("audio_tokenizer", "codec.codebook_size=1000", "must be a power of two"),
        ("audio_tokenizer", "decoder.kernel=4", "must be odd"),
    ],
)
def test_an_impossible_tokenizer_is_told_before_any_training(stage: str, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_recipe(find_recipe(f"smoke/{stage}.yaml"), (override,), root=Path("unused"))


def test_keys_that_do_not_fit_each_other_are_told_shortly() -> None:
    with pytest.raises(ConfigError) as told:
        load_recipe(find_recipe("speech/audio_tokenizer.yaml"), ["decoder.upsampling=7"])
    assert str(told.value).endswith(": decoder.upsampling=7 does not divide the codec's hop of 320")
