"""Warm start: what the language model knew is there before the first step, new rows are as documented, others are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from anygen.data.coded import CodedRecord, write_coded_shard
from anygen.errors import AnyGenError, CheckpointError, ConfigError
from anygen.files import read_json
from anygen.model.attention import Segments
from anygen.model.causal import ModelConfig
from anygen.model.warm_start import NOISE, warm_start
from anygen.stages.pretrain import PretrainConfig, load_pretrained
from anygen.stages.run import load_recipe, run_stage
from anygen.stages.tokenize import coded_facts
from anygen.vocabulary import Vocabulary
from tokenizers_mm.llm_text import TOKENIZER_JSON, LLMTextTokenizer
from tokenizers_mm.text import TextTokenizer

PADDED = 384
"""Rows of the language models here: more than their tokenizer has ids, as published ones have."""


def qwen3(folder: Path, *, tied: bool, dtype: torch.dtype = torch.float32, **saving: Any) -> Any:
    """A tiny random Qwen3 checkpoint with the odd settings of a published one."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=PADDED,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=10,
        intermediate_size=40,
        max_position_embeddings=96,
        tie_word_embeddings=tied,
        rope_theta=1_000_000.0,
        eos_token_id=300,
        pad_token_id=7,
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.01 * torch.randn_like(parameter))
    model.generation_config.temperature = 0.6
    model.generation_config.do_sample = True
    model.save_pretrained(folder, **saving)
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory, llm_json: bytes) -> Path:
    """Untied, with its tokenizer. Do not change it: copy it first."""
    folder = tmp_path_factory.mktemp("llm") / "qwen"
    qwen3(folder, tied=False)
    (folder / TOKENIZER_JSON).write_bytes(llm_json)
    return folder


def vocabulary_of(text: Any) -> Vocabulary:
    return Vocabulary.create(text=text.codebook_size, image=(1, 70), voken=3, unused_text=text.unused_codes)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("dtype", "saving"), [(torch.float32, {}), (torch.bfloat16, {}), (torch.float32, {"max_shard_size": "20KB"})]
)
def test_text_logits_are_those_of_the_language_model(
    tmp_path: Path, llm_json: bytes, tied: bool, dtype: torch.dtype, saving: dict[str, Any]
) -> None:
    original = qwen3(tmp_path, tied=tied, dtype=dtype, **saving)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if not saving else len(list(tmp_path.glob("*-of-*"))))
    (tmp_path / TOKENIZER_JSON).write_bytes(llm_json)
    text = LLMTextTokenizer(llm_json)
    vocabulary = vocabulary_of(text)
    random_state = torch.get_rng_state()
    model = warm_start(tmp_path, vocabulary, text, seed=0).eval()
    assert torch.equal(torch.get_rng_state(), random_state), "the global random state is left alone"
    ids = torch.from_numpy(text.encode("a red apple, two cats! left of <|im_end|>").codes_KT.copy())
    assert ids.shape[1] > 20
    with torch.no_grad():
        segments = Segments((ids.shape[1],), torch.device("cpu"))
        found, expected = model(ids, segments=segments).logits, original(ids).logits
    size = text.codebook_size
    assert found.shape[-1] == vocabulary.size and expected.abs().max() > 0.5
    assert torch.allclose(found[..., :size], expected[..., :size], atol=1e-5, rtol=0)
    embedding = model.get_input_embeddings().weight
    assert torch.equal(embedding[:size], original.get_input_embeddings().weight[:size]), "kept verbatim"
    assert (model.get_output_embeddings().weight is embedding) == tied
    assert model.dtype == torch.float32 and model.config.vocab_size == vocabulary.size
    assert model.config.max_position_embeddings == 96
    assert model.config.rope_parameters["rope_theta"] == 1_000_000.0
    assert model.config.eos_token_id == model.generation_config.eos_token_id == vocabulary.control("eos")
    assert not model.generation_config.do_sample, "the checkpoint's sampling defaults are of its own ids"


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_of_the_old_ones_and_a_little_noise(tmp_path: Path, llm_json: bytes, tied: bool) -> None:
    original = qwen3(tmp_path, tied=tied)
    (tmp_path / TOKENIZER_JSON).write_bytes(llm_json)
    text = LLMTextTokenizer(llm_json)
    size = text.codebook_size
    with torch.no_grad():
        original.get_input_embeddings().weight[size:] = 100  # padding rows, which must not count
    original.save_pretrained(tmp_path)
    model = warm_start(tmp_path, vocabulary_of(text), text, seed=3)
    for new, old in (
        (model.get_input_embeddings(), original.get_input_embeddings()),
        (model.get_output_embeddings(), original.get_output_embeddings()),
    ):
        known, rows = old.weight[:size].detach(), new.weight[size:].detach()
        noise = (rows - known.mean(0)) / (known - known.mean(0)).square().mean().sqrt()
        assert abs(noise.std().item() / NOISE - 1) < 0.05 and noise.abs().max() < 6 * NOISE
        assert len({tuple(row) for row in rows.tolist()}) == len(rows), "no two are the same"
    if not tied:
        inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        assert not torch.allclose(inputs[size:], outputs[size:], atol=1e-3)
    again, other = (warm_start(tmp_path, vocabulary_of(text), text, seed=seed) for seed in (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_our_pieces_start_as_the_mean_of_the_tokens_that_spell_them(
    llm_folder: Path, text_tokenizer: TextTokenizer, llm_json: bytes
) -> None:
    theirs = LLMTextTokenizer(llm_json)
    model = warm_start(llm_folder, vocabulary_of(text_tokenizer), text_tokenizer, seed=0)
    rows = model.get_input_embeddings().weight.detach()
    old = load_file(llm_folder / "model.safetensors")
    several = 0
    for code in range(1, text_tokenizer.codebook_size):
        ids = theirs.spell(text_tokenizer.piece_bytes(code))
        several += len(ids) > 1
        assert torch.allclose(rows[code], old["model.embed_tokens.weight"][ids].mean(0), atol=1e-6)
        head = model.get_output_embeddings().weight[code]
        assert torch.allclose(head, old["lm_head.weight"][ids].mean(0), atol=1e-6)
    assert several > 5
    mean = old["model.embed_tokens.weight"][: theirs.codebook_size].mean(0)
    assert torch.allclose(rows[0], mean, atol=6 * NOISE), "SentencePiece's unknown spells nothing"


def test_a_checkpoint_without_tokenizer_keeps_its_layers_for_our_pieces(
    llm_folder: Path, tmp_path: Path, text_tokenizer: TextTokenizer, llm_json: bytes
) -> None:
    shutil.copytree(llm_folder, tmp_path / "bare")
    (tmp_path / "bare" / TOKENIZER_JSON).unlink()
    model = warm_start(tmp_path / "bare", vocabulary_of(text_tokenizer), text_tokenizer, seed=0)
    old = load_file(llm_folder / "model.safetensors")
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, old["model.layers.1.mlp.up_proj.weight"])
    noise = model.get_input_embeddings().weight - old["model.embed_tokens.weight"].mean(0)
    assert 0 < noise.std() < 2 * NOISE * old["model.embed_tokens.weight"].std()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json to compare it with"):
        warm_start(tmp_path / "bare", vocabulary_of(LLMTextTokenizer(llm_json)), LLMTextTokenizer(llm_json), seed=0)


# -- from a recipe


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with coded shards of captions and nothing else."""
    monkeypatch.setattr("anygen.stages.pretrain.VALIDATION_EXAMPLES", 4)
    root = tmp_path / "run"
    for split in ("train", "validation"):
        captions = ("a red apple", "two cats left of a dog", "one")
        records = [CodedRecord(f"{split}{i}", "emoji", captions, None, (), (), ()) for i in range(8)]
        write_coded_shard(root / "tokenize" / f"{split}-00000", iter(records), facts=coded_facts(None, None))
    for stage in ("data", "tokenize"):
        (root / stage).mkdir(exist_ok=True)
        (root / stage / "stage.json").write_text(json.dumps({"identity": stage}))
    return root


def recipe(root: Path, stage: str, **fields: Any) -> Any:
    path = root.parent / f"{stage}.yaml"
    path.write_text(json.dumps({"stage": stage, **fields}, default=str))  # JSON is YAML
    return load_recipe(path, root=root)


def pretrain(root: Path, folder: Path, *, steps: int = 2, **fields: Any) -> PretrainConfig:
    loop = {"steps": steps, "log_every": 1, "save_every": 100, "device": "cpu", "precision": "fp32"}
    row = {"row_length": 64, "rows_per_batch": 1, "pool_size": 4, "loop": loop, "mixture": {"text>text": 1}}
    config: PretrainConfig = recipe(root, "pretrain", init_from=folder, **row, **fields)
    return config


def test_a_run_that_starts_from_a_language_model_with_its_tokenizer(root: Path, llm_folder: Path) -> None:
    taken = run_stage(recipe(root, "text_tokenizer", checkpoint=llm_folder))
    assert taken.metrics["unused"] == 5 and (root / "text_tokenizer" / TOKENIZER_JSON).is_file()
    config = pretrain(root, llm_folder)
    result = run_stage(config)
    model, vocabulary, _ = load_pretrained(root / "pretrain" / "model")
    text = LLMTextTokenizer.load(llm_folder)
    assert vocabulary.range("text").size == text.codebook_size and vocabulary.unused_text == text.unused_codes
    assert Vocabulary.from_manifest(vocabulary.manifest()) == vocabulary
    old = load_file(llm_folder / "model.safetensors")
    moved = (
        model.get_input_embeddings().weight[: text.codebook_size]
        - old["model.embed_tokens.weight"][: text.codebook_size]
    )
    assert 0 < moved.abs().max() < 0.1, "trained from where the language model was"
    assert np.isfinite(result.metrics["validation_loss"])
    recorded = read_json(root / "pretrain" / "stage.json")["config"]
    assert recorded["init_from"] == str(llm_folder) and "model" not in recorded
    assert str(llm_folder) not in (root / "pretrain" / "model" / "config.json").read_text()


def test_a_run_is_done_anew_when_the_checkpoint_changes(root: Path, llm_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(llm_folder, folder)
    run_stage(recipe(root, "text_tokenizer", checkpoint=folder))
    config = pretrain(root, folder, steps=1)
    run_stage(config)
    stamp = (root / "pretrain" / "stage.json").stat().st_mtime_ns
    run_stage(config)
    assert (root / "pretrain" / "stage.json").stat().st_mtime_ns == stamp, "done and unchanged"
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    run_stage(config)
    assert (root / "old" / "pretrain-1" / "stage.json").is_file()


def test_a_recipe_without_a_checkpoint_is_recorded_as_ever() -> None:
    config = PretrainConfig(mixture={"text>text": 1}, loop={"steps": 1})  # type: ignore[arg-type]
    facts = config.model_dump(mode="json", exclude={"root"})
    assert "init_from" not in facts and facts["model"]["size"] == "nano" and "root" not in facts
    assert PretrainConfig(**facts) == config


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"size": "nano"}, "model.width is 320, the checkpoint has 24; model.num_layers is 6"),
        ({"num_layers": 3}, "model.num_layers is 3, the checkpoint has 2"),
        ({"tie_embeddings": True}, "model.tie_embeddings is True, the checkpoint has False"),
        ({"max_positions": 4096}, "model.max_positions is 4096, the checkpoint has 96"),
        ({"num_layers": 2, "max_positions": 96, "tie_embeddings": False}, None),
    ],
)
def test_a_recipe_that_names_another_architecture_is_told(
    root: Path, llm_folder: Path, model: dict[str, Any], says: str | None
) -> None:
    run_stage(recipe(root, "text_tokenizer", checkpoint=llm_folder))
    config = pretrain(root, llm_folder, steps=1, model=model)
    assert isinstance(config.model, ModelConfig)
    if says is None:
        run_stage(config)
        return
    with pytest.raises(ConfigError, match=says):
        run_stage(config)
    assert not (root / "pretrain").exists()


def changed(folder: Path, **fields: Any) -> None:
    facts = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**facts, **fields}))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without(name: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return remove


def more_codes_than_rows(folder: Path) -> None:
    facts = read_json(folder / TOKENIZER_JSON)
    facts["added_tokens"][-1]["id"] = PADDED
    (folder / TOKENIZER_JSON).write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: shutil.rmtree(f), "there is no checkpoint at"),
        (lambda f: (f / "config.json").unlink(), r"cannot read .*config\.json"),
        (lambda f: (f / "config.json").write_text("[]"), "only 'qwen3' can be started from"),
        (lambda f: changed(f, model_type="llama"), "holds a 'llama' model; only 'qwen3'"),
        (lambda f: changed(f, attention_bias=True), "attention_bias=True"),
        (lambda f: changed(f, use_sliding_window=True), "use_sliding_window=True"),
        (lambda f: changed(f, hidden_act="gelu"), "hidden_act=gelu"),
        (lambda f: changed(f, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "'dynamic'"),
        (lambda f: changed(f, auto_map={"AutoModel": "x.Y"}), "has auto_map"),
        (lambda f: changed(f, quantization_config={"quant_method": "awq"}), "has quantization_config"),
        (lambda f: changed(f, hidden_size="wide"), r"config\.json is broken"),
        (lambda f: changed(f, hidden_size=32), "cannot be read|do not fit"),
        (lambda f: changed(f, num_hidden_layers=3, layer_types=["full_attention"] * 3), "do not fit its config.json"),
        (lambda f: changed(f, num_hidden_layers=1, layer_types=["full_attention"]), "do not fit its config.json"),
        (only_pickles, r"no weights in \*\.safetensors; pytorch_model\.bin is a pickle"),
        (without("lm_head.weight"), "do not fit its config.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b"junk"), "cannot be read"),
        (lambda f: (f / TOKENIZER_JSON).write_bytes(b"junk"), "not a tokenizer"),
        (more_codes_than_rows, "the checkpoint 384 rows"),
    ],
)
def test_what_cannot_be_started_from_is_told(
    llm_folder: Path, tmp_path: Path, text_tokenizer: TextTokenizer, harm: Callable[[Path], None], says: str
) -> None:
    folder = tmp_path / "llm"
    shutil.copytree(llm_folder, folder)
    harm(folder)
    with pytest.raises(AnyGenError, match=says) as caught:
        warm_start(folder, vocabulary_of(text_tokenizer), text_tokenizer, seed=0)
    assert isinstance(caught.value, CheckpointError | ConfigError)
