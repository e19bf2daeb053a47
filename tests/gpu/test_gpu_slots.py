"""Tables by slot on a GPU; the checks are those of tests/null, which see the device themselves."""

import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "null"))
from test_slots import *  # noqa: F403
