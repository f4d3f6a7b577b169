"""Search images by text, by an image, or by both as one query, and draw the results as a contact sheet.

    python examples/search.py "red fruit" --index photos/
    python examples/search.py --image photo.png --index photos/
    python examples/search.py "made of glass" --image photo.png --index examples/data/emoji/test_style.parquet

The index of a folder or table is stored in a hidden directory beside it, and reused until the model or the name, size
or modification time of a file changes.
"""

import sys

from oner_command_line import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
