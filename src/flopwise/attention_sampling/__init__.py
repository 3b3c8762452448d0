"""Attention sampling: read only the pixels that matter. Read the README beside this file first."""

from flopwise.attention_sampling.expectation import coefficients as coefficients
from flopwise.attention_sampling.expectation import expectation as expectation
from flopwise.attention_sampling.images import open_image as open_image
from flopwise.attention_sampling.images import read_patches as read_patches
from flopwise.attention_sampling.module import AttentionSampling as AttentionSampling
from flopwise.attention_sampling.module import Glimpse as Glimpse
from flopwise.attention_sampling.patches import ReceptiveField as ReceptiveField
from flopwise.attention_sampling.patches import receptive_field_of as receptive_field_of
from flopwise.attention_sampling.priors import brightness as brightness
from flopwise.attention_sampling.priors import entropy as entropy
from flopwise.attention_sampling.priors import entropy_loss as entropy_loss
from flopwise.attention_sampling.priors import local_contrast as local_contrast
from flopwise.attention_sampling.sampling import sample as sample
from flopwise.attention_sampling.sampling import topk as topk
