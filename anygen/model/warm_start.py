"""A published Qwen3 checkpoint as the start of a model whose vocabulary is longer.

    text ids     the checkpoint's own rows, as they are, where the run has its tokenizer; otherwise each piece starts as
                 the mean of the rows of the tokens that spell it
    all others   (control tokens, codes, unused text): the mean of the old rows plus noise of `NOISE` times their spread

With the mean in the output matrix a new id is no likelier than an average old one, so that what the language model knew
is hardly disturbed (Hewitt 2021, "Initializing New Word Embeddings"). Rows beyond the checkpoint's tokenizer, which pad
its matrix and were never trained, are left out. The depth, width, positions and rope of the checkpoint stay.

Dimension key: O old rows, V new ones, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anygen.errors import CheckpointError, ConfigError
from anygen.files import read_json, sha256_of
from anygen.model import attention
from anygen.model.causal import ModelConfig, qwen3_config
from anygen.seeding import borrowed_randomness
from anygen.vocabulary import Vocabulary
from tokenizers_mm import compat  # noqa: F401  before transformers
from tokenizers_mm.llm_text import TOKENIZER_JSON, LLMTextTokenizer, SomeTextTokenizer
from tokenizers_mm.weights import UNREADABLE

NOISE = 0.1
"""Standard deviation of the noise in new rows, in standard deviations of the old rows around their mean."""

_FIELDS = {
    "width": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "mlp_width": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
_PLAIN = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
_ROPES = ("default", "linear", "llama3", "yarn")  # the others change with the length that has been read


def warm_start(folder: Path, vocabulary: Vocabulary, text: SomeTextTokenizer, *, seed: int) -> Any:
    """A `Qwen3ForCausalLM` over `vocabulary`, fp32, with our attention, that starts from the checkpoint in `folder`.

    Raises:
        CheckpointError: no checkpoint, of another architecture, damaged, or not that of the run's text tokenizer.
    """
    spelling = _spelling(folder, text)
    model = _load(folder)
    num_known = model.config.vocab_size if spelling is None else spelling.num_known
    if num_known > model.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer in {folder} has {num_known} ids, the checkpoint {model.config.vocab_size} rows"
        )
    generator = torch.Generator().manual_seed(seed)
    matrices = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        matrices.append(model.get_output_embeddings())
    rows = [
        _extended(
            matrix.weight.detach()[:num_known], spelling.rows if spelling else [], vocabulary.size, generator=generator
        )
        for matrix in matrices
    ]
    with borrowed_randomness(seed):  # it draws rows, which are replaced
        model.resize_token_embeddings(vocabulary.size, mean_resizing=False)
    for matrix, rows_VD in zip((model.get_input_embeddings(), model.get_output_embeddings()), rows, strict=False):
        with torch.no_grad():
            matrix.weight.copy_(rows_VD)
    _rename_specials(model, vocabulary)
    model.set_attn_implementation(attention.register())
    return model


def check_named(config: ModelConfig, folder: Path) -> None:
    """Refuse a recipe whose `model` names another architecture than the checkpoint in `folder` has.

    Raises:
        ConfigError: by name, what the recipe says and what the checkpoint has.
        CheckpointError: no checkpoint, or of another architecture.
    """
    found = read_qwen3_config(folder)
    wanted = qwen3_config(config, Vocabulary.create(text=1))
    sizes = {"width", "num_layers", "num_heads", "num_kv_heads", "head_width", "mlp_width"}
    named = config.model_fields_set | (sizes if "size" in config.model_fields_set else set())
    odd = [
        f"{name} is {getattr(wanted, field)}, the checkpoint has {getattr(found, field)}"
        for name, field in _FIELDS.items()
        if name in named and getattr(wanted, field) != getattr(found, field)
    ]
    if odd:
        raise ConfigError(
            f"init_from and model contradict each other: model.{'; model.'.join(odd)}. "
            f"The architecture is that of {folder}: leave model out of the recipe"
        )


def checkpoint_fingerprints(folder: Path) -> dict[str, str]:
    """Name and sha256 of every file that a warm start reads."""
    names = ("config.json", "model.safetensors.index.json", TOKENIZER_JSON)
    files = [*(folder / name for name in names if (folder / name).is_file()), *folder.glob("*.safetensors")]
    return {file.name: sha256_of(file) for file in sorted(files)}


def read_qwen3_config(folder: Path) -> Any:
    """The `transformers.Qwen3Config` of a checkpoint, checked for what this project computes.

    Raises:
        CheckpointError: none there, another architecture, a variant of Qwen3 that is not computed here, or no weights
        in safetensors.
    """
    from transformers import Qwen3Config

    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint at {folder}: expected a folder of a Qwen3 model")
    facts = read_json(folder / "config.json")
    if not isinstance(facts, dict) or facts.get("model_type") != "qwen3":
        kind = facts.get("model_type") if isinstance(facts, dict) else type(facts).__name__
        raise CheckpointError(f"{folder} holds a {kind!r} model; only 'qwen3' can be started from")
    if not any(folder.glob("*.safetensors")):
        pickles = [path.name for path in folder.glob("*.bin")]
        hint = f"; {pickles[0]} is a pickle, which is never opened: save the model as safetensors" if pickles else ""
        raise CheckpointError(f"{folder} has no weights in *.safetensors{hint}")
    for name in ("auto_map", "quantization_config"):
        if facts.get(name):
            raise CheckpointError(f"{folder / 'config.json'} has {name}; a plain Qwen3 model is expected")
    try:
        config = Qwen3Config.from_dict(facts)
        rope = config.rope_parameters["rope_type"]
    except UNREADABLE as error:
        raise CheckpointError(f"{folder / 'config.json'} is broken: {str(error).splitlines()[0]}") from error
    odd = [f"{name}={getattr(config, name)}" for name, plain in _PLAIN.items() if getattr(config, name, plain) != plain]
    odd += [f"rope_type={rope!r}"] if rope not in _ROPES else []
    if odd:
        raise CheckpointError(f"{folder} is a Qwen3 variant that is not computed here: {', '.join(odd)}")
    return config


@dataclass(frozen=True)
class _Spelling:
    """Which old rows each text code starts from, and how many of the old rows stand for something."""

    rows: list[list[int]]
    num_known: int


def _spelling(folder: Path, text: SomeTextTokenizer) -> _Spelling | None:
    """None where nothing says what the old rows stand for."""
    if not (folder / TOKENIZER_JSON).is_file():
        if isinstance(text, LLMTextTokenizer):
            raise CheckpointError(
                f"the run's text tokenizer is a language model's, and {folder} has no {TOKENIZER_JSON} to compare it "
                "with: put the one that belongs to this checkpoint there"
            )
        return None
    theirs = LLMTextTokenizer.load(folder)
    codes = range(text.codebook_size)
    if text.fingerprint == theirs.fingerprint:
        return _Spelling([[code] for code in codes], theirs.codebook_size)
    return _Spelling([theirs.spell(text.piece_bytes(code)) for code in codes], theirs.codebook_size)


def _extended(old_OD: Tensor, spelling: list[list[int]], num_rows: int, *, generator: torch.Generator) -> Tensor:
    """`num_rows` rows: row i is the mean of the old rows in `spelling[i]`, or new where that names none.

    >>> old_OD = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    >>> _extended(old_OD, [[1], [0, 1], []], 4, generator=torch.Generator().manual_seed(0))[:2].tolist()
    [[3.0, 2.0], [2.0, 1.0]]
    """
    mean_D = old_OD.mean(0)
    spread = (old_OD - mean_D).square().mean().sqrt()
    rows_VD = mean_D + NOISE * spread * torch.randn(num_rows, old_OD.shape[1], generator=generator)
    told = [code for code, ids in enumerate(spelling) if ids]
    if told:
        flat = torch.tensor([id for code in told for id in spelling[code]])
        lengths = torch.tensor([len(spelling[code]) for code in told])
        rows_VD[told] = F.embedding_bag(flat, old_OD, lengths.cumsum(0) - lengths, mode="mean")
    return rows_VD


def _load(folder: Path) -> Any:
    from transformers import Qwen3ForCausalLM

    config = read_qwen3_config(folder)
    try:
        model, report = Qwen3ForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except UNREADABLE as error:
        raise CheckpointError(f"the model in {folder} cannot be read: {str(error).splitlines()[0]}") from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report[kind]:
            raise CheckpointError(
                f"the weights in {folder} do not fit its config.json ({kind}: {sorted(map(str, report[kind]))[0]})"
            )
    return model


def _rename_specials(model: Any, vocabulary: Vocabulary) -> None:
    """Our begin, end and padding in place of the checkpoint's, and nothing of its sampling defaults."""
    from transformers import GenerationConfig

    for name in ("bos", "eos", "pad"):
        setattr(model.config, f"{name}_token_id", vocabulary.control(name))
    model.generation_config = GenerationConfig.from_model_config(model.config)
    # as in a model made anew: nothing is learnt for padding
    model.model.padding_idx = model.get_input_embeddings().padding_idx = vocabulary.control("pad")
