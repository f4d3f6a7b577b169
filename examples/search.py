"""Search pictures by words, by a picture, or by both as one query, and draw the answers as a contact sheet.

    python examples/search.py "red fruit" --index photos/
    python examples/search.py --image photo.png --index photos/
    python examples/search.py "made of glass" --image photo.png --index examples/data/emoji/test_style.parquet

The index of a folder or table is kept in a hidden directory beside it and used again until a file's name, size or
time changes, or the model does.
"""

import sys

from oner_command_line import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
