"""`python -m whispr`: the command line."""

from whispr.cli import main

if __name__ == "__main__":
    main()
