"""`python -m pretrain`."""

import sys


def main() -> None:
    """Run the command line; an interrupt while it is imported is one line as well."""
    try:
        from pretrain.cli import app
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
