"""``python -m densegrad``."""
from .commands.cli import main

main()
