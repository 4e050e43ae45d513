"""`python -m conrad_engine` is the command `conrad`."""

from .cli import main

raise SystemExit(main())
