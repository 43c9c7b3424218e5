"""Which tests a machine cannot run, and the reason that they are skipped with there.

Python 3.12 may have no build of torch for a CPU, and a machine that is there for its accelerator
may lack what single steps and decoding do without. A test asks for what it needs by importing it:
a file that does so at its top is skipped as a whole, a test or fixture that does so inside alone.
"""

from collections.abc import Generator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "domino_jax"
REFERENCES = ("torch", "nemo_automodel", "dflash", "torchao", "torchdata")
OPTIONAL = (
    *REFERENCES,
    "grain",
    "array_record",
    "gguf",
    "platformdirs",
    "matplotlib",
    "hypothesis",
)
NEEDS_PACKAGE = "needs {}, which scripts/test installs on Python 3.11"
NEEDS_ACCELERATOR = "needs a GPU or TPU: JAX_PLATFORMS=cuda pytest -m accelerator"


def require_compiler(place: str) -> None:
    """Skips a test of plans for a place, written `v5e:2x2`, where its compiler is not installed."""
    from domino_jax.plan.topology import missing_compiler, parse_device_spec

    lacking = missing_compiler(parse_device_spec(place))
    if lacking is not None:
        pytest.skip(lacking)


def missing_package(error: BaseException | None) -> str | None:
    """The one of `OPTIONAL` whose absence an error comes from, None for every other error.

    What domino_jax itself imports is never a reason to skip: it must run without the references,
    and a test of what needs one of the others imports that first.
    """
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__  # pytest's collection error stands around the import's
    name = (error.name or "").split(".")[0] if error is not None else ""
    if name not in OPTIONAL:
        return None
    trace = error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).is_relative_to(PACKAGE):
            return None
        trace = trace.tb_next
    return name


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skips a file that imports a missing package at its top."""
    report = yield
    name = missing_package(report.call.excinfo.value) if report.call.excinfo else None
    if name is not None:
        reason = f"Skipped: {NEEDS_PACKAGE.format(name)}"
        report.outcome, report.longrepr = "skipped", (str(collector.path), 1, reason)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """Skips a check of a device where there is none, and a test whose fixture lacks a package."""
    if item.get_closest_marker("accelerator") is not None:
        import jax

        if jax.default_backend() == "cpu":
            pytest.skip(NEEDS_ACCELERATOR)
    yield from _skip_without_package()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Skips a test that imports a missing package itself."""
    yield from _skip_without_package()


def _skip_without_package() -> Generator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        name = missing_package(error)
        if name is None:
            raise
        pytest.skip(NEEDS_PACKAGE.format(name))
