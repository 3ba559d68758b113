"""Command line of `glimpseprune.train`."""

from glimpseprune.train import main

if __name__ == "__main__":
    main()
