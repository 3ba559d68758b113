"""Command line of `glimpseprune.plan`."""

from glimpseprune.plan import main

if __name__ == "__main__":
    main()
