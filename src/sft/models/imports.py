"""What is imported by name: the user's own `package.module:factory`, and optional packages."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from sft.core.errors import InputError
from sft.models.quote import close_names, one_line


def load_attribute(reference: str, what: str = "a function") -> Any:
    """Import `package.module` of 'package.module:name', with the current directory on the path.

    what : what the name should stand for, for the error messages.

    Raises `InputError` if there is no such module or name, or if it cannot be called.
    """
    module_name, _, name = reference.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), name]):
        raise InputError(f"'{reference}' is not of the form package.module:name, {what}.")
    with _current_directory_on_path():
        module = _import(module_name, reference)
    if not hasattr(module, name):
        near = close_names(name, vars(module))
        raise InputError(f"'{reference}': the module '{module_name}' has no '{name}'.{near}")
    found = getattr(module, name)
    if not callable(found):
        raise InputError(f"'{reference}' is of type {type(found).__name__}; {what} is wanted.")
    return found


def call_factory(reference: str, what: str) -> Any:
    """Call the function at 'package.module:factory', which should return `what`.

    Raises `InputError` if it is not there, or if it fails.
    """
    factory = load_attribute(reference, f"a function without arguments that returns {what}")
    with _current_directory_on_path():
        try:
            return factory()
        except Exception as error:
            raise InputError(f"'{reference}' failed when called: {one_line(error)}") from error


def optional_package(module: str, package: str, reference: str) -> Any:
    """Import `module`; an `InputError` says which `package` to install for `reference`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"'{reference}' needs the package {package}: pip install {package} ({one_line(error)})."
        ) from None


def _import(name: str, reference: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise InputError(
                f"'{reference}': there is no module '{error.name}', neither installed nor in "
                f"the current directory '{os.getcwd()}'."
            ) from None
        raise InputError(f"'{reference}': importing '{name}' failed: {one_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise InputError(f"'{reference}': importing '{name}' failed: {one_line(error)}") from error


@contextlib.contextmanager
def _current_directory_on_path() -> Iterator[None]:
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)
