"""Every exception a user can see. Each says what was found, what was expected and what to type next.

`except FlashError` catches them all; the subclasses also derive from the builtin that a caller would expect
(ValueError for a bad argument, OSError for a device), so code that knows nothing of hf_flash still behaves.
"""


class FlashError(Exception):
    """Base of every error that hf_flash raises on purpose."""


class FlashConfigError(FlashError, ValueError):
    """An option has a value that cannot work (a size that is no size, an unknown gate)."""


class MemoryCapError(FlashError, ValueError):
    """The memory cap is smaller than the least that would do; the message names the smallest cap."""


class UnknownArchitectureError(FlashError, ValueError):
    """No FFN block that the table in families.py knows was found in the model."""


class BlockMismatchError(FlashError, ValueError):
    """A block has known names, but its arithmetic is not that of its row in families.py."""


class CheckpointError(FlashError, OSError):
    """A checkpoint file is missing, torn, truncated or not what its header says."""


class ChecksumError(CheckpointError):
    """Bytes of a file differ from the checksum that was written with them."""


class ReadError(FlashError, OSError):
    """A read from flash failed; names file and offset."""


class ShortReadError(ReadError):
    """A file ended before the bytes that were asked for; names file, offset, wanted and got bytes."""


class DiskFullError(FlashError, OSError):
    """There is no room for the files that are to be written; names the folder and the bytes that are missing."""


class HubError(FlashError, OSError):
    """A repo on the Hub lacks a file that a flash checkpoint needs, or could not be written."""


class TextError(FlashError, ValueError):
    """A text or a file of questions is missing, empty, too short, not UTF-8 or not as it should be; names the line."""
