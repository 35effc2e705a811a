"""Text for the examples: the source of Python's own standard library, or a file of yours."""

import sysconfig
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from storage import UserError

# Of the standard library this is most of what is not a test; and it is quick to read.
CHARACTERS = 4_000_000
KNOWN = 128  # the characters of ASCII; any other is read as the last of them
HELD_OUT = 0.1


class Text(NamedTuple):
    """Text as integers below KNOWN, uint8: to learn from, and what follows, to be judged on."""

    train: np.ndarray
    test: np.ndarray

    def digest(self) -> int:
        """A checksum: a run goes on with the text it began with, wherever that is."""
        return zlib.crc32(self.test.tobytes(), zlib.crc32(self.train.tobytes()))


def load_text(path: Path | None) -> Text:
    """Read a file, or the standard library's modules in the order of their names."""
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
    """Take so many pieces at random places, of shape (count, length)."""
    if len(codes) < length:
        raise UserError(
            f"the text must have at least {length} characters in each of its parts, but has "
            f"{len(codes)} in one: give a longer --text"
        )
    starts = rng.integers(0, len(codes) - length + 1, count)
    return codes[starts[:, None] + np.arange(length)].astype(np.int32)


def decode(codes: np.ndarray) -> str:
    """The text that the integers stand for."""
    return "".join(map(chr, np.asarray(codes).tolist()))
