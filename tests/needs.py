"""What some tests need to run."""

from importlib.util import find_spec

import pytest

numba_installed = pytest.mark.skipif(
    find_spec("numba") is None, reason="numba is not installed: pip install 'flopwise[cpu]'"
)
