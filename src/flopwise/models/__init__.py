"""Small models built from the techniques."""

from flopwise.models.causal_lm import LinearCausalLM as LinearCausalLM
from flopwise.models.decoding import Decoder as Decoder
from flopwise.models.decoding import Snapshot as Snapshot
from flopwise.models.glimpse import GlimpseClassifier as GlimpseClassifier
from flopwise.models.glimpse import GlimpseConfig as GlimpseConfig
from flopwise.models.sampling import Sampling as Sampling
from flopwise.models.state import ModelState as ModelState
