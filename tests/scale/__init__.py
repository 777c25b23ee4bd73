"""What is beyond one process, with the real programs that carry it: `make test-scale`, not part of `make test`."""
