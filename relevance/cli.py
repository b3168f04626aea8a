"""The command `relevance`. This release carries no recipe yet; the command says so instead of failing on import."""

import argparse
import sys
from importlib.metadata import version


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code (2: this release has no recipe to run)."""
    parser = argparse.ArgumentParser(prog="relevance", description="LLM relevance recipes on recis.")
    parser.add_argument("--version", action="version", version=f"relevance {version('recis')}")
    parser.parse_args(argv)
    print("relevance: this release has no recipes yet; see `recis --help` for what is there", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
