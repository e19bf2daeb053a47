"""Triton's operations and draws on a GPU; the checks are those that CI runs interpreted."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from triton_ops import *  # noqa: F403
