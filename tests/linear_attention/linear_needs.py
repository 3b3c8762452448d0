"""What some tests need to run."""

import pytest

from flopwise.linear_attention.kernels import numba

numba_installed = pytest.mark.skipif(not numba.AVAILABLE, reason="numba is not installed: pip install 'flopwise[cpu]'")
