"""The processes that train one model together: each draws from its own presamples, and one gate decides for all."""

import torch
import torch.distributed as dist


class Ranks:
    """Sums over the processes of a `torch.distributed` group; a process on its own, when there is none.

    Local draws need nothing else. With DDP and FSDP the step is the mean of the ranks' gradients, each unbiased for its
    own presample, so it is unbiased for the mean over all of them: stratified sampling, and no example moves. Only the
    gate must be common. A rank that sampled while another did not would take fewer steps from the same data and leave
    the others waiting; under FSDP even the scoring forward needs every rank.

    Args:
        group: None for all processes, once `torch.distributed` is initialised.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group = group

    @property
    def count(self) -> int:
        return dist.get_world_size(self.group) if _initialised() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if _initialised() else 0

    def sum(self, values: list[float]) -> list[float]:
        """Elementwise, the same to the last bit on every rank."""
        if self.count == 1:
            return values
        device = "cuda" if "nccl" in dist.get_backend(self.group) else "cpu"
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self.group)
        return total.tolist()

    def require_equal(self, size: int) -> None:
        """Raises on every rank when the ranks' presamples differ in size: they would be cut into unequally many steps.

        n sum(size^2) = (sum size)^2 only if all are equal.
        """
        if self.count == 1:
            return
        total, squares = self.sum([float(size), float(size) ** 2])
        if self.count * squares != total**2:
            raise ValueError(
                "all ranks get presamples of one size, or they would take different numbers of steps; rank "
                f"{self.rank} got {size} examples and the {self.count} ranks {total:.0f} in all. "
                "Use a DistributedSampler, or drop_last=True, so that every rank sees as many."
            )


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()
