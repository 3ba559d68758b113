"""Command line of `glimpseprune.pretrain`."""

from glimpseprune.pretrain import main

if __name__ == "__main__":
    main()
