"""Importance sampling for training: spend gradients where they matter. Read the README beside this file first."""

from flopwise.importance_sampling.constant_variance import ConstantVarianceSampler as ConstantVarianceSampler
from flopwise.importance_sampling.sampler import ImportanceSampler as ImportanceSampler
from flopwise.importance_sampling.sampler import WeightedBatch as WeightedBatch
from flopwise.importance_sampling.schedule import cosine as cosine
from flopwise.importance_sampling.schedule import staircase as staircase
from flopwise.importance_sampling.scores import binary_cross_entropy_score as binary_cross_entropy_score
from flopwise.importance_sampling.scores import cross_entropy_score as cross_entropy_score
from flopwise.importance_sampling.scores import gradient_norm_score as gradient_norm_score
from flopwise.importance_sampling.scores import last_layer_gradient_norm as last_layer_gradient_norm
from flopwise.importance_sampling.scores import loss_score as loss_score
from flopwise.importance_sampling.scores import squared_error_score as squared_error_score
from flopwise.importance_sampling.scores import upper_bound_score as upper_bound_score
from flopwise.importance_sampling.variance import effective_sample_size as effective_sample_size
from flopwise.importance_sampling.variance import relative_variance as relative_variance
from flopwise.importance_sampling.variance import variance_ratio as variance_ratio
