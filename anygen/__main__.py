"""`python -m anygen` is the command `anygen`: what `accelerate launch -m anygen` starts in every process."""

from anygen.cli import main

if __name__ == "__main__":
    main()
