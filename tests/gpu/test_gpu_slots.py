"""Tables by slot on a GPU; the checks are those of tests/unit/worker, which see the device themselves."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from test_slots import *  # noqa: F403
