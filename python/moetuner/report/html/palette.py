"""All colours of the page, each by day and by night, and of the plots.

Style sheet and drawings name them as CSS variables; nothing else holds a colour. Night
is where the reader's system asks for dark pages; prints are always by day.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Ink:
    """One colour, ``#rrggbb`` each."""

    name: str
    """Of the variable, without its dashes."""
    day: str
    """Also of plots."""
    night: str

    @property
    def css(self) -> str:
        """What stands in style sheets and drawings."""
        return f"var(--{self.name})"


# Lines and areas: they differ in lightness too, for colour-blind eyes and grey prints.
BEFORE = Ink(name="before", day="#c2570c", night="#f08a3c")
AFTER = Ink(name="after", day="#1f5fa8", night="#6fb0f2")
OTHER = Ink(name="other", day="#64748b", night="#93a1b5")
PARTS = (
    Ink(name="part-1", day="#1f5fa8", night="#3b82d0"),
    Ink(name="part-2", day="#8fb8de", night="#a3cbf3"),
    Ink(name="part-3", day="#f0b862", night="#f7cf8d"),
)
"""Three parts of a whole, from dark to light."""

_PAGE = (
    Ink(name="ink", day="#172033", night="#e4e9f1"),
    Ink(name="soft", day="#566178", night="#a8b3c4"),
    Ink(name="line", day="#e1e6ee", night="#2d3644"),
    Ink(name="edge", day="#b9c2d0", night="#4a566a"),
    Ink(name="paper", day="#ffffff", night="#181e28"),
    Ink(name="ground", day="#f4f6fa", night="#10141b"),
    Ink(name="blue", day="#1f5fa8", night="#7cb6f2"),
    Ink(name="orange", day="#c2570c", night="#f2994f"),
    Ink(name="on-sign", day="#ffffff", night="#10141b"),
    Ink(name="good", day="#e8eef7", night="#1a2a40"),
    Ink(name="good-line", day="#c3d3e8", night="#31496a"),
    Ink(name="even", day="#eef0f4", night="#222935"),
    Ink(name="even-line", day="#d4d9e2", night="#3b4657"),
    Ink(name="bad", day="#fcf0e4", night="#38240f"),
    Ink(name="bad-line", day="#efc79d", night="#6e4719"),
    Ink(name="tip", day="#172033", night="#e4e9f1"),
    Ink(name="tip-ink", day="#ffffff", night="#10141b"),
)
PALETTE = (*_PAGE, BEFORE, AFTER, OTHER, *PARTS)


def variables() -> str:
    """The style sheet's part that says what each variable is, and when."""

    def block(values: list[tuple[str, str]], scheme: str) -> str:
        names = "".join(f" --{name}: {value};" for name, value in values)
        return f":root {{ color-scheme: {scheme};{names} }}"

    day = block([(ink.name, ink.day) for ink in PALETTE], "light")
    night = block([(ink.name, ink.night) for ink in PALETTE], "dark")
    return f"{day}\n@media screen and (prefers-color-scheme: dark) {{ {night} }}\n"
