"""Going on from a bundle: its tokenizers and decoder serve new data, its transformer learns on, what does not fit is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from anygen.api import AnyGen
from anygen.bundle import default_bundle
from anygen.data.records import Record, Utterance, write_shard
from anygen.data.source import flac_of, png_of
from anygen.errors import AnyGenError, CheckpointError, ConfigError
from anygen.files import publishing
from anygen.stages.base import StageConfig
from anygen.stages.dry_run import weigh
from anygen.stages.from_bundle import bundle_at
from anygen.stages.run import load_recipe, run_stage
from tokenizers_mm.media import Audio

STILL = {"steps": 1, "precision": "fp32", "device": "cpu", "optimizer": {"lr": 1e-12}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A run that has data of its own and nothing else."""
    from PIL import Image

    root = tmp_path / "run"
    (root / "data").mkdir(parents=True)
    sound = flac_of(Audio(0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(0)).numpy(), 16_000))
    for split in ("train", "validation"):
        records = [
            Record(f"r{i}", "own", ("a red apple",), png_of(Image.new("RGB", (16, 16), (9 * i, 0, 0))), (Utterance("one", "v", sound),))
            for i in range(8)
        ]  # fmt: skip
        write_shard(root / "data" / f"{split}-00000.tar", records)
    (root / "data" / "stage.json").write_text(json.dumps({"identity": "data", "config": {}, "metrics": {}}))
    return root


def recipe(root: Path, stage: str, **fields: Any) -> StageConfig:
    path = root.parent / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps({"stage": stage, **fields}, default=str))))
    return load_recipe(path, root=root)


def pretrain(root: Path, bundle: Path | str, **fields: Any) -> StageConfig:
    mixture = {"text>image": 1, "image>text": 1, "text>audio": 1, "audio>text": 1}
    own = {
        "layout": {"audio_order": "delay", "max_duration_s": 6.0},
        "location_bins": 10,
        "vokens": 4,
        "row_length": 512,
        "loop": STILL,
    }
    return recipe(root, "pretrain", **{"earlier_run": bundle, "init_from": bundle, "mixture": mixture, **own, **fields})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def bytes_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_own_data_goes_through_a_bundle_and_comes_out_as_one(root: Path, drawing_folder: Path) -> None:
    before = bytes_of(drawing_folder)
    run_stage(recipe(root, "tokenize", earlier_run=drawing_folder))
    run_stage(pretrain(root, drawing_folder))
    old, new = weights_of(drawing_folder), weights_of(root / "pretrain" / "model")
    assert old.keys() == new.keys() and all((old[name] - new[name]).abs().max() < 1e-4 for name in old)
    defaults = {"image": {"guidance_scale": 2.0}}
    run_stage(recipe(root, "bundle", name="own", earlier_run=drawing_folder, defaults=defaults))
    theirs, ours = (AnyGen.from_pretrained(f, device="cpu") for f in (drawing_folder, root / "bundle" / "own"))
    answers = [m.generate(text="a red apple", output="image", seed=3).image for m in (theirs, ours)]
    assert answers[0] is not None and answers[0].tobytes() == answers[1].tobytes()
    figures = ours.bundle.provenance["figures"]
    assert "validation_loss" in figures["pretrain"] and figures["tokenize"] == {"shards": 2.0}
    assert theirs.bundle.renderers == ours.bundle.renderers != {}, "the decoder goes with the codes that it draws"
    assert bytes_of(drawing_folder) == before


def test_recipes_and_figures_of_what_was_taken_are_handed_on(root: Path, bundle_folder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_folder, bundle)
    facts = json.loads((bundle / "anygen.json").read_text())
    facts["provenance"] = {"recipes": {"image_tokenizer": {"stage": "image_tokenizer", "batch_size": 7}}}
    facts["provenance"]["figures"] = {"image_tokenizer": {"validation_psnr_db": 23.5}}
    (bundle / "anygen.json").write_text(json.dumps(facts))
    (bundle / "manifest.json").unlink()
    with publishing(tmp_path / "again") as folder:
        shutil.copytree(bundle, folder, dirs_exist_ok=True)
    again = tmp_path / "again"
    run_stage(recipe(root, "tokenize", earlier_run=again))
    run_stage(pretrain(root, again))
    (made,) = run_stage(recipe(root, "bundle", name="own", earlier_run=again)).outputs
    provenance = json.loads((made / "anygen.json").read_text())["provenance"]
    assert provenance["recipes"]["image_tokenizer"]["batch_size"] == 7
    assert provenance["figures"]["image_tokenizer"] == {"validation_psnr_db": 23.5}
    assert "- validation_psnr_db: 23.5" in (made / "README.md").read_text()


def test_it_learns_from_there(root: Path, bundle_folder: Path) -> None:
    run_stage(recipe(root, "tokenize", earlier_run=bundle_folder))
    losses = [
        run_stage(pretrain(root, bundle_folder, loop=STILL | {"steps": n, "optimizer": {"lr": lr, "warmup_steps": 0}}))
        for n, lr in ((1, 1e-12), (30, 3e-3))
    ]
    first, last = (result.metrics["validation_loss"] for result in losses)
    assert last < first - 0.5


def test_the_parts_are_unpacked_once_and_again_where_they_change(
    root: Path, bundle_folder: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_folder, bundle)
    config = recipe(root, "tokenize", earlier_run=bundle)
    run_stage(config)
    made = (root / "from_bundle" / "image_tokenizer" / "stage.json").stat().st_mtime_ns
    assert run_stage(config).metrics["shards"] == 2
    assert (root / "from_bundle" / "image_tokenizer" / "stage.json").stat().st_mtime_ns == made
    (root / "from_bundle" / "image_tokenizer" / "tokenizer" / "config.json").write_text("{}")
    run_stage(config)
    assert not (root / "old").exists(), (
        "what was damaged is unpacked again; the codes stay, for it is the same tokenizer"
    )
    assert len((root / "from_bundle" / "image_tokenizer" / "tokenizer" / "config.json").read_text()) > 2


def test_what_a_run_has_made_itself_comes_first(root: Path, bundle_folder: Path) -> None:
    run_stage(recipe(root, "text_tokenizer", vocabulary_size=300, earlier_run=bundle_folder))
    run_stage(recipe(root, "tokenize", earlier_run=bundle_folder))
    assert not (root / "text_tokenizer").is_symlink() and (root / "image_tokenizer").is_symlink()
    with pytest.raises(
        CheckpointError, match=r"mean something else than this run's \(fingerprints.* differ\).*earlier_run"
    ):
        run_stage(pretrain(root, bundle_folder))


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"vokens": 5}, CheckpointError, "ranges"),
        ({"layout": {"audio_order": "flat", "max_duration_s": 6.0}}, CheckpointError, "the order of audio codes"),
        ({"code_rows": "codebook"}, ConfigError, "leave code_rows out"),
        ({"model": {"num_layers": 9}}, ConfigError, r"model.num_layers is 9, the checkpoint has"),
        ({"init_from": "nowhere"}, CheckpointError, "no checkpoint at nowhere"),
    ],
)
def test_a_recipe_that_does_not_fit_the_bundle_is_told(
    root: Path, bundle_folder: Path, fields: dict[str, Any], error: type[AnyGenError], says: str
) -> None:
    run_stage(recipe(root, "tokenize", earlier_run=bundle_folder))
    with pytest.raises(error, match=says):
        run_stage(pretrain(root, bundle_folder, **fields))


def test_a_damaged_bundle_is_told(root: Path, bundle_folder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundle_folder, bundle)
    run_stage(recipe(root, "tokenize", earlier_run=bundle))
    model = next(bundle.glob("*.safetensors"))
    model.write_bytes(model.read_bytes()[:-1] + b"\0")
    for config in (recipe(root, "tokenize", earlier_run=bundle), pretrain(root, bundle)):
        with pytest.raises(CheckpointError, match="was changed or damaged"):
            run_stage(config)


def test_nano_is_the_embedded_bundle_unless_a_folder_is_called_so(
    root: Path, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    assert bundle_at(Path("nano")) == default_bundle() and bundle_at(root) is None
    fields = {
        "layout": {"audio_order": "coarse", "audio_kept": 1, "max_duration_s": 6.0},
        "location_bins": 100,
        "vokens": 8,
    }
    run_stage(recipe(root, "tokenize", earlier_run="nano"))
    assert weigh(pretrain(root, "nano", **fields), None)["parameters"]["all"] > 9e6
    Path("nano").symlink_to(bundle_folder)
    assert bundle_at(Path("nano")) == Path("nano")


def clearer(root: Path, bundle: Path, **fields: Any) -> StageConfig:
    """Trains the decoder of the bundle's sounds on this run's."""
    asked = {"crop_s": 0.4, "batch_size": 4, "loop": {"steps": 3, "precision": "fp32", "device": "cpu"}} | fields
    return recipe(root, "audio_tokenizer", earlier_run=bundle, codes_of=bundle, **asked)


def provenance_of(bundle: Path) -> dict[str, Any]:
    return dict(json.loads((bundle / "anygen.json").read_text())["provenance"])


@pytest.fixture
def told_folder(bundle_folder: Path, tmp_path: Path) -> Path:
    """A bundle that says how its codec was made."""
    facts = json.loads((bundle_folder / "anygen.json").read_text())
    recipes = {"audio_tokenizer": {"stage": "audio_tokenizer", "batch_size": 7}, "data": {"stage": "data"}}
    facts["provenance"] |= {"recipes": recipes, "figures": {"audio_tokenizer": {"bits_per_s": 5.0}}}
    with publishing(tmp_path / "told") as folder:
        shutil.copytree(bundle_folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        (folder / "anygen.json").write_text(json.dumps(facts))
    return tmp_path / "told"


def test_a_transformer_gets_a_tokenizer_with_the_same_codes(root: Path, told_folder: Path, tmp_path: Path) -> None:
    run_stage(clearer(root, told_folder))
    (made,) = run_stage(recipe(root, "bundle", name="own", weights_of=told_folder)).outputs
    old, new = weights_of(told_folder), weights_of(made)
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    theirs, ours = (AnyGen.from_pretrained(f, device="cpu") for f in (told_folder, made))
    answers = [m.generate(text="a red apple", output="audio", seed=3, best_of=1).samples[0] for m in (theirs, ours)]
    assert answers[0].ids == answers[1].ids
    heard = [answer.of("audio")[0].samples_T for answer in answers]
    assert heard[0].shape == heard[1].shape and not (heard[0] == heard[1]).all()

    provenance = provenance_of(made)
    assert provenance["name"] == "own" and provenance["recipes"]["data"] == {"stage": "data"}, "the transformer's"
    assert provenance["recipes"]["audio_tokenizer"]["crop_s"] == 0.4
    assert set(provenance["changed"]["recipes"]) == {"audio_tokenizer", "data"}
    assert provenance["changed"]["instead_of"]["audio_tokenizer"]["batch_size"] == 7
    card = (made / "README.md").read_text()
    assert "- validation_mel_rehearsed: " in card and "bits_per_s" not in card

    further = tmp_path / "further" / "run"  # once more, from there
    shutil.copytree(root / "data", further / "data")
    run_stage(clearer(further, made, crop_s=0.3))
    (last,) = run_stage(recipe(further, "bundle", name="b", weights_of=made)).outputs
    told = provenance_of(last)
    assert told["recipes"]["audio_tokenizer"]["crop_s"] == 0.3
    assert told["changed"]["instead_of"]["audio_tokenizer"]["crop_s"] == 0.4
    assert told["changed"]["before"] == provenance["changed"]
    handed = json.loads((further / "from_bundle" / "audio_tokenizer" / "stage.json").read_text())
    assert handed["config"]["crop_s"] == 0.4, "who goes on from it inherits the codec's own recipe"

    (tmp_path / "same").mkdir()
    (same,) = run_stage(recipe(tmp_path / "same" / "run", "bundle", name="c", weights_of=made)).outputs
    assert provenance_of(same) == provenance | {"name": "c"}, "nothing was changed"


def test_a_codec_of_another_run_is_told_too(root: Path, told_folder: Path, tmp_path: Path) -> None:
    run_stage(clearer(root, told_folder))
    run_stage(recipe(root, "bundle", name="a", weights_of=told_folder))
    other = tmp_path / "other" / "run"
    other.parent.mkdir()
    (made,) = run_stage(recipe(other, "bundle", name="b", weights_of=told_folder, earlier_run=root)).outputs
    assert provenance_of(made)["recipes"]["audio_tokenizer"]["crop_s"] == 0.4


def test_a_transformer_that_does_not_fit_is_refused_and_the_bundle_of_before_stays(
    root: Path, bundle_folder: Path, tmp_path: Path
) -> None:
    def bundled(**fields: Any) -> Path:
        return run_stage(recipe(root, "bundle", **{"name": "own", "weights_of": bundle_folder} | fields)).outputs[0]

    made = bundled()
    with pytest.raises(AnyGenError, match="nowhere"):
        bundled(weights_of=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="lies in this stage's own folder"):
        bundled(weights_of=made)
    codec = {"rate_hz": 16_000, "ratios": [8, 5, 4, 2], "num_filters": 2, "latent_dim": 8, "codebook_size": 16}
    loop = {"steps": 3, "precision": "fp32", "device": "cpu"}
    run_stage(
        recipe(root, "audio_tokenizer", codec=codec, decoder={"width": 16, "depth": 1}, crop_s=0.3, batch_size=2,
               steps_without_quantiser=1, loop=loop)
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="audio tokenizer is not the one that this model was trained with"):
        bundled()
    shutil.rmtree(root / "audio_tokenizer")
    (root / "pretrain").mkdir()
    with pytest.raises(ConfigError, match="has one of its own"):
        bundled(name="other")
    assert made.is_dir() and not (root / "old").exists()


def test_a_codec_in_the_stages_own_folder_is_refused_and_stays(root: Path, bundle_folder: Path) -> None:
    run_stage(clearer(root, bundle_folder))
    own = root / "audio_tokenizer" / "tokenizer"
    for asked in ({"codes_of": own, "loop": STILL}, {"checkpoint": own}):
        with pytest.raises(ConfigError, match="lies in this stage's own folder"):
            run_stage(recipe(root, "audio_tokenizer", **asked))
        assert own.is_dir()
