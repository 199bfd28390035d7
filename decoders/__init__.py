"""Optional renderers: from a picture's or sound's codes, or from voken hidden states, to media by diffusion.

A bundle carries each of them as a folder `decoders/NAME/` in diffusers' layout (`decoders.carried`). They need
diffusers, which is an extra (`anygen[diffusion]`): `flow`, `spans`, `carried` and `optional` work without it;
`denoiser`, `drivers`, `sound` and `decoder` import it, and are imported only where one is used.

The module names of saved components are part of their format: classes stay where they are.
"""

from __future__ import annotations

from tokenizers_mm import compat  # noqa: F401  before anything here imports diffusers
