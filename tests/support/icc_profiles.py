"""Colour profiles made of bytes, so that what they mean is known without a colour engine."""

import struct

D50 = (0.9642, 1.0, 0.8249)
SRGB = {"r": (0.43607, 0.22249, 0.01392), "g": (0.38515, 0.71687, 0.09708), "b": (0.14307, 0.06061, 0.71410)}  # D50
DISPLAY_P3 = {"r": (0.51512, 0.24120, -0.00105), "g": (0.29198, 0.69225, 0.04189), "b": (0.15710, 0.06657, 0.78407)}
SRGB_EQUATION = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
SRGB_CURVE = struct.pack(">4s4xHH5i", b"para", 3, 0, *[round(65536 * value) for value in SRGB_EQUATION])
LINEAR_CURVE = struct.pack(">4s4xI", b"curv", 0)


def gamma_curve(gamma: float) -> bytes:
    return struct.pack(">4s4xIH", b"curv", 1, round(gamma * 256))


def table_curve(values) -> bytes:  # of equidistant levels, 0 to 1
    return struct.pack(f">4s4xI{len(values)}H", b"curv", len(values), *[round(65535 * value) for value in values])


def xyz(values: tuple[float, float, float]) -> bytes:
    return struct.pack(">4s4x3i", b"XYZ ", *[round(65536 * value) for value in values])


def text(value: str) -> bytes:
    encoded = value.encode("utf-16-be")
    return struct.pack(">4s4xII4sII", b"mluc", 1, 12, b"enUS", len(encoded), 28) + encoded


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], name: str = "made up") -> bytes:
    tags = {b"desc": text(name), b"cprt": text("none"), b"wtpt": xyz(D50), **tags}
    table, content, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, value in tags.items():
        value += bytes(-len(value) % 4)
        table += struct.pack(">4sII", tag, start + len(content), len(value))
        content += value
    body = struct.pack(">I", len(tags)) + table + content
    header = struct.pack(">I4xI4s4s4s", 128 + len(body), 0x04200000, b"mntr", space, connection)
    header = header.ljust(36, b"\0") + b"acsp"
    header = header.ljust(68, b"\0") + struct.pack(">3i", *[round(65536 * value) for value in D50])
    return header.ljust(128, b"\0") + body


def rgb_profile(colorants: dict[str, tuple[float, float, float]], curve: bytes, name: str = "made up") -> bytes:
    tags = {f"{channel}XYZ".encode(): xyz(value) for channel, value in colorants.items()}
    tags |= {f"{channel}TRC".encode(): curve for channel in colorants}
    return profile(b"RGB ", b"XYZ ", tags, name)


def grey_profile(curve: bytes) -> bytes:
    return profile(b"GRAY", b"XYZ ", {b"kTRC": curve})


def ink_profile() -> bytes:
    """CMYK of colourless inks: the lightness is that of the paper, less black and half of cyan. The paper is yellow."""
    identity = bytes(range(256))
    grid = b""
    for cyan in (0, 1):
        for _ in range(4):  # magenta, yellow
            for black in (0, 1):
                grid += bytes([round(255 * (1 - black) * (1 - cyan / 2)), 128, 128])
    matrix = struct.pack(">9i", *[65536 if index % 4 == 0 else 0 for index in range(9)])
    table = struct.pack(">4s4xBBBx", b"mft1", 4, 3, 2) + matrix + identity * 4 + grid + identity * 3
    return profile(b"CMYK", b"Lab ", {b"wtpt": xyz((0.8, 0.82, 0.5)), b"A2B0": table, b"A2B1": table})
