import pytest
import torch

from flopwise.clustered_attention import hamming, kmeans
from flopwise.clustered_attention.clustering import SAMPLE, cluster


def planted(clusters, length, generator, heads=2, width=16, noise=0.1):
    centre = torch.randn(heads, clusters, width, generator=generator)
    label = torch.randint(clusters, (1, heads, length), generator=generator)
    query = torch.stack([centre[h][label[0, h]] for h in range(heads)])[None]
    return query + noise * torch.randn(query.shape, generator=generator), label


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("clusters", "length"), [(4, 300), (16, 1000), (32, 4000)])
def test_planted_clusters_are_recovered(kernels, clusters, length, generator):
    query, label = planted(clusters, length, generator)
    found = kmeans(query, clusters=clusters, generator=seeded(), kernels=kernels)
    for h in range(query.shape[1]):
        assert len(set(zip(label[0, h].tolist(), found[0, h].tolist(), strict=True))) == clusters


def test_planted_clusters_are_recovered_from_their_hashes(kernels, generator):
    """Random starting points may split a cluster, so nearly all: 20 of 20 by chance would be luck."""
    query, label = planted(8, 800, generator, noise=0.02)
    found = hamming(query, clusters=20, generator=seeded(), kernels=kernels)
    for h in range(query.shape[1]):
        pairs = set(zip(label[0, h].tolist(), found[0, h].tolist(), strict=True))
        assert len({label for label, _ in pairs}) == 8
        mixed = len(pairs) - len({cluster for _, cluster in pairs})
        assert mixed <= 2


@pytest.mark.parametrize("find", [kmeans, hamming])
def test_clusters_bring_queries_closer_than_chance(find, kernels, generator):
    query = torch.randn(2, 3, 400, 8, generator=generator)
    found = find(query, clusters=20, generator=seeded(), kernels=kernels)
    assert found.shape == query.shape[:3] and found.min() == 0 and found.max() < 20

    def spread(assignment):
        member = torch.nn.functional.one_hot(assignment, 20).float()
        centroid = member.mT @ query / member.sum(-2).clamp(min=1)[..., None]
        return (query - member @ centroid).square().sum(-1).mean()

    assert spread(found) < 0.8 * spread(found[..., torch.randperm(400, generator=generator)])


@pytest.mark.parametrize("find", [kmeans, hamming])
def test_the_seed_alone_decides(find, kernels, generator):
    query = torch.randn(2, 3, 700, 8, generator=generator)
    before = torch.get_rng_state()
    first = find(query, clusters=20, generator=seeded(), kernels=kernels)
    assert (torch.get_rng_state() == before).all()
    torch.set_num_threads(2)
    try:
        second = find(query, clusters=20, generator=seeded(), kernels=kernels)
    finally:
        torch.set_num_threads(1)
    assert (first == second).all()
    assert (find(query, clusters=20, generator=seeded(1), kernels=kernels) != first).any()


@pytest.mark.parametrize("find", [kmeans, hamming])
def test_texts_and_heads_do_not_depend_on_one_another(find, kernels, generator):
    query = torch.randn(3, 4, 300, 8, generator=generator)
    together = find(query, clusters=10, generator=seeded(), kernels=kernels)
    alone = find(query[1:2, 2:3], clusters=10, generator=seeded(), kernels=kernels)
    assert (together[1, 2] == alone[0, 0]).all()


@pytest.mark.parametrize("find", [kmeans, hamming])
@pytest.mark.parametrize("length", [5 * SAMPLE + 30, 5 * SAMPLE - 9, 6, 5, 2, 0])
def test_padding_joins_no_cluster_and_changes_none(find, kernels, length, generator):
    query = torch.randn(80, 2, 100, 8, generator=generator)
    mask = torch.arange(100).expand(80, -1) < length
    padded = find(query, clusters=5, generator=seeded(), query_mask=mask, kernels=kernels)
    assert (padded[..., length:] == -1).all()
    if length:
        alone = find(query[:, :, :length], clusters=5, generator=seeded(), kernels=kernels)
        assert (padded[..., :length] == alone).all()


@pytest.mark.parametrize("find", [kmeans, hamming])
def test_no_more_queries_than_clusters_are_left_apart(find, kernels, generator):
    query = torch.randn(1, 1, 9, 4, generator=generator)
    assert find(query, clusters=9, generator=seeded(), kernels=kernels)[0, 0].tolist() == list(range(9))


@pytest.mark.parametrize("find", [kmeans, hamming])
def test_equal_queries_share_a_cluster_and_leave_the_others_empty(find, kernels):
    query = torch.tensor([1.0, 2.0, 3.0]).repeat(20)[None, None, :, None] * torch.ones(4)
    found = find(query, clusters=10, generator=seeded(), kernels=kernels)[0, 0]
    assert (found.view(20, 3) == found[:3]).all()


def test_distances_far_from_the_origin_keep_their_digits(kernels, generator):
    """A bias common to all queries, as real projections have, is no reason to lose the clusters."""
    query, label = planted(8, 400, generator)
    found = kmeans(query + 1e4, clusters=8, generator=seeded(), kernels=kernels)
    for h in range(query.shape[1]):
        assert len(set(zip(label[0, h].tolist(), found[0, h].tolist(), strict=True))) == 8


def test_both_kernels_find_the_same_clusters(backend, generator):
    """Equal draws and equal rules: they may differ where two centroids are equally near, but for rounding."""
    query = torch.randn(2, 3, 500, 16, generator=generator)
    for clustering in ("kmeans", "hamming"):
        expected = cluster(query, None, 12, clustering, 3, "torch")
        assert (cluster(query, None, 12, clustering, 3, backend) == expected).float().mean() > 0.995
