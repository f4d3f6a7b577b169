# %% [markdown]
# # Train on a folder, and read the numbers
# A folder of pictures called by what they show, three commands, and what each number means. In a checkout, for the pictures; with a folder of your own, begin at the second cell. It takes a minute of one core, for the run is cut to four epochs.

# %%
import re
from pathlib import Path

import oner

rows = oner.open_rows("examples/data/emoji/test_style.parquet", id_column="hexcode")
photos = Path("photos")
photos.mkdir(exist_ok=True)
for number in range(0, len(rows), 5):
    name = re.sub(r"\W+", "_", rows[number]["captions"][0])
    oner.open_image(rows[number]["image"]).save(photos / f"{name}_{number}.png")
print(len(list(photos.iterdir())), "pictures")

# %% [markdown]
# `oner train photos/` needs nothing else. It begins with the checkpoint that ships, holds out a tenth of the pictures, and says what it does.

# %%
# !oner train photos --epochs 4 --batch_size 64

# %% [markdown]
# ## What the numbers are
# `ir_r@10` is the share of captions whose picture is among the first ten, of the held-out pictures alone; `tr_r@10` the other way. Beside each stands what guessing gives: among so few pictures, ten answers are many. A recall without its gallery's size says nothing.

# %%
import json

log = [json.loads(line) for line in Path("runs/photos/log.jsonl").read_text().splitlines()]
for line in log:
    if "loss" in line:
        print(line["step"], {name: round(value, 3) for name, value in line.items() if name in ("loss", "itc", "cmc")})

# %% [markdown]
# Contrast (`itc`) begins near the logarithm of the number of pairs that it compares when a model knows nothing (log 64 = 4.16). This one began with a model that knows emoji, so it begins lower.

# %%
from PIL import Image

Image.open("runs/photos/log.png")

# %% [markdown]
# ## What it finds
# Captions of held-out pictures, and the nearest pictures to each; the right ones are framed.

# %%
Image.open("runs/photos/held_out.png")

# %% [markdown]
# ## What ails it
# The doctor reads log, checkpoint, model and rows. Exit status 1 means that it found something.

# %%
# !oner doctor runs/photos

# %% [markdown]
# ## Search it

# %%
# !oner search runs/photos "a cat" --top_k 5

# %% [markdown]
# More: [Train on your own folder](../howto_own_folder.md), [Read the numbers](../howto_read_the_numbers.md).
