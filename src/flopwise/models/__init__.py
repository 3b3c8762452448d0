"""Small models built from the techniques."""

from flopwise.models.glimpse import GlimpseClassifier as GlimpseClassifier
from flopwise.models.glimpse import GlimpseConfig as GlimpseConfig
