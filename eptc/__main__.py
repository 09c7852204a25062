"""`python -m eptc`: the command line, where the script is not on the path."""

from eptc.cli import main

if __name__ == "__main__":
    main(prog_name="eptc")
