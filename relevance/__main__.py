"""`python -m relevance` and `accelerate launch -m relevance`: the command `relevance`."""

from relevance.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
