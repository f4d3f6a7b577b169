# %% [markdown]
# # Fine-tune, and compare
# Does a little training on 300 pictures of a new drawing style help with other things in that style? Measured on pictures that were never trained on, beside the model before and a model of another family. In a checkout; it takes a minute of one core.

# %%
import pyarrow.parquet as pq

table = pq.read_table("examples/data/emoji/test_style.parquet")
every_fourth = [number for number in range(len(table)) if number % 4 == 0]
others = [number for number in range(len(table)) if number % 4 == 2]
pq.write_table(table.take(every_fourth), "style.parquet")
pq.write_table(table.take(others), "unseen.parquet")
print(len(every_fourth), "pictures to train on,", len(others), "to ask for")

# %% [markdown]
# `oner_folder` is the recipe of `oner train FOLDER`, for a table of pairs. Rows of one `hexcode` are right for each other.

# %%
# !oner train --config oner_folder --initial_model oner-emoji --train_data style.parquet --eval_data --id_column hexcode --epochs 4 --batch_size 64 --output_dir runs/tuned

# %% [markdown]
# ## Before and after
# One table, the same rows, the same protocol: the first caption of each picture. The last line is what guessing gives.

# %%
# !oner compare oner-emoji simla-emoji runs/tuned --data unseen.parquet --id_column hexcode --captions first

# %% [markdown]
# ## Is the difference more than chance?
# Each caption's rank before and after, of the same question. McNemar's test asks only those that one model answers and the other does not.

# %%
import oner
import torch
from oner.training.publishing.shipped import shipped_checkpoint
from transformers import pipeline

rows = oner.open_rows("unseen.parquet", id_column="hexcode")
right = {}
for name, model in {"before": shipped_checkpoint(), "after": "runs/tuned/model"}.items():
    search = pipeline("image-text-retrieval", model=str(model))
    pictures = search.embed([{"image": oner.open_image(rows[number]["image"])} for number in range(len(rows))])
    words = search.embed([rows[number]["captions"][0] for number in range(len(rows))])
    ten = (words @ pictures.T).topk(10).indices
    right[name] = (ten == torch.arange(len(rows))[:, None]).any(dim=1)
gained = int((right["after"] & ~right["before"]).sum())
lost = int((right["before"] & ~right["after"]).sum())
print(f"R@10 {right['before'].float().mean():.3f} -> {right['after'].float().mean():.3f}")
print(f"{gained} captions gained, {lost} lost")

# %%
from math import comb

# two sides of a fair coin thrown as often as the models differ
thrown, heads = gained + lost, max(gained, lost)
chance = min(1.0, 2 * sum(comb(thrown, k) for k in range(heads, thrown + 1)) / 2**thrown)
print(f"as uneven by chance: {chance:.2g}")

# %% [markdown]
# One seed, and one run. Had the table been read first and the recipe chosen by it, the pictures would no longer be unseen. More: [Fine-tune](../howto_finetune.md), [Read the numbers](../howto_read_the_numbers.md).
