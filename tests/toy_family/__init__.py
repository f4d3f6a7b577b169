"""A small family of two portions, texts and pairs, added from outside by docs/adding_a_family.md."""
