"""`python -m recis`, so that `torchrun -m recis train ...` works."""

from recis.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
