"""Triton's mixtures of experts on a GPU; the checks are those that CI runs interpreted."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from triton_mixtures import *  # noqa: F403
