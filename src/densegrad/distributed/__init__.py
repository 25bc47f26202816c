"""Data-parallel gradients: sums over ranks by MPI, torch.distributed or NCCL, in the ranks' order if asked."""
from ..errors import DistributedError
from ..folds import SUM, Fold
from .agreement import DEADLINE, Ranks, telling_ranks, together
from .messages import Numbers
from .reductions import Reduction, all_reduce, fold_along_ranks

__all__ = ["DEADLINE", "SUM", "DistributedError", "Fold", "Numbers", "Ranks", "Reduction", "all_reduce",
           "fold_along_ranks", "telling_ranks", "together"]
