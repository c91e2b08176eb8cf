"""Loads the fixtures where tests run: the process that hands tests out does not import torch."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist nobody asks
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores, since some tests wait for processes and signals."""
    return (os.cpu_count() or 1) + 1
