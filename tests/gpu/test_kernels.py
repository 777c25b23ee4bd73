"""The Triton kernels compiled for the GPU; the same checks as tests/cuda runs by the interpreter."""

from __future__ import annotations

import pytest

from tests.cuda.test_coded import *  # noqa: F403
from tests.cuda.test_decode_attention import *  # noqa: F403
from tests.cuda.test_extras_kernel import *  # noqa: F403
from tests.cuda.test_prompt_attention import *  # noqa: F403
from tests.cuda.test_ranks_kernel import *  # noqa: F403
from tests.cuda.test_recurrence_drafts import *  # noqa: F403
from tests.cuda.test_triton import *  # noqa: F403

pytestmark = pytest.mark.gpu
