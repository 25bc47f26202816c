"""What factories remember of what they have made, and how they hand device functions over that belong together."""
from functools import lru_cache
from types import ModuleType

#: as `functools.cache`, for the calls of a factory that were made last: as much as one process launches, and no more
cache = lru_cache(maxsize=512)


def group(**members):
    """What has these device functions as attributes, for a kernel that calls `left_tile.load(...)`.

    It is a module, since Numba looks into no other objects.
    """
    made = ModuleType("group")
    vars(made).update(members)
    return made
