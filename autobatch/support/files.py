"""Files that autobatch writes: checked before the work, replaced whole, never left half-written.

Invariant: every failure of the file system leaves here as one `FileError`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from autobatch.errors import FileError

__all__ = [
    "check_writable",
    "prepare_folder",
    "prepared_folder",
    "read_text",
    "user_folder",
    "write_text",
]


def user_folder() -> Path:
    """Return where autobatch keeps plans and logs: `$AUTOBATCH_CACHE_DIR`, or the user's cache.

    Raises:
        RuntimeError: the user has no home folder.
    """
    chosen = os.environ.get("AUTOBATCH_CACHE_DIR")
    if chosen:
        return Path(chosen)
    import platformdirs

    return platformdirs.user_cache_path("autobatch", appauthor=False)


def prepare_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder where it is missing and prove that files can be written into it.

    Raises:
        FileError: the path is not a folder, or nothing can be created in it.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _probe(folder)
    except (OSError, ValueError) as error:
        raise FileError(
            f"cannot write into the folder {str(folder)!r}: {_reason(error)}; name another one"
        ) from error
    return folder


@contextlib.contextmanager
def prepared_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Prepare a folder for what the block writes; where that fails, no empty folder is left.

    Raises:
        FileError: as `prepare_folder`.
    """
    made = [each for each in (Path(path), *Path(path).parents) if not each.exists()]
    try:
        yield prepare_folder(path)
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()
        raise


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Prove that a file can be written at `path`, without writing it.

    Raises:
        FileError: the path is a folder, or its folder does not exist or cannot be written.
    """
    file = Path(path)
    try:
        if file.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        if not _is_special(file):
            _probe(file.resolve().parent)
    except (OSError, ValueError, RuntimeError) as error:
        raise FileError(
            f"cannot write the file {str(file)!r}: {_reason(error)}; name another one"
        ) from error
    return file


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a UTF-8 file so that readers see the old content or the new one, never a part.

    Pipes and devices such as /dev/stdout are written in place.

    Raises:
        FileError: the file cannot be written.
    """
    file = Path(path)
    try:
        if _is_special(file):
            file.write_text(text, encoding="utf-8")
            return file
        final = file.resolve()
        temporary = _sibling(final)
        try:
            temporary.write_text(text, encoding="utf-8", newline="\n")
            os.replace(temporary, final)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise FileError(
            f"cannot write the file {str(file)!r}: {_reason(error)}; name another one"
        ) from error
    return file


def read_text(path: str | os.PathLike[str], *, limit_bytes: int) -> str:
    """Read a UTF-8 file of at most `limit_bytes`.

    Raises:
        FileError: the file cannot be read, is larger, or is not UTF-8.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            content = stream.read(limit_bytes + 1)
        if len(content) > limit_bytes:
            raise ValueError(f"it is larger than {limit_bytes} bytes")
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(
            f"cannot read the file {str(file)!r}: it is not UTF-8 text (byte {error.start})"
        ) from error
    except (OSError, ValueError) as error:
        raise FileError(f"cannot read the file {str(file)!r}: {_reason(error)}") from error


def _is_special(file: Path) -> bool:
    return file.exists() and not file.is_file()


def _sibling(file: Path) -> Path:
    return file.with_name(f".autobatch-{secrets.token_hex(8)}.tmp")


def _probe(folder: Path) -> None:
    probe = _sibling(folder / "probe")
    probe.touch(exist_ok=False)
    probe.unlink()


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
