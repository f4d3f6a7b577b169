"""Reports how each tensor of a foreign checkpoint was used, and which weights of the model it did not fill."""

from dataclasses import dataclass, field


@dataclass
class ConversionReport:
    """
    Every name of the file is in exactly one of `used` and `left_over`.

    Attributes:
        used: Name in the file -> our name.
        changed: Name in the file -> how its tensor was changed, apart from renaming.
        left_over: Name in the file -> why it was not used.
        missing: Our name that the file did not fill -> its initial value.
        notes: Other remarks, one sentence each.
    """

    used: dict[str, str] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    left_over: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def merge(self, other: "ConversionReport") -> "ConversionReport":
        """Adds the report of another file, in place. A weight that either file filled is not missing."""
        self.used |= other.used
        self.changed |= other.changed
        self.left_over |= other.left_over
        self.notes += other.notes

        # one file may fill what the other lacks
        filled = set(self.used.values())
        self.missing = {name: why for name, why in (self.missing | other.missing).items() if name not in filled}
        return self

    def describe(self) -> str:
        """The report as lines of text; used tensors are only counted."""
        # for used tensors, the normal case, the number is enough
        lines = [f"{len(self.used)} tensors used"]

        # all others are listed by name
        for title, names in (
            ("changed", self.changed),
            ("left over in the file", self.left_over),
            ("missing in the file", self.missing),
        ):
            lines.append(f"{len(names)} {title}" + (":" if names else ""))
            lines += [f"  {name}: {what}" for name, what in sorted(names.items())]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


class MissingWeightsError(ValueError):
    """A checkpoint whose weights are missing, damaged, or of the wrong shape; the message names the keys."""


__all__ = ["ConversionReport", "MissingWeightsError"]
