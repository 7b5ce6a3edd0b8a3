"""One hypothesis profile for all: no deadlines, because the machine may be busy."""

from hypothesis import settings

settings.register_profile("minivtw", deadline=None)
settings.load_profile("minivtw")
