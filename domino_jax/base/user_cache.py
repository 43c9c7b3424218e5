"""Directories of the user's cache, for whatever is computed once and read again."""

from pathlib import Path

from domino_jax.base.errors import InputError, require


def user_cache(name: str, *, needs: str) -> Path:
    """A directory of the user's cache; it may not be there yet.

    Args:
        name: of the directory.
        needs: who keeps something there, for the message.
    Raises:
        InputError: platformdirs is not installed, or the user has no home directory.
    """
    # Imported where it is used: machines with an accelerator's packages alone often lack it.
    try:
        import platformdirs
    except ModuleNotFoundError as error:
        raise InputError(f"{needs} needs platformdirs: pip install platformdirs") from error
    try:
        path = platformdirs.user_cache_path("domino_jax")
    except RuntimeError:  # of a user without a home directory
        path = Path("~")  # as older versions give it
    words = f"{needs} keeps files in the user's cache, but the user has no home directory"
    require(path.is_absolute(), f"{words}; set XDG_CACHE_HOME to an absolute path")
    return path / name
