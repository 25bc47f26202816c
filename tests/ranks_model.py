"""What sums over ranks cost on paper: closed forms, and the steps of each algorithm played through one by one.

A message of n bytes takes a rank alpha + n / rate seconds, in and out at once, and adding to it nothing.
docs/distributed.md shows the forms; tests/test_reductions.py holds them to the steps, and the page's table to them.
"""
from math import ceil, log2


def ring(ranks, size, alpha, rate):
    """Each of R parts goes once around to be added up, and once around to be known."""
    return 2 * (ranks - 1) * (alpha + size / ranks / rate)


def tree(ranks, size, alpha, rate):
    """A binary tree, up and down, the whole at once."""
    return 2 * ceil(log2(ranks)) * (alpha + size / rate)


def chain(ranks, size, alpha, rate, piece):
    """In pieces from rank to rank, then in pieces back along the ranks: what `order="ranks"` does."""
    pieces = max(ceil(size / piece), 1)
    return 2 * (pieces + ranks - 2) * (alpha + size / pieces / rate)


def best_piece(ranks, size, alpha, rate):
    """The size of a piece that makes the chain shortest, had it not to be a whole number of them."""
    return size / max((size / rate * max(ranks - 2, 0) / alpha) ** 0.5, 1)


def sent(ranks, size, way):
    """The most bytes that a rank sends."""
    return {"ring": 2 * (ranks - 1) / ranks * size, "tree": ceil(log2(ranks)) * size,
            "chain": min(ranks - 1, 2) * size}[way]


class Network:
    """Ranks that each send one message and receive one at a time."""

    def __init__(self, ranks, alpha, rate):
        self.alpha, self.rate = alpha, rate
        self.out, self.into, self.bytes = [0.0] * ranks, [0.0] * ranks, [0] * ranks

    def send(self, source, to, size, ready):
        """When it has arrived, if it was ready at this time."""
        begin = max(ready, self.out[source], self.into[to])
        self.out[source] = self.into[to] = begin + self.alpha + size / self.rate
        self.bytes[source] += size
        return self.out[source]


def played_ring(ranks, size, alpha, rate):
    net, known = Network(ranks, alpha, rate), [0.0] * ranks
    for _ in range(2 * (ranks - 1)):
        arrived = [net.send(rank, (rank + 1) % ranks, size / ranks, known[rank]) for rank in range(ranks)]
        known = [arrived[rank - 1] for rank in range(ranks)]
    return max(known), max(net.bytes)


def played_tree(ranks, size, alpha, rate):
    """Of 2^k ranks."""
    net, known, step = Network(ranks, alpha, rate), [0.0] * ranks, 1
    steps = []
    while step < ranks:
        steps.append(step)
        for low in range(0, ranks, 2 * step):
            known[low] = max(known[low], net.send(low + step, low, size, known[low + step]))
        step *= 2
    for step in reversed(steps):
        for low in range(0, ranks, 2 * step):
            known[low + step] = net.send(low, low + step, size, known[low])
    return max(known), max(net.bytes)


def played_chain(ranks, size, alpha, rate, piece):
    pieces = max(ceil(size / piece), 1)
    net, done = Network(ranks, alpha, rate), [[0.0] * pieces for _ in range(ranks)]
    for number in range(pieces):
        for rank in range(ranks - 1):
            done[rank + 1][number] = net.send(rank, rank + 1, size / pieces, done[rank][number])
    known = [max(done[-1])] * pieces
    for rank in range(ranks - 1, 0, -1):  # the broadcast begins when the sum is whole
        known = [net.send(rank, rank - 1, size / pieces, one) for one in known]
    return max(known), max(net.bytes)


def exposed(reduction, behind):
    """What a reduction adds to a step in which so many seconds of computing are left when it starts."""
    return max(reduction - behind, 0.0)
