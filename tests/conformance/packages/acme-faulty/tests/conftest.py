import pytest
from acme_faulty import Unregistered

from noether_init_core import kinds

pytest_plugins = ["noether_init_core.testing"]


@pytest.fixture(scope="session", autouse=True)
def unregistered():
    kinds.register("unregistered", Unregistered)
    yield
    kinds.unregister("unregistered")
