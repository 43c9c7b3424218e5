"""Directories of the user's cache: the built-in target, answers, plans."""

from pathlib import Path

from domino_jax.base.errors import InputError, require


def user_cache(name: str, *, needs: str) -> Path:
    """The path of a directory of the user's cache, which may be missing.

    Args:
        name: of the directory.
        needs: the verb or target that uses it, for the message.
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
    require(
        path.is_absolute(),
        f"{needs} needs a cache, but the user has no home directory; set XDG_CACHE_HOME to an "
        "absolute path",
    )
    return path / name
