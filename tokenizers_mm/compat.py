"""Keeps transformers importable beside packages that are installed but broken.

transformers and diffusers ask whether torchaudio, torchvision or torchcodec *exist* and then import them without a
guard. A CUDA build of one of these beside a CPU build of torch exists and raises OSError or RuntimeError on import,
and takes half of transformers with it. Marking such a package as absent (`sys.modules[name] = None`) is exact:
`find_spec` then says so too.

Every module of ours that imports transformers or diffusers imports this one first; `tests/test_architecture.py`
checks it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

FRAGILE = ("torchaudio", "torchvision", "torchcodec")


def hide_if_broken(name: str) -> str | None:
    """Import `name` once; where that fails, mark it as absent and return the reason.

    Returns None where the package works or is not installed.
    """
    if name in sys.modules:
        return None
    try:
        if importlib.util.find_spec(name) is None:
            return None
        importlib.import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
            del sys.modules[loaded]
        sys.modules[name] = None  # type: ignore[assignment]
        return f"{type(error).__name__}: {error}"
    return None


# All that happens at import, because it must come before transformers is imported for the first time.
os.environ.setdefault(
    "HF_HUB_DISABLE_PROGRESS_BARS", "1"
)  # a bar for every tokenizer that is opened tells nobody anything
BROKEN = {name: reason for name in FRAGILE if (reason := hide_if_broken(name)) is not None}
"""Packages that were found broken and hidden, with the reason of each."""
