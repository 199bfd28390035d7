"""Going on from a bundle: its tokenizers and decoder as an earlier run, its transformer as the start of a training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from anygen.bundle import ANYGEN_JSON, bundle_folder, load_bundle
from anygen.errors import CheckpointError
from anygen.files import is_published, publishing, read_json, sha256_of, verify, write_json
from anygen.layout import Layout
from anygen.model import attention
from anygen.vocabulary import Vocabulary
from tokenizers_mm.codes import fingerprint_of

PARTS = {
    "text_tokenizer": ("tokenizers/text", "."),
    "image_tokenizer": ("tokenizers/image", "tokenizer"),
    "audio_tokenizer": ("tokenizers/audio", "tokenizer"),
    "decoder": ("decoders/image", "model"),
}
"""Stage -> its part of a bundle, and where the stage keeps that. The transformer is not among them: training goes on
from it by `init_from` of the stage pretrain."""


def bundle_at(path: Path) -> Path | None:
    """The bundle that a recipe names: a folder, or `nano`, the embedded one; None where there is no bundle.

    Raises:
        CheckpointError: `nano` is meant, and this installation was built without it.
    """
    folder = bundle_folder(path)
    return folder if (folder / ANYGEN_JSON).is_file() else None


def as_run(bundle: Path, root: Path) -> Path:
    """Unpack the parts of a bundle into `root/from_bundle/STAGE`, where they do not lie there yet; returns that folder.

    A stage's identity is that of its part, so a bundle with the same tokenizers and another model changes nothing.

    Raises:
        CheckpointError: the bundle is damaged.
    """
    verify(bundle)
    run = root / "from_bundle"
    provenance = read_json(bundle / ANYGEN_JSON)["provenance"]
    recipes, figures = provenance.get("recipes", {}), provenance.get("figures", {})
    parts = {stage: part for stage, (part, _) in PARTS.items() if (bundle / part).is_dir()}
    identities = {stage: identity_of(bundle / part) for stage, part in parts.items()}
    if is_published(run) and identities == {p.parent.name: read_json(p)["identity"] for p in run.glob("*/stage.json")}:
        return run
    with publishing(run) as folder:
        for stage, part in parts.items():
            shutil.copytree(bundle / part, folder / stage / PARTS[stage][1])
            facts = {"config": recipes.get(stage, {"stage": stage}), "metrics": figures.get(stage, {}), "outputs": {}}
            write_json(folder / stage / "stage.json", {"identity": identities[stage], **facts})
    return run


def model_of(bundle: Path, vocabulary: Vocabulary, layout: Layout) -> Any:
    """The `Qwen3ForCausalLM` of a bundle, fp32, with our attention, to be trained on.

    Raises:
        CheckpointError: it is damaged, or its ids mean something else than by `vocabulary` and the orders of `layout`.
    """
    opened = load_bundle(bundle, device="cpu")
    theirs, ours = opened.vocabulary.manifest(), vocabulary.manifest()
    odd = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    odd += [f"the order of {m} codes" for m, order in layout.orders.items() if opened.layout.orders.get(m) != order]
    if odd:
        raise CheckpointError(
            f"init_from: the ids of {bundle} mean something else than this run's ({', '.join(odd)} differ): take its "
            f"tokenizers by `earlier_run: {bundle}` in the recipes of tokenize and pretrain, and say its "
            "location_bins, vokens and layout"
        )
    opened.model.train().requires_grad_(True).set_attn_implementation(attention.register())
    return opened.model


def identity_of(part: Path) -> str:
    """Of the files of a part of a bundle; of none where it is not there."""
    files = (path for path in part.rglob("*") if path.is_file())
    return fingerprint_of({file.relative_to(part).as_posix(): sha256_of(file) for file in files})
