# %% [markdown]
# # A picture and words as one query, and where the model looks
# `oner-scenes` knows scenes composed of emoji. Here it searches 200 scenes whose pairs of things it has never seen together. In a checkout; it takes half a minute of one core.

# %%
# !python examples/data/scenes.py runs/scenes --pairs 200 --split unseen_pairs

# %%
from pathlib import Path

import oner
from oner.training.evaluation.contact_sheet import draw_sheet
from oner.training.publishing.shipped import shipped_checkpoint
from transformers import pipeline

rows = oner.open_rows("runs/scenes/unseen_pairs.parquet")
folder = Path("scenes")
folder.mkdir(exist_ok=True)
for number in range(len(rows)):
    oner.open_image(rows[number]["image"]).save(folder / f"{number:03d}.png")
for number in range(5):
    print(f"{number:03d}", rows[number]["captions"][0])

# %% [markdown]
# ## Words
# Files are called by numbers: only the picture answers.

# %%
model = str(shipped_checkpoint("oner-scenes"))
search = pipeline("image-text-retrieval", model=model)
index = search.index(folder, show_progress=False)
asked = rows[0]["captions"][0]
draw_sheet({"text": asked}, search(asked, top_k=4), len(index))

# %% [markdown]
# ## A picture and words
# A thing by its drawing, another by its name. No scene is asked for that is known to be there, so look at what each way finds: the picture alone, the words alone, both in one pass.

# %%
emoji = oner.open_rows("examples/data/emoji/train.parquet", id_column="__row__")
apple = next(row for row in emoji if row["captions"][0] == "red apple")
oner.open_image(apple["image"]).save("apple.png")
draw_sheet({"image": "apple.png", "text": "a dog"}, search("a dog", image="apple.png", top_k=4), len(index))

# %%
ways = {
    "picture": search(image="apple.png", top_k=3),
    "words": search("a dog", top_k=3),
    "both": search("a dog", image="apple.png", top_k=3),
    "sum": search.combine([({"image": "apple.png"}, 1.0), ("a dog", 1.0)], top_k=3),
}
for way, answers in ways.items():
    print(f"{way:8}", *(rows[int(Path(answer["item"]).stem)]["captions"][0] + ";" for answer in answers))

# %% [markdown]
# Over 500 such queries among 1,000 scenes the scene of both is among the first ten in 79 % by both in one pass, in 26 % by the picture alone, in 57 % by the words alone, and in 82 % by the sum of the two ([Results](../results.md#composed-scenes)).

# %% [markdown]
# ## Where it looks
# Patches and words live in one space, so each patch has a cosine with the words. Red is the highest of this picture, blue the lowest, whatever they are; the box holds the high ones.

# %%
where = pipeline("visual-grounding", model=model)
found = where(str(folder / "000.png"), text=asked, overlay=True)
print(asked, found["box"], round(found["score"], 3))
found["overlay"].resize((320, 320))

# %% [markdown]
# One map proves nothing. Three pictures of four emoji each, and the map of each name; above them how often, of 60 such pictures, the highest patch lies on the named one. Guessing gives a quarter.

# %%
from oner.training.evaluation.localization import LocalizationEvaluator

evaluator = LocalizationEvaluator(emoji.take(range(0, 600, 5)), scenes=60, shown=3)
found = dict(evaluator.run(where.model, where.processor))
print({name: value for name, value in found.items() if isinstance(value, float)})
found["localization/scenes_sheet"]

# %% [markdown]
# A map of one tower is a hint and no detection. Families with cross-attention ground by Grad-CAM: [The families](../families.md#simla).
