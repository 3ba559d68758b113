"""Command line of `glimpseprune.export`."""

from glimpseprune.export import main

if __name__ == "__main__":
    main()
