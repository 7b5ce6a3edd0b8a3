"""One hypothesis profile for all: no deadlines, because the machine may be busy."""

import signal

import pytest
from hypothesis import settings

settings.register_profile("minivtw", deadline=None)
settings.load_profile("minivtw")


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """Ctrl-C is heard here and in every process begun here, also where it is ignored: in the background, under nohup."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
