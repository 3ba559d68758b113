"""Command line of `glimpseprune.compare`."""

from glimpseprune.compare import main

if __name__ == "__main__":
    main()
