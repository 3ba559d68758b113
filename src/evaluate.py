"""Command line of `glimpseprune.evaluate`."""

from glimpseprune.evaluate import main

if __name__ == "__main__":
    main()
