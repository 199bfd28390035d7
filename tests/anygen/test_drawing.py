"""The decoders of pictures in the API: same seed same picture, in any batch, streamed or not; typed errors without."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anygen.api import AnyGen
from anygen.bundle import save_bundle
from anygen.drawing import noise_seed
from anygen.errors import InputError
from anygen.request import Request
from anygen.results import Finished, SegmentFinished, SegmentStarted
