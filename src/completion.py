"""Command line of `glimpseprune.completion`."""

from glimpseprune.completion import main

if __name__ == "__main__":
    main()
