"""A page as people see it, on a phone and on a screen, in both colour schemes."""

import itertools
from pathlib import Path

import matplotlib  # noqa: F401  (a machine without it skips this file)
from chromium import tab
from page_runs import write_run

from domino_jax.page.document import write_page
from domino_jax.page.sources import read_runs


def test_a_page_fits_its_window_and_says_nothing_to_the_console(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a-run-with-a-name-that-is-far-longer-than-a-phone-is-wide")
    runs = [first, write_run(tmp_path / "dflash", head=False), write_run(tmp_path / "third")]
    for name, shown in (("one", runs[:1]), ("three", runs)):
        write_page(read_runs(shown), tmp_path / f"{name}.html")
    colours = set()
    with tab(tmp_path) as page:
        for width, dark, name in itertools.product((390, 1400), (False, True), ("one", "three")):
            page.open(tmp_path / f"{name}.html", width=width, dark=dark)
            assert page.value("document.documentElement.scrollWidth") <= width
            assert page.value("document.querySelectorAll('svg').length") >= 10
            # Its letters are at least as large as the smallest that a phone is read with.
            size = "document.querySelector('svg text').getBoundingClientRect().height"
            assert page.value(size) >= 9
            colours.add(page.value("getComputedStyle(document.body).backgroundColor"))
            drawn = "getComputedStyle(document.querySelector('svg path[style*=run-0]')).stroke"
            colours.add(page.value(drawn))
        assert len(colours) == 4 and page.complaints() == []
