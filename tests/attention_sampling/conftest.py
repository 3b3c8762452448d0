"""Shape checks for this technique, on in every test but those of torch.compile, which cannot trace them."""

import os

if not os.environ.get("FLOPWISE_NO_SHAPE_CHECKS"):
    from jaxtyping import install_import_hook

    names = ("sampling", "expectation", "patches", "priors", "module")
    checked = [f"flopwise.attention_sampling.{name}" for name in names]
    install_import_hook([*checked, "flopwise.models"], "shape_checks.checker")
