"""Command line of `glimpseprune.preflight`."""

from glimpseprune.preflight import main

if __name__ == "__main__":
    main()
