"""`python -m conrad_engine.training.pool_build`: see `build.py`."""

import sys

from ...errors import ConradError

if __name__ == "__main__":
    try:
        from .build import main  # here, so that a missing package is told in one sentence too

        main()
    except ConradError as error:
        sys.exit(f"error: {error}")
