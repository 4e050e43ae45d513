"""Speed and memory, measured beside what the machine can do at most: `python -m conrad_engine.benchmark`."""
