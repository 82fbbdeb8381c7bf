import logging
import os
import signal

import pytest
import torch
from acme_faulty import Unregistered

from noether_init_core import kinds

pytest_plugins = ["noether_init_core.testing"]


@pytest.fixture(scope="session", autouse=True)
def unregistered():
    kinds.register("unregistered", Unregistered)
    yield
    kinds.unregister("unregistered")


@pytest.fixture(autouse=True)
def restored():
    """Put back what faulty kinds leave behind, so that it does not fail the checks of the next kind."""
    here, environment, load = os.getcwd(), dict(os.environ), torch.load
    backends, number = torch.backends, torch.get_num_threads()
    tf32, precision = backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()
    yield
    os.chdir(here)
    os.environ.clear()
    os.environ.update(environment)
    torch.load = load
    torch.set_num_threads(number)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(precision)
    torch.serialization.clear_safe_globals()
    backends.cuda.matmul.allow_tf32, backends.cudnn.benchmark, backends.cudnn.enabled = tf32, False, True
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.NOTSET)
