"""Two ends of the data path: a server with simple experts, and a pool that calls it."""

import pytest

from coeld.net.peers import PeerPool, PeerServer
from tests.harness.peer_ends import CALLER, HIDDEN, SERVER, introduction, run


@pytest.fixture
def server():
    made = PeerServer("127.0.0.1", 0)
    made.serve(introduction(SERVER), HIDDEN, run)
    yield made
    made.close()


@pytest.fixture
def pool():
    made = PeerPool(introduction(CALLER), 1.0)
    yield made
    made.close()
