"""Command line of `glimpseprune.ask`."""

from glimpseprune.ask import main

if __name__ == "__main__":
    main()
