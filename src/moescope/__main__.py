"""What the command `moescope` starts; `python -m moescope` is the same."""

import sys

from moescope import __version__


def main() -> int:
    """Run one command; the version needs none of what takes commands seconds to import."""
    if sys.argv[1:] == ["--version"]:
        print(f"moescope {__version__}")
        return 0
    from moescope import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
