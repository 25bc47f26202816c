"""``python -m densegrad``."""
from .cli import main

main()
