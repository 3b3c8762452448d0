"""What users can import, so that nothing is added or lost unnoticed."""

import re
import subprocess
import sys
from pathlib import Path

import flopwise
from flopwise import attention_sampling, clustered_attention, importance_sampling, linear_attention, models, report
from flopwise.experiments import baselines

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

PUBLIC = {
    flopwise: {"Budget", "ImportanceSampler", "Ledger", "endless"},
    importance_sampling: {
        "ConstantVarianceSampler",
        "ImportanceSampler",
        "WeightedBatch",
        "binary_cross_entropy_score",
        "cosine",
        "cross_entropy_score",
        "effective_sample_size",
        "gradient_norm_score",
        "last_layer_gradient_norm",
        "loss_score",
        "relative_variance",
        "squared_error_score",
        "staircase",
        "upper_bound_score",
        "variance_ratio",
    },
    attention_sampling: {
        "AttentionSampling",
        "Glimpse",
        "ReceptiveField",
        "brightness",
        "coefficients",
        "entropy",
        "entropy_loss",
        "expectation",
        "local_contrast",
        "open_image",
        "read_patches",
        "receptive_field_of",
        "sample",
        "topk",
    },
    linear_attention: {
        "Favor",
        "GeneralizedRandomFeatures",
        "Hedgehog",
        "LinearAttention",
        "LinearState",
        "RandomFourierFeatures",
        "SmoothedRandomFourierFeatures",
        "chosen_backend",
        "feature_width",
        "init_state",
        "linear_attention",
        "step",
    },
    clustered_attention: {
        "ClusteredAttention",
        "chosen_backend",
        "clustered_attention",
        "hamming",
        "kmeans",
        "save_clusters",
    },
    models: {
        "Decoder",
        "GlimpseClassifier",
        "GlimpseConfig",
        "LinearCausalLM",
        "ModelState",
        "Sampling",
        "Snapshot",
    },
    report: {"read_records", "write_report"},
    baselines: {
        "Baseline",
        "History",
        "InfoBatch",
        "OnlineBatchSelection",
        "RandomSubset",
        "SelectiveBackprop",
        "Uniform",
        "loss_based",
    },
}


def test_exactly_these_names_are_exported_and_documented():
    for module, expected in PUBLIC.items():
        names = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) and not isinstance(value, type(sys))
        }
        assert names == expected
        assert all(vars(module)[name].__doc__ for name in names)


def _in_reference() -> list[str]:
    return re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)


def test_every_public_name_is_in_the_reference_once():
    """Under any of its names: `flopwise.ImportanceSampler` is `flopwise.importance_sampling.ImportanceSampler`.

    That all of them exist is for the strict build of the docs to say.
    """
    paths = _in_reference()
    modules = {module.__name__: module for module in PUBLIC}
    there = [vars(modules[m])[name] for m, _, name in (p.rpartition(".") for p in paths) if m in modules]
    missing = [f"{m.__name__}.{n}" for m, names in PUBLIC.items() for n in sorted(names) if vars(m)[n] not in there]
    assert not missing
    assert len(set(there)) == len(there) and len(set(paths)) == len(paths)


def test_what_the_guides_import_is_in_the_reference():
    """The integrations, which need extras to be imported, are public where a guide shows them."""
    found, ends = set(), {path.rpartition(".")[2] for path in _in_reference()}
    for page in PAGES:
        for imported in re.findall(r"^from flopwise\S* import (.+)$", page.read_text(), re.MULTILINE):
            found |= {name.split(" as ")[0].strip() for name in imported.split(",")}
        found |= set(re.findall(r"\bfw\.(\w+)", page.read_text()))
    assert len(found) > 20
    assert not found - ends - {"transformers", "app"}, "a module, and the command line in a hidden check"


def test_importing_leaves_the_process_as_it_was():
    code = """
import os, sys, torch, torch.utils.flop_counter, logging
def state():
    registry = dict(torch.utils.flop_counter.flop_registry)
    return dict(os.environ), logging.root.handlers[:], registry, torch.get_rng_state().sum()
before = state()
import flopwise
assert before == state()
assert not {"typer", "rich", "beartype"} & set(sys.modules), "the library must not import the command line's tools"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_every_room_loads_no_extra():
    """numpy only where torch itself loads it; how long the import takes is for scripts/release_check.py to say."""
    code = """
import sys, torch
before = set(sys.modules)
import flopwise
import flopwise.importance_sampling, flopwise.attention_sampling, flopwise.linear_attention
import flopwise.clustered_attention, flopwise.models, flopwise.report
heavy = {"numba", "llvmlite", "numpy", "transformers", "tokenizers", "accelerate", "lightning", "safetensors"}
heavy |= {"tifffile", "imagecodecs", "zarr", "PIL", "openslide", "typer", "rich", "beartype", "torch._dynamo"}
assert not (found := heavy & (set(sys.modules) - before)), found
"""
    subprocess.run([sys.executable, "-c", code], check=True)
