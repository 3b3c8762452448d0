"""The two heavy steps, in torch (every device) and numba (CPU), with the same functions in both files.

- `fit(sample, weight, picks, iterations)` and `nearest(x, centroid, origin)`: k-means
- `attend(query, key, value, key_mask, assignment, clusters=, topk=, scale=)`: attention, once the clusters are known
"""
