"""Linear attention: a transformer is a recurrent network. Read the README beside this file first."""

from flopwise.linear_attention.feature_maps import Favor as Favor
from flopwise.linear_attention.feature_maps import GeneralizedRandomFeatures as GeneralizedRandomFeatures
from flopwise.linear_attention.feature_maps import Hedgehog as Hedgehog
from flopwise.linear_attention.feature_maps import RandomFourierFeatures as RandomFourierFeatures
from flopwise.linear_attention.feature_maps import SmoothedRandomFourierFeatures as SmoothedRandomFourierFeatures
from flopwise.linear_attention.feature_maps import feature_width as feature_width
from flopwise.linear_attention.functional import chosen_backend as chosen_backend
from flopwise.linear_attention.functional import linear_attention as linear_attention
from flopwise.linear_attention.module import LinearAttention as LinearAttention
from flopwise.linear_attention.recurrent import LinearState as LinearState
from flopwise.linear_attention.recurrent import init_state as init_state
from flopwise.linear_attention.recurrent import step as step
