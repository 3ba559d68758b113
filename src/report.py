"""Command line of `glimpseprune.report`."""

from glimpseprune.report import main

if __name__ == "__main__":
    main()
