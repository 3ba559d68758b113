"""Command line of `glimpseprune.demo`."""

from glimpseprune.demo import main

if __name__ == "__main__":
    main()
