"""Text for the examples: the source of Python's standard library, or a given file."""

import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from storage import UserError

# This is most of the standard library without its tests, and is quick to read.
CHARACTERS = 4_000_000
KNOWN = 128  # the ASCII characters; all others are read as the last one
HELD_OUT = 0.1


class Text(NamedTuple):
    """Text as integers below KNOWN, uint8: the training part, and after it the test part."""

    train: np.ndarray
    test: np.ndarray

    def digest(self) -> int:
        """Return a checksum, to check that a resumed run has the same text, in whatever file."""
        return zlib.crc32(self.test.tobytes(), zlib.crc32(self.train.tobytes()))


def load_text(path: Path | None) -> Text:
    """Read a file, or the modules of the standard library in alphabetical order."""
    if path is None:
        folder = Path(sysconfig.get_path("stdlib"))
        parts = (file.read_text("utf-8", "replace") for file in sorted(folder.glob("*.py")))
        text = "\n".join(parts)[:CHARACTERS]
    else:
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--text must be a text file in UTF-8, but {path} is not: {error}"
            ) from error
    codes = np.minimum(np.frombuffer(text.encode("utf-32-le"), np.uint32), KNOWN - 1)
    codes = codes.astype(np.uint8)
    split = round(len(codes) * (1 - HELD_OUT))
    return Text(codes[:split], codes[split:])


def windows(codes: np.ndarray, count: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Take `count` pieces at random positions; shape (count, length)."""
    if len(codes) < length:
        raise UserError(
            f"the text must have at least {length} characters in each of its parts, but has "
            f"{len(codes)} in one: choose a longer --text"
        )
    starts = rng.integers(0, len(codes) - length + 1, count)
    return codes[starts[:, None] + np.arange(length)].astype(np.int32)


def decode(codes: np.ndarray) -> str:
    """Return the text that the integers stand for."""
    return "".join(map(chr, np.asarray(codes).tolist()))
