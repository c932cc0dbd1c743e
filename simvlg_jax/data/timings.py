"""How long examples take in the processes that make them."""


class Timings:
    """Sums the seconds of reading and of decoding (with augmenting) over the examples that this process received."""

    def __init__(self):
        self.examples, self.read, self.decode = 0, 0.0, 0.0

    def add(self, examples: int, read: float, decode: float) -> None:
        self.examples += examples
        self.read += read
        self.decode += decode

    def take(self) -> tuple[int, float, float]:
        """Returns (examples, seconds of reading, seconds of decoding) since the last call."""
        taken = self.examples, self.read, self.decode
        self.examples, self.read, self.decode = 0, 0.0, 0.0
        return taken
