"""Clustered attention: queries that are alike share their softmax. Read the README beside this file first."""

from flopwise.clustered_attention.clustering import hamming as hamming
from flopwise.clustered_attention.clustering import kmeans as kmeans
from flopwise.clustered_attention.functional import chosen_backend as chosen_backend
from flopwise.clustered_attention.functional import clustered_attention as clustered_attention
from flopwise.clustered_attention.module import ClusteredAttention as ClusteredAttention
from flopwise.clustered_attention.module import save_clusters as save_clusters
