"""Data-parallel gradients: sums over the ranks of MPI, torch.distributed and NCCL, in a stated order where asked."""
from ..errors import DistributedError
from .agreement import Numbers, Ranks
from .reductions import SUM, Fold, fold_along_ranks

__all__ = ["SUM", "DistributedError", "Fold", "Numbers", "Ranks", "fold_along_ranks"]
