"""What the tests of this folder share."""

import pytest

from tests.faults.harness import Server


@pytest.fixture(scope="module")
def server():
    """The server process of a module."""
    server = Server()
    yield server
    server.close()
