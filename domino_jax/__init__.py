"""Training, evaluation and export of Domino and DFlash speculative-decoding drafters in JAX.

`docs/library.md` describes the public names; `__init__.pyi` lists them with their modules. A name's
module is imported at the first use of the name: `domino` imports this package and must answer
Ctrl-C before jax is there.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, _, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*_names, "__version__"]


def __dir__() -> list[str]:
    return __all__
