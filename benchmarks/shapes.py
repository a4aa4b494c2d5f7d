"""The layers and formats that the GPU benchmarks cover."""

SHAPES = {  # out x in of each linear
    "8b": {"q or o": (4096, 4096), "k or v": (1024, 4096), "gate or up": (12288, 4096), "down": (4096, 12288)},
    "8b merged": {"q k v": (6144, 4096), "gate up": (24576, 4096)},  # which share a launch when decoding compiled
    "32b": {
        "q": (8192, 5120),
        "k or v": (1024, 5120),
        "o": (5120, 8192),
        "gate or up": (25600, 5120),
        "down": (5120, 25600),
    },
}
FORMATS = {"W4": (4, False), "W3": (3, False), "W2": (2, False), "W8": (8, False), "NF4": (4, True)}
