"""A clock in the place of the GPU's, for what times by `densegrad.commands.timing`."""


class StubClock:
    """A clock on which a sample takes a microsecond of the GPU and ten of Python; the first `late` come too late."""

    l2_bytes, device = 4096, "0"

    def __init__(self, late=0):
        self.host, self.gpu, self.late, self.occupied = 0.0, 0.0, late, []

    def now(self):
        self.host += 1e-5
        return self.host

    def occupy(self, seconds):
        self.occupied.append(seconds)

    def mark(self):
        self.gpu += 1e-6
        return self.gpu

    def passed(self, mark):
        self.late -= 1
        return self.late >= 0

    def seconds(self, start, end):
        return end - start
