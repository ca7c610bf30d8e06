"""Files that are whole or absent: atomic writes, checked reads, the manifest of a folder."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from sft.core.errors import InputError

MANIFEST = "manifest.json"
NOTE = "sft"  # the one key of the metadata in a safetensors file: of several the order is random
TEMPORARY = "[a-z0-9_]{8}"  # what `tempfile.mkstemp` puts behind the prefix


def write_bytes(path: Path, content: bytes) -> None:
    """Write all of `content` or nothing: a crash leaves the old file as it was."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(
            f"Cannot write '{path}': {error.strerror}. Choose another place."
        ) from error


def write_text(path: Path, content: str) -> None:
    write_bytes(path, content.encode())


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read '{path}': {error.strerror}.") from error


def read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode()
    except UnicodeDecodeError:
        raise InputError(f"'{path}' is not a text file.") from None


def sha256(path: Path) -> str:
    return hashlib.sha256(read_bytes(path)).hexdigest()


def check_writable(folder: Path) -> None:
    """Raise `InputError` unless files can be made in `folder` (which is made if it is missing)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _make_a_file(folder)
    except OSError as error:
        raise _refused(folder, error) from error


def check_output(path: Path, folder: bool = False) -> None:
    """Raise `InputError` unless a file can be made at `path`, or with `folder` files in it.

    Folders that are missing on the way count as ones that can be made; nothing is made.
    """
    within = path if folder else path.parent
    try:
        if path.is_dir() and not folder:
            raise InputError(
                f"The output '{path}' is a folder. Give the name of a file, for example one in it."
            )
        _make_a_file(next(p for p in (within, *within.parents) if p.exists()))
    except OSError as error:
        raise _refused(within, error) from error


def _make_a_file(folder: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".sft-"):
        pass


def _refused(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"The output folder '{folder}' cannot be written: {error.strerror}. Choose another."
    )


def remove_unfinished(path: Path) -> None:
    """Delete the temporary files that killed calls of `write_bytes` left of this very path."""
    made = re.compile(re.escape(f".{path.name}.") + TEMPORARY)
    if path.parent.is_dir():
        for left in path.parent.iterdir():
            if made.fullmatch(left.name) and left.is_file():
                left.unlink(missing_ok=True)


def publish(staged: Path, folder: Path) -> None:
    """Move every file of `staged` into `folder`, the manifest last, each in one step.

    Other files in `folder` stay. The manifest names what belongs together, so a reader never
    takes a half-replaced folder for a whole one.
    """
    names = sorted(p.relative_to(staged) for p in staged.rglob("*") if p.is_file())
    write_manifest(staged, names)
    every = [*names, Path(MANIFEST)]
    try:
        for name in every:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if (folder / name).is_dir():
                raise InputError(f"'{folder / name}' is a folder where a file is to be written.")
        for name in every:
            os.replace(staged / name, folder / name)
    except OSError as error:
        raise InputError(
            f"Cannot write into '{folder}': {error.strerror} ({error.filename}). Choose another."
        ) from error


def write_manifest(folder: Path, names: Iterable[Path]) -> None:
    """Write `manifest.json`: the sha256 of each named file, relative to `folder`."""
    hashes = {str(n): sha256(folder / n) for n in names if str(n) != MANIFEST}
    write_text(folder / MANIFEST, json.dumps({"format": 1, "sha256": hashes}, indent=1) + "\n")


def check_manifest(path: Path) -> None:
    """Raise `InputError` if `path` stands in a manifest with another sha256.

    Looked up in the manifest of its folder and of the folder above. A file that no manifest names
    passes.
    """
    for folder in (path.parent, path.parent.parent):
        if (folder / MANIFEST).is_file():
            _check_entry(path, folder / MANIFEST)


def _check_entry(path: Path, manifest: Path) -> None:
    name = path.relative_to(manifest.parent).as_posix()
    try:
        wanted = json.loads(read_text(manifest))["sha256"].get(name)
    except (ValueError, KeyError, AttributeError):
        raise InputError(f"'{manifest}' is damaged. Make the folder again.") from None
    if wanted is not None and wanted != sha256(path):
        raise InputError(
            f"'{path}' is damaged: its sha256 is not the one in {MANIFEST}. Make it again, "
            f"or delete {MANIFEST} if you changed the file on purpose."
        )
