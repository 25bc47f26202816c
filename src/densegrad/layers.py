"""Shapes of real layers, (samples, in_features, out_features): plans are chosen, held and timed for them."""
from __future__ import annotations

#: name -> (S, D, M)
LAYERS: dict[str, tuple[int, int, int]] = {
    "digits": (1797, 64, 10),
    "digits, a small batch": (32, 64, 10),
    "MLP, hidden": (128, 784, 512),
    "MLP, output": (128, 512, 10),
    "transformer, up": (8192, 768, 3072),
    "transformer, down": (8192, 3072, 768),
    "transformer, projection": (16384, 1024, 1024),
    "transformer, vocabulary": (2048, 4096, 32000),
    "square": (4096, 4096, 4096),
    "recommender, tower": (65536, 512, 256),
    "recommender, last": (65536, 256, 1),
    "tall and narrow": (1_000_003, 64, 10),
    "tall and square": (1_000_003, 128, 128),
    "wide": (64, 16384, 16384),
    "wide and shallow": (8, 50257, 768),
    "one sample": (1, 4096, 4096),
    "one feature": (16384, 1, 1024),
    "one output": (16384, 1024, 1),
    "ragged": (1023, 1025, 1021),
}
