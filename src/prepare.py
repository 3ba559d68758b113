"""Command line of `glimpseprune.prepare`."""

from glimpseprune.prepare import main

if __name__ == "__main__":
    main()
