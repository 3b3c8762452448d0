"""Without its extra, an integration says in one line how to install it."""

import importlib
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [("trainer", "transformers", "hf"), ("accelerate", "accelerate", "hf"), ("lightning", "lightning", "lightning")],
)
def test_the_remedy_is_one_line(module: str, missing: str, extra: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, f"flopwise.integrations.{module}", raising=False)
    for loaded in [name for name in sys.modules if name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"needs {missing}.*pip install 'flopwise\[{extra}\]'") as found:
        importlib.import_module(f"flopwise.integrations.{module}")
    assert "\n" not in str(found.value)
