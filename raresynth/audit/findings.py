"""What an audit found: a tree of links, each with the checks that were made on it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from rich.markup import escape
from rich.tree import Tree

Status = Literal["ok", "broken", "unchecked"]
_MARKS = {"ok": "[green]✓[/]", "broken": "[red]✗[/]", "unchecked": "[yellow]?[/]"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `unchecked` where what it takes was not at hand."""

    what: str
    status: Status
    detail: str = ""


@dataclass
class Link:
    """One link of the chain, with what it was made from below it."""

    name: str
    checks: list[Check] = field(default_factory=list)
    made_from: list["Link"] = field(default_factory=list)

    def check(self, what: str, holds: bool, broken: str) -> bool:
        """Note whether something holds, and what is wrong where it does not; returns it."""
        self.checks.append(Check(what, "ok" if holds else "broken", "" if holds else broken))
        return holds

    def note(self, what: str, detail: str) -> None:
        """Note what was found, where nothing could be wrong."""
        self.checks.append(Check(what, "ok", detail))

    def unchecked(self, what: str, why: str) -> None:
        """Note that something could not be looked at."""
        self.checks.append(Check(what, "unchecked", why))

    def below(self, name: str) -> "Link":
        """A new link that this one was made from."""
        link = Link(name)
        self.made_from.append(link)
        return link

    def broken(self) -> list[tuple[str, Check]]:
        """Every check that failed, with the name of its link."""
        own = [(self.name, check) for check in self.checks if check.status == "broken"]
        return own + [entry for link in self.made_from for entry in link.broken()]

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "name": self.name,
            "checks": [vars(check) for check in self.checks],
            "made_from": [link.as_json() for link in self.made_from],
        }

    def as_tree(self) -> Tree:
        """As people read it."""
        tree = Tree(f"[bold]{escape(self.name)}[/]")
        for check in self.checks:
            detail = f": {escape(check.detail)}" if check.detail else ""
            tree.add(f"{_MARKS[check.status]} {escape(check.what)}{detail}")
        for link in self.made_from:
            tree.add(link.as_tree())
        return tree
