"""`python -m domino_jax` is the `domino` command, also where its script is not on the path."""

from domino_jax.cli import main

if __name__ == "__main__":
    main()
