"""`python -m retriever_service`: the retriever's command line by itself."""

from retriever_service.cli import main

if __name__ == "__main__":
    main()
