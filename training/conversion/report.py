"""What became of each name of a foreign checkpoint, and what of a model it did not fill."""

from dataclasses import dataclass, field


@dataclass
class ConversionReport:
    """
    Every name of the file stands in exactly one of `used` and `left_over`.

    Attributes:
        used: Name in the file -> name here.
        changed: Name in the file -> what was done to its tensor beside renaming it.
        left_over: Name in the file -> why it has no place here.
        missing: Name here that the file did not fill -> what it begins as instead.
        notes: What else the reader should know, one sentence each.
    """

    used: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    left_over: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def merge(self, other: "ConversionReport") -> "ConversionReport":
        """Adds another file's; what either filled is not missing. In place."""
        self.used |= other.used
        self.changed |= other.changed
        self.left_over |= other.left_over
        self.notes += other.notes

        # one file may fill what the other lacks
        filled = set(self.used.values())
        self.missing = {name: why for name, why in (self.missing | other.missing).items() if name not in filled}
        return self

    def describe(self) -> str:
        """All of it as lines of text; of what was used only the number."""
        # what was used is the normal case: a number does
        lines = [f"{len(self.used)} tensors used"]

        # what was not is listed by name
        for title, names in (
            ("changed", self.changed),
            ("left over in the file", self.left_over),
            ("missing in the file", self.missing),
        ):
            lines.append(f"{len(names)} {title}" + (":" if names else ""))
            lines += [f"  {name}: {what}" for name, what in sorted(names.items())]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


class MissingWeightsError(ValueError):
    """A checkpoint that lacks, damages, or does not fit, what a tower needs; the message names the keys."""


__all__ = ["ConversionReport", "MissingWeightsError"]
