"""Triton's kernels on logits on a GPU; the checks are those that CI runs interpreted."""

import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "contract"))
from triton_logits import *  # noqa: F403
