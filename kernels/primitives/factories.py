"""What factories remember of what they have made: as much as one process launches, and no more."""
from functools import lru_cache

#: as `functools.cache`, for the calls of a factory that were made last
cache = lru_cache(maxsize=512)
