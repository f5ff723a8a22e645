from __future__ import annotations

from importlib.metadata import metadata

from autobatch.support.installing import REPOSITORY, install_line


def test_the_line_names_the_package_and_the_repository_that_it_declares() -> None:
    declared = metadata("autobatch-gpu")
    assert f"Homepage, {REPOSITORY}" in (declared.get_all("Project-URL") or [])
    assert install_line() == f'pip install "{declared["Name"]} @ git+{REPOSITORY}"'
