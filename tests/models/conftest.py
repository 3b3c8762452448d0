"""Shape checks for the models, and one thread."""

import os

if not os.environ.get("FLOPWISE_NO_SHAPE_CHECKS"):
    from jaxtyping import install_import_hook

    install_import_hook(["flopwise.linear_attention", "flopwise.models"], "shape_checks.checker")
