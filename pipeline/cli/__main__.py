"""`python -m pipeline.cli`."""

from pipeline.cli import main

if __name__ == "__main__":  # processes that are spawned import it as well
    main()
