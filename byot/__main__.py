"""Run the command `byot` as `python -m byot`."""

from byot.cli import main

if __name__ == "__main__":
    main()
