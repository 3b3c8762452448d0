"""Shape checks for this technique, on in every test but those of torch.compile, which cannot trace them."""

import os

if not os.environ.get("FLOPWISE_NO_SHAPE_CHECKS"):
    from jaxtyping import install_import_hook

    install_import_hook(["flopwise.attention_sampling", "flopwise.models"], "shape_checks.checker")
