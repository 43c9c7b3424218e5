"""`python -m domino_jax` is the `domino` command."""

from domino_jax.cli import main

if __name__ == "__main__":
    main()
