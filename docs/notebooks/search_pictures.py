# %% [markdown]
# # Search by words, by a picture, and by both
# The checkpoint that ships searches a folder of pictures in a drawing style that it has never seen. Run it in a checkout, for the pictures; in a folder of your own, begin at the second cell. It takes half a minute.

# %%
import re
from pathlib import Path

import oner

rows = oner.open_rows("examples/data/emoji/test_style.parquet", id_column="hexcode")
photos = Path("photos")
photos.mkdir(exist_ok=True)
for number in range(0, len(rows), 3):
    name = re.sub(r"\W+", "_", rows[number]["captions"][0])
    oner.open_image(rows[number]["image"]).save(photos / f"{name}_{number}.png")
print(len(list(photos.iterdir())), "pictures")

# %% [markdown]
# The pipeline embeds the folder once. Everything that is asked afterwards costs one pass of the model.

# %%
from oner.training.publishing.shipped import shipped_checkpoint
from transformers import pipeline

search = pipeline("image-text-retrieval", model=str(shipped_checkpoint()))
index = search.index(photos, show_progress=False)
for answer in search("a heart", top_k=5):
    print(f"{answer['score']:+.3f}", Path(answer["item"]).stem)

# %% [markdown]
# The answers as a sheet. No caption is read: the index holds pictures alone, and their names are shown because the files are called so.

# %%
from oner.training.evaluation.contact_sheet import draw_sheet

draw_sheet({"text": "a heart"}, search("a heart", top_k=8), len(index))

# %% [markdown]
# ## By a picture
# The first answer, as a query. What comes first is itself, with a cosine of 1.

# %%
heart = search("a heart", top_k=1)[0]["item"]
draw_sheet({"image": heart}, search(image=heart, top_k=8), len(index))

# %% [markdown]
# ## By both
# Picture and words as one query: one sequence through the tower, one embedding, not a sum of two. What this small model makes of it is yours to judge; how often it helps is measured on [the page of results](../results.md#picture-and-caption-as-one-query).

# %%
draw_sheet({"image": heart, "text": "a face"}, search("a face", image=heart, top_k=8), len(index))

# %% [markdown]
# ## Sums and differences
# Weighted, in the space of the embeddings.

# %%
for answer in search.combine([("a face", 1.0), ("a heart", 0.5), ("a cat", -0.5)], top_k=5):
    print(f"{answer['score']:+.3f}", Path(answer["item"]).stem)

# %% [markdown]
# Scores rank. A query that nothing answers still gets a best answer, here with a lower cosine. Where to draw a line is yours to measure.

# %%
for words in ("a heart", "a tax return"):
    best = search(words, top_k=1)[0]
    print(f"{words}: {best['score']:+.3f}", Path(best["item"]).stem)
