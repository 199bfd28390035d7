r"""The weights of two bundles, averaged: what further training took away comes back, most of what it gave stays.

    python recipes/nano/questions/average.py runs/listed/bundle/nano runs/more_voices/bundle/nano \
        --share 0.7 --out runs/averaged_start/bundle/nano

WiSE-FT (arXiv 2109.01903): `share` of the first, the rest of the second, which the first was trained on from. All
else is the first bundle's; its provenance says what it was averaged with.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from anygen.bundle import Bundle, load_bundle
from anygen.errors import AnyGenError, InputError
from anygen.files import publishing


def average(first: Path, second: Path, share: float, out: Path) -> None:
    """Write the averaged bundle to `out`, which must not be there.

    Raises:
        InputError: a share outside 0 to 1, `out` is there, or the bundles' ids or weights do not match.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share must be from 0 to 1; got {share}")
    if out.exists():
        raise InputError(f"{out} exists: choose a new folder")
    bundles = [load_bundle(folder) for folder in (first, second)]
    if bundles[0].vocabulary.fingerprint != bundles[1].vocabulary.fingerprint:
        raise InputError("the ids of these bundles mean different things: only a bundle trained on from the other fits")
    if bundles[0].layout != bundles[1].layout or len({_shape(bundle) for bundle in bundles}) > 1:
        raise InputError("the transformers of these bundles have different shapes or layouts")
    others = {name: t for shard in _shards(second) for name, t in load_file(shard).items()}
    with publishing(out) as folder:
        shutil.copytree(first, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
        for shard in _shards(folder):
            mixed = {
                name: (share * weight.float() + (1 - share) * others[name].float()).to(weight.dtype)
                for name, weight in load_file(shard).items()
            }
            save_file(mixed, shard, metadata={"format": "pt"})
        facts = json.loads((folder / "anygen.json").read_text(encoding="utf-8"))
        before = facts["provenance"].get("averaged")  # of the first bundle, where it is an average itself
        done = {"share": share, "with": bundles[1].provenance} | ({"before": before} if before else {})
        facts["provenance"]["averaged"] = done
        (folder / "anygen.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _shape(bundle: Bundle) -> str:
    """Everything that a transformer's configuration says, as text, but for where and how it was saved."""
    facts = bundle.model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype"):
        facts.pop(name, None)
    return json.dumps(facts, sort_keys=True)


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def main() -> int:
    """Read the command line; 2 where it does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--share", type=float, required=True, help="of the first, 0 to 1")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        average(options.first, options.second, options.share, options.out)
    except AnyGenError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
