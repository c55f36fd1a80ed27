"""python -m lorank is lorank."""

from .cli import main

main()
