"""Attention sampling: read only the pixels that matter. Read the README beside this file first."""

from flopwise.attention_sampling.expectation import coefficients as coefficients
from flopwise.attention_sampling.expectation import expectation as expectation
from flopwise.attention_sampling.sampling import sample as sample
from flopwise.attention_sampling.sampling import topk as topk
