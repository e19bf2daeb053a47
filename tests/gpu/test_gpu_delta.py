"""Triton's gated delta rule on a GPU; the checks are those that CI runs interpreted."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from triton_delta import *  # noqa: F403
