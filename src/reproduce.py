"""Command line of `glimpseprune.reproduce`."""

from glimpseprune.reproduce import main

if __name__ == "__main__":
    main()
